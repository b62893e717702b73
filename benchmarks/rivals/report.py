"""What a rival's process is told on its command line, and what it says at its end. Only the standard library."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MARK = "BENCH "
UNAVAILABLE = "UNAVAILABLE "


@dataclass(frozen=True)
class Report:
    """What one process measured.

    Attributes:
        rounds: wall seconds of each measured round, in order.
        threads: torch's threads in each process that trains.
        processes: how many train.
        clients: clients a round.
        steps: optimiser steps of a client in a round.
        samples: training samples of the clients of a round, together.
        trainable: parameters that are trained.
        form: how it computes, where there is a choice.
        extra: other figures, by name.
    """

    rounds: list[float]
    threads: int
    processes: int
    clients: int
    steps: int
    samples: int
    trainable: int
    form: str = ""
    extra: dict[str, float] = field(default_factory=dict)

    def line(self) -> str:
        """The report as one line of output."""
        return MARK + json.dumps(dataclasses.asdict(self))

    @classmethod
    def find(cls, output: str) -> "Report | None":
        """The report in a process's output, or None.

        Raises:
            Unavailable: the process said that it cannot measure this.
        """
        for line in output.splitlines():
            if line.startswith(UNAVAILABLE):
                raise Unavailable(line.removeprefix(UNAVAILABLE))
        lines = [line for line in output.splitlines() if line.startswith(MARK)]
        return cls(**json.loads(lines[-1].removeprefix(MARK))) if lines else None


@dataclass(frozen=True)
class Task:
    """What a rival's process has to do.

    Attributes:
        workload: the prepared workload's file.
        rounds: how many to measure.
        warm_up: how many to train before them.
        threads: torch's threads in each process.
        processes: how many may train at a time.
        options: the rival's own.
    """

    workload: str
    rounds: int
    warm_up: int
    threads: int = 1
    processes: int = 1
    options: dict[str, Any] = field(default_factory=dict)


class Unavailable(RuntimeError):
    """This rival cannot be measured here; the message says why."""


def main(measure: Callable[[Task], Report]) -> None:
    """Read a `Task` from the command line, as JSON, and print the `Report`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", help="a Task as JSON")
    task = Task(**json.loads(parser.parse_args().task))
    try:
        print(measure(task).line(), flush=True)
    except Unavailable as reason:
        print(f"{UNAVAILABLE}{reason}", flush=True)
