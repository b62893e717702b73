"""Real runs: `flwr run`, SuperLink, Ray."""

import contextlib
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

import fedloru_flwr
from fedloru_flwr import wire
from fedloru_flwr.engines.flower import run_on_flower
from fedloru_flwr.launch import RunFailedError
from fedloru_flwr.strategies import FedLoRU

SETTINGS = {
    "num-clients": 8,
    "num-server-rounds": 3,
    "local-epochs": 1,
    "accumulate-every": 1,
    "fraction-evaluate": 0.5,
    "norm": "batch",
    "model": "resnet10",
    "model-width": 8,
    "batched": False,
}


@pytest.fixture
def output_dir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def run(name: str, engine: str = "flower", **more) -> Path:
    on_line = more.pop("on_line", lambda line: None)
    arguments = {key: more.pop(key, None) for key in ("num_actors", "num_supernodes")}
    settings = {**SETTINGS, "run-name": name, **more}
    return Path(fedloru_flwr.run(config=settings, engine=engine, on_line=on_line, **arguments)["run_dir"])


@pytest.mark.slow
def test_a_run_on_ray_and_one_in_process_are_the_same_byte_for_byte(output_dir, rows_of):
    on_ray = run("ray", num_actors=2)
    in_process = run("in-process", engine="in-process")
    assert rows_of(on_ray) == rows_of(in_process)
    assert [row["ledger_version"] for row in rows_of(on_ray)] == [0, 1, 2, 3]
    assert all(row["clients_failed"] == 0 for row in rows_of(on_ray))
    assert (on_ray / "model.safetensors").read_bytes() == (in_process / "model.safetensors").read_bytes()
    marked = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert marked == []


@pytest.mark.slow
@pytest.mark.parametrize("into", ["merge", "stack"])
def test_neither_the_number_of_actors_nor_the_engine_changes_a_byte(into, output_dir, rows_of):
    runs = [run(f"{into}-{actors}", num_actors=actors, **{"accumulate-into": into}) for actors in (1, 2)]
    runs.append(run(f"{into}-in-process", engine="in-process", **{"accumulate-into": into}))
    assert rows_of(runs[0]) == rows_of(runs[1]) == rows_of(runs[2])
    models = [(path / "model.safetensors").read_bytes() for path in runs]
    assert models[0] == models[1] == models[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "more"),
    [
        ("pfedloru", {"local-epochs": 3}),
        ("lowrank-ef", {"accumulate-every": 0}),
        ("fedloru", {"scaffold": True, "server-optimizer": "fedadam", "server-learning-rate": 0.01}),
        ("mfedloru", {"ranks": "4:0.5,1:0.5"}),
    ],
)
def test_clients_own_state_and_ranks_are_the_same_on_ray_and_in_process(algorithm, more, output_dir, rows_of):
    settings = {"algorithm": algorithm, "model": "cnn", "num-server-rounds": 4, "accumulate-every": 2, **more}
    on_ray = run("ray", num_actors=2, **settings)
    in_process = run("in-process", engine="in-process", **settings)
    assert rows_of(on_ray) == rows_of(in_process)
    assert (on_ray / "model.safetensors").read_bytes() == (in_process / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_three_actors_and_four_clients_never_lose_a_reply_to_an_older_base(output_dir, rows_of):
    settings = {
        "num-clients": 4,
        "num-server-rounds": 12,
        "fraction-train": 0.75,
        "fraction-evaluate": 0.0,
        "model": "cnn",
    }
    on_ray = run("three", num_actors=3, **settings)
    rows = rows_of(on_ray)
    assert [(row["clients_ok"], row["clients_failed"]) for row in rows[1:]] == [(3, 0)] * 12
    assert rows[-1]["ledger_version"] == 12
    assert all("repeats" not in row["bytes_by_purpose"] and "base" not in row["bytes_by_purpose"] for row in rows)
    assert rows_of(run("three-in-process", engine="in-process", **settings)) == rows


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["fedavg", "fedlora"])
def test_the_baselines_run_on_ray(algorithm, output_dir, rows_of):
    settings = {"accumulate-every": 0, "learning-rate-schedule": "cosine"}
    rows = rows_of(run(algorithm, algorithm=algorithm, model="cnn", **settings))
    assert [row["ledger_version"] for row in rows] == [0, 0, 0, 0]
    assert rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.slow
def test_flwr_run_works_on_the_checkout_itself(output_dir):
    checkout = Path(fedloru_flwr.__file__).parent.parent
    settings = {**SETTINGS, "output-dir": str(output_dir), "run-name": "plain", "model": "mlp"}
    lines: list[str] = []
    outcome = run_on_flower(checkout, settings, num_supernodes=8, on_line=lines.append)
    assert outcome.completed, "\n".join(lines)
    assert (output_dir / "plain" / "summary.json").exists()
    assert any(line.startswith("round 3/3") for line in lines)


