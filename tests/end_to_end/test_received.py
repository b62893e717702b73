"""What clients receive is evaluated in the message of their training."""

from pathlib import Path

import pytest

import fedloru_flwr
from fedloru_flwr.runs import RunDirectory

SETTINGS = {
    "num-clients": 5,
    "num-server-rounds": 4,
    "fraction-train": 1.0,
    "fraction-evaluate": 1.0,
    "local-epochs": 3,
    "accumulate-every": 2,
    "evaluate-in-training": True,
    "model": "mlp",
    "hidden": "16",
}


@pytest.mark.parametrize("algorithm", ["fedloru", "pfedloru", "fedsa-lora", "fedavg"])
def test_it_is_the_evaluation_of_the_round_before(algorithm, tmp_path):
    every = 2 if algorithm in ("fedloru", "pfedloru") else 0
    settings = {**SETTINGS, "algorithm": algorithm, "accumulate-every": every, "output-dir": str(tmp_path)}
    run = fedloru_flwr.run(config=settings, engine="in-process", on_line=lambda line: None)
    rows = {row["round"]: row for row in RunDirectory(Path(run["run_dir"])).read_rounds()}
    own = "personal-" if algorithm in ("pfedloru", "fedsa-lora") else ""
    assert set(rows[1]["received"]) == {f"{own}accuracy", f"{own}loss"}
    for server_round in (1, 2, 3):
        before, after = rows[server_round]["clients"], rows[server_round + 1]["received"]
        for name, spread in after.items():
            assert spread == pytest.approx(before[name], rel=1e-5), (server_round, name)


def test_the_training_is_the_same_as_without(tmp_path):
    def rows(name, **more):
        settings = {**SETTINGS, "batched": False, "output-dir": str(tmp_path), "run-name": name, **more}
        run = fedloru_flwr.run(config=settings, engine="in-process", on_line=lambda line: None)
        return RunDirectory(Path(run["run_dir"])).read_rounds()

    with_it, without = rows("with"), rows("without", **{"evaluate-in-training": False})
    assert [row["accuracy"] for row in with_it] == [row["accuracy"] for row in without]
    assert [row["train_loss"] for row in with_it] == [row["train_loss"] for row in without]
