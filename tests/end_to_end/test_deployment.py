"""A SuperLink and SuperNodes as separate processes, each client with data of its own and no partition id."""

import random
from pathlib import Path

import pytest
from fleet import Fleet

from fedloru_flwr.config import RunConfig
from fedloru_flwr.engines.app_dir import flower_app
from fedloru_flwr.runs import RunDirectory


def write_clients_file(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = ["a,b,c,label"]
    for _ in range(60):
        label = draw.randrange(3)
        values = [draw.gauss(3.0 if axis == label else 0.0, 1.0) for axis in range(3)]
        rows.append(",".join(f"{value:.4f}" for value in values) + f",{label}")
    path.write_text("\n".join(rows) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_clients_with_their_own_data_train_on_supernodes(tmp_path):
    settings = {
        "num-clients": 2,
        "num-server-rounds": 3,
        "fraction-train": 1.0,
        "fraction-evaluate": 1.0,
        "accumulate-every": 1,
        "dataset": "local",
        "data-path": str(tmp_path / "server.csv"),
        "num-classes": 3,
        "model": "mlp",
        "hidden": "16,16",
        "rank": 2,
        "output-dir": str(tmp_path / "runs"),
        "run-name": "deployed",
        "timeout": 200.0,
    }
    RunConfig.from_mapping(settings)
    for seed, name in enumerate(("server", "north", "south")):
        write_clients_file(tmp_path / f"{name}.csv", seed)
    with Fleet(tmp_path / "fleet", secure=False) as fleet, flower_app() as app:
        fleet.start_superlink()
        for name in ("north", "south"):
            fleet.start_supernode(name, {"client-id": name, "data-path": str(tmp_path / f"{name}.csv")})
        run_id = fleet.submit(app, settings)
        assert fleet.await_run(run_id, 400) == "finished:completed", fleet.logs()
    rows = RunDirectory(tmp_path / "runs/deployed").read_rounds()
    assert [(row["clients_ok"], row["clients_failed"]) for row in rows[1:]] == [(2, 0)] * 3
    assert rows[-1]["ledger_version"] == 3
    assert all("repeats" not in row["bytes_by_purpose"] for row in rows)
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]
    for name in ("north", "south"):
        assert len(list((tmp_path / "fleet" / name / "home/fedloru/entries").glob("*.safetensors"))) == 3
