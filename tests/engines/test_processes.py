"""The in-process engine on several processes."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import fedloru_flwr
from fedloru_flwr.engines import processes
from fedloru_flwr.engines.in_process import named
from fedloru_flwr.engines.workers import Worker, Workers
from fedloru_flwr.launch import RunFailedError

SETTINGS = {"num-clients": 40, "fraction-train": 0.5, "num-server-rounds": 3, "local-epochs": 3, "clients-per-batch": 8}
SETTINGS |= {"model": "mlp", "hidden": "32,32", "fraction-evaluate": 0.5, "accumulate-every": 2}


def run(directory: Path, name: str, num_actors: int, **more) -> Path:
    settings = {**SETTINGS, **more, "output-dir": str(directory), "run-name": name}
    return Path(fedloru_flwr.run(config=settings, engine="in-process", num_actors=num_actors)["run_dir"])


def workers() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "fedloru_flwr.engines.processes" in child.cmdline()]


def same(one: Path, other: Path, rows_of) -> bool:
    models = [(path / "model.safetensors").read_bytes() for path in (one, other)]
    return rows_of(one) == rows_of(other) and models[0] == models[1]


def test_the_number_of_processes_changes_no_byte_nor_does_the_death_of_one(tmp_path, monkeypatch, caplog, rows_of):
    seen: list[int] = []
    original = processes._Round._hand_out

    def hand_out(self, worker: Worker) -> None:
        seen.append(worker.process.pid)
        if len(seen) == 4:  # in the middle of a round, once it has worked
            os.kill(worker.process.pid, signal.SIGKILL)
        original(self, worker)

    alone = run(tmp_path, "alone", 1)
    monkeypatch.setattr(processes._Round, "_hand_out", hand_out)
    helped = run(tmp_path, "helped", 2)
    assert len(set(seen)) == 1
    assert len(seen) == 4, "nobody gives a dead worker anything"
    assert sum("worker process has ended with status -9" in record.message for record in caplog.records) == 1
    assert same(alone, helped, rows_of)
    assert workers() == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"algorithm": "pfedloru"},
        {"scaffold": True},
        {"algorithm": "flora", "ranks": "2:0.5,4:0.5", "accumulate-every": 0},
    ],
)
def test_every_worker_does_its_part_of_every_method(more, tmp_path, rows_of):
    assert same(run(tmp_path, "one", 1, **more), run(tmp_path, "three", 3, **more), rows_of)


@pytest.mark.slow
def test_a_run_that_fails_leaves_no_worker_behind(tmp_path):
    with pytest.raises(RunFailedError, match="20 of 20 clients failed"):
        run(tmp_path, "failing", 2, **{"max-failure-fraction": 0.1, "learning-rate": 1e30, "max-grad-norm": 0.0})
    assert workers() == []


@pytest.mark.slow
def test_a_worker_does_not_outlive_whoever_started_it(tmp_path):
    script = "import os, signal; from fedloru_flwr.engines.workers import Workers; w = Workers(1).members[0];"
    script += "print(w.process.pid, flush=True); import time; time.sleep(4); os.kill(os.getpid(), signal.SIGKILL)"
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    left = psutil.Process(int(told.stdout)) if psutil.pid_exists(int(told.stdout)) else None
    assert left is None or left.wait(10) in (None, 0, 1)


def test_whoever_waits_for_a_worker_that_is_stopped_is_told():
    with Workers(1) as started:
        (worker,) = started.members
        told: list[str] = []

        def wait() -> None:
            try:
                worker.receive()
            except EOFError:
                told.append("dead")

        thread = threading.Thread(target=wait)
        thread.start()
        time.sleep(0.2)
    thread.join(10)
    assert told == ["dead"]
    assert worker.process.returncode is not None


def test_a_round_that_is_left_early_waits_for_shares_under_way(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    began, allowed, received = threading.Event(), threading.Event(), []

    class Slow:
        """A worker that takes its time."""

        is_stopped = False

        def send(self, packet):
            """Begins."""
            began.set()

        def receive(self):
            """Ends when it may."""
            allowed.wait(30)
            received.append(1)
            return RuntimeError("of no interest any more")

    class Grid:
        """Trains its own shares at once."""

        _workers = (Slow(),)

        def _answer_share(self, requests):
            assert began.wait(30)
            return iter(requests)

    parts = [[(message, None)] for message in named(Message(RecordDict(), node, "train") for node in range(3))]
    replies = processes._Round(parts, Grid()).replies()
    assert next(replies) == parts[0][0]
    threading.Timer(0.2, allowed.set).start()
    replies.close()
    assert received == [1], "the next round would have taken that answer for its own"