def kill_a_worker() -> bool:
    """Kill the Ray actor below this process that has worked most (another may get no messages), if there is one."""
    worked: dict[psutil.Process, float] = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # some live for a moment only
            if any(part.startswith("ray::ClientAppActor") for part in process.cmdline()):
                worked[process] = process.cpu_times().user
    if not worked:
        return False
    max(worked, key=worked.__getitem__).kill()
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"clients-per-batch": 3, "norm": "group"},  # trained as batches
        {"norm": "batch"},  # one at a time, by the hosts
        {"algorithm": "pfedloru", "local-epochs": 3, "model": "cnn"},
    ],
)
def test_supernodes_that_host_many_clients_give_the_run_of_the_other_engine(more, output_dir, rows_of):
    more = {**more, "batched": True}
    hosted = run("hosted", num_actors=2, num_supernodes=2, **more)
    in_process = run("in-process", engine="in-process", **more)
    assert rows_of(hosted) == rows_of(in_process)
    assert all(row["clients_failed"] == 0 for row in rows_of(hosted))
    assert (hosted / "model.safetensors").read_bytes() == (in_process / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_hosts_whose_worker_dies_go_on_as_well(output_dir, rows_of):
    # By the run's own file, not by what is printed: that comes seconds late, when rounds this short are over.
    metrics = output_dir / "killed" / "metrics.jsonl"

    def kill_a_worker_from_the_second_round_on() -> None:  # until one is missed: it may have had nothing to do
        while not over.is_set() and not any("has died" in line for line in said):
            is_due = metrics.exists() and metrics.read_text().count("\n") >= 2
            time.sleep(0.2 if is_due and kill_a_worker() else 0.005)

    said: list[str] = []
    over = threading.Event()
    more = {"batched": True, "norm": "group", "checkpoint-every": 1, "num-server-rounds": 40, "accumulate-every": 5}
    killer = threading.Thread(target=kill_a_worker_from_the_second_round_on)
    killer.start()
    try:
        killed = run("killed", on_line=said.append, num_supernodes=2, **more)
    finally:
        over.set()
        killer.join()
    assert sum("a worker has died" in line for line in said) == 1
    assert rows_of(killed) == rows_of(run("expected", "in-process", **more))


@pytest.mark.slow
def test_a_run_whose_worker_dies_goes_on_by_itself_as_if_nothing_had_happened(output_dir, rows_of):
    said: list[str] = []

    def watch(line: str) -> None:
        said.append(line)
        if line.startswith("round 2/") and not any("has died" in one for one in said):
            assert kill_a_worker()

    more = {"algorithm": "pfedloru", "local-epochs": 3, "checkpoint-every": 1}
    killed = run("killed", on_line=watch, **more)
    assert sum("a worker has died" in line and "in a new simulation" in line for line in said) == 1
    expected = run("expected", "in-process", batched=False, **more)
    assert rows_of(killed) == rows_of(expected)
    assert (killed / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_that_fails_on_flower_is_a_failure_here(output_dir):
    with pytest.raises(RunFailedError, match="finished:failed"):
        run("failing", timeout=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("model_from", ["factory", "instance"])
def test_another_app_gains_low_rank_training_by_swapping_the_strategy(model_from, output_dir, quickstart, rows_of):
    run_dir = output_dir / "quickstart"
    lines: list[str] = []
    # The app draws its model and batches at random, without a seed: at its own rate a client diverges now and then.
    config = {"model-from": model_from, "run-dir": str(run_dir), "num-server-rounds": 6, "learning-rate": 0.03}
    outcome = run_on_flower(quickstart, config, num_supernodes=6, ray_num_cpus=2, on_line=lines.append)
    assert outcome.completed, "\n".join(lines)
    rows = rows_of(run_dir)
    assert [(row["clients_ok"], row["clients_failed"]) for row in rows[1:]] == [(3, 0)] * 6
    assert "evaluated rounds: [1, 2, 3, 4, 5, 6]" in lines
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    base = [row["bytes_by_purpose"].get("base", {"down": 0})["down"] for row in rows]
    if model_from == "factory":
        assert sum(base) == 0
    else:  # once for each of the six clients, ever; beside the tensors there are the header and the app's settings
        assert 6 * bytes_of_w0(quickstart) <= sum(base) < 6 * (bytes_of_w0(quickstart) + 500)


def bytes_of_w0(app: Path) -> int:
    """What a message with the whole base of the app's model weighs."""
    sys.path.insert(0, str(app))
    try:
        from quickstart.task import Net
    finally:
        sys.path.remove(str(app))
    strategy = FedLoRU(Net, rank=4, alpha=4)
    ledger = strategy.state.ledger
    content = wire.supply_content(
        "base", root=ledger.root, lineage=ledger.lineage, settings=strategy.settings, base=strategy.state.base
    )
    return wire.content_bytes(content)
