"""The plain Flower + PEFT app of `benchmarks/plain_flower`, on Flower's simulation with a worker a core."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

from benchmarks.prepared import Prepared
from benchmarks.rivals.report import Report, Task, main
from fedloru_flwr.engines.flower import run_on_flower

APP = Path(__file__).parent.parent / "plain_flower"


def measure(task: Task) -> Report:
    """Run the app and read the rounds' seconds from its output.

    Options: ``keep_model``: keep the PEFT model in each process; ``started``: when the command began (Unix time).
    """
    prepared = Prepared.load(task.workload)
    lines: list[str] = []
    begun = time.time()
    outcome = run_on_flower(
        APP,
        {
            "workload": str(Path(task.workload).absolute()),
            "num-server-rounds": task.warm_up + task.rounds,
            "threads": task.threads,
            "keep-model": bool(task.options.get("keep_model")),
        },
        num_supernodes=prepared.training.clients,
        ray_num_cpus=task.processes,
        on_line=lines.append,
    )
    rows: list[dict[str, Any]] = []
    trainable = 0
    for line in lines:
        if line.startswith("{"):
            row = json.loads(line)
            trainable = row.get("trainable", trainable)
            rows += [row] if "round" in row else []
    if not outcome.completed or len(rows) != task.warm_up + task.rounds:
        raise RuntimeError(f"the plain app ended as {outcome.status}: {outcome.details}\n" + "\n".join(lines[-40:]))
    measured = rows[task.warm_up :]
    return Report(
        rounds=[row["seconds"] for row in measured],
        threads=task.threads,
        processes=task.processes,
        clients=min(row["clients"] for row in measured),
        steps=prepared.steps(0),
        samples=round(statistics.mean(row["samples"] for row in measured)),
        trainable=trainable,
        form="PEFT model kept" if task.options.get("keep_model") else "PEFT model rebuilt for each message",
        extra={
            "first_round_from_run": rows[0]["ended"] - begun,
            "first_round_from_command": rows[0]["ended"] - float(task.options.get("started", begun)),
        },
    )


if __name__ == "__main__":
    main(measure)
