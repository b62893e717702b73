"""A worker process: carries out one task after another, told on standard input, answered on standard output.

One line of JSON each way. When standard input ends, whoever started the worker is gone or wants it to stop: what it
is doing is interrupted as by Ctrl-C, which saves the run's state, and the process ends.
"""

import contextlib
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Answer = dict[str, Any]
LOCK = "FEDLORU_COMPARE_LOCK"  # names the open file that keeps a second comparison out of the directory
GRACE_SECONDS = 20.0  # for an interrupted run to save its state and stop what it has started


def main() -> None:
    """Serve until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if lock := os.environ.get(LOCK):
        os.set_inheritable(int(lock), False)  # what a run leaves behind must not hold it
    # Also where the parent was started with them ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    tasks: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(tasks,), daemon=True).start()
    try:
        while (line := tasks.get()) is not None:
            answer = _carry_out(json.loads(line))
            with contextlib.suppress(BrokenPipeError):
                answers.write(json.dumps(answer) + "\n")
                answers.flush()
    except KeyboardInterrupt:
        os._exit(130)  # at once: what other threads wait for is of no use any more
    os._exit(0)


def _listen(tasks: "queue.SimpleQueue[str | None]") -> None:
    for line in sys.stdin:
        tasks.put(line)
    tasks.put(None)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(GRACE_SECONDS)
    os._exit(130)


def _carry_out(task: Mapping[str, Any]) -> Answer:
    with _logged(task.get("log")):
        try:
            return {"ok": True, **TASKS[task["task"]](task)}
        except Exception as error:  # whatever a run dies of is reported, and the next one goes on
            traceback.print_exc()
            refused = isinstance(error, ValueError)
            return {"ok": False, "refused": refused, "reason": _reason(error)}


@contextlib.contextmanager
def _logged(path: str | None) -> Any:
    """Send all output of this process, and of those it starts, to a file."""
    log = os.open(path or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        os.close(nowhere)


def _reason(error: Exception) -> str:
    from fedloru_flwr.launch import RunFailedError

    lines = str(error).splitlines() or [""]
    # A run's own failure says what happened; where its files are is known here.
    told = lines[0] if isinstance(error, RunFailedError | ValueError) else f"{type(error).__name__}: {lines[0]}"
    return told if len(told) <= 200 else f"{told[:199]}\u2026"


def check(task: Mapping[str, Any]) -> Answer:
    """Refuse settings that could not run."""
    from fedloru_flwr import job
    from fedloru_flwr.config import RunConfig

    job.check(RunConfig.from_mapping(task["settings"]))
    return {}


def run(task: Mapping[str, Any]) -> Answer:
    """Carry out one run, or go on with it."""
    from fedloru_flwr import launch

    actors = task.get("num_actors")
    launch.run(None, task["settings"], engine=task["engine"], resume="auto", num_actors=actors)
    return {}


def partition(task: Mapping[str, Any]) -> Answer:
    """Count the samples that each client has of each class."""
    import numpy as np

    from fedloru_flwr.config import RunConfig
    from fedloru_flwr.data import partition_indices
    from fedloru_flwr.data.sources import load_source
    from fedloru_flwr.workload import data_config

    config = data_config(RunConfig.from_mapping(task["settings"]))
    source = load_source(config)
    labels, classes = source.train.labels.numpy(), source.spec.num_classes
    clients = partition_indices(config)[: task["most"]]
    return {"counts": [np.bincount(labels[indices], minlength=classes).tolist() for indices in clients]}


def rank(task: Mapping[str, Any]) -> Answer:
    """Carry out one training of a rank analysis and measure it, or go on with that."""
    from pathlib import Path

    from fedloru_flwr.rank.spec import Measure
    from fedloru_flwr.rank.unit import carry_out

    carry_out(task["settings"], task["clients"], Measure.of_json(task["measure"]), Path(task["directory"]))
    return {}


def learned(task: Mapping[str, Any]) -> Answer:
    """Write down the rank of what a run has learned."""
    from fedloru_flwr.rank.learned import write_ranks

    write_ranks(task["directory"])
    return {}


TASKS: dict[str, Callable[[Mapping[str, Any]], Answer]] = {
    "check": check,
    "run": run,
    "partition": partition,
    "rank": rank,
    "learned": learned,
}


if __name__ == "__main__":
    main()
