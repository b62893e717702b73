"""This package: `fedloru_flwr.run` with the workload's settings, in one process, on several, or through Flower."""

import inspect
import json
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.rivals.report import Report, Task, Unavailable, main

_LOOK_SECONDS = 0.02


class _Watch(threading.Thread):
    """Notes when a run's directory shows the end of round 1."""

    def __init__(self, metrics: Path) -> None:
        super().__init__(daemon=True)
        self.metrics = metrics
        self.ended = 0.0

    def run(self) -> None:
        """Look now and then, until it does."""
        while not self.ended:
            if self.metrics.exists():
                rows = [line for line in self.metrics.read_text().splitlines() if line.endswith("}")]
                if any(json.loads(row)["round"] == 1 for row in rows):
                    self.ended = time.time()
            time.sleep(_LOOK_SECONDS)


def measure(task: Task) -> Report:
    """Run the workload and read the rounds' seconds from its metrics.

    Options: ``settings`` of the run; ``arguments`` of `fedloru_flwr.run`, or settings where it has none of that name;
    ``started``: when the command began (Unix time).
    """
    import fedloru_flwr
    from fedloru_flwr.config import RunConfig

    settings: dict[str, Any] = {
        **task.options["settings"],
        "threads": task.threads,
        "num-server-rounds": task.warm_up + task.rounds,
    }
    arguments: dict[str, Any] = {}
    known = inspect.signature(fedloru_flwr.run).parameters
    for name, value in task.options.get("arguments", {}).items():
        if name in known:
            arguments[name] = value
        elif (key := name.replace("_", "-")) in RunConfig().as_mapping():
            settings[key] = value
        else:
            raise Unavailable(f"fedloru_flwr.run has no {name}")
    begun: list[float] = []
    through_flower = arguments.get("engine") == "flower"
    if through_flower:
        _note_start(begun)
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        settings |= {"output-dir": directory, "run-name": "run"}
        watch = _Watch(Path(directory) / "run" / "metrics.jsonl")
        if through_flower:
            watch.start()
        lines: list[str] = []
        try:
            summary = fedloru_flwr.run(config=settings, on_line=lines.append, **arguments)
        except fedloru_flwr.RunFailedError:
            print("\n".join(lines), flush=True)  # for the log
            raise
        rows = [json.loads(line) for line in watch.metrics.read_text().splitlines()]
        plan = json.loads((Path(directory) / "run" / "summary.json").read_text())
    measured = [row for row in rows if row["round"] > task.warm_up]
    failed = sum(row["clients_failed"] for row in measured)
    if failed or len(measured) != task.rounds:
        raise RuntimeError(f"{failed} clients failed in {len(measured)} of {task.rounds} rounds: {summary}")
    extra = {}
    if watch.ended:
        extra["first_round_from_command"] = watch.ended - float(task.options.get("started", watch.ended))
        if begun:
            extra["first_round_from_run"] = watch.ended - begun[0]
    return Report(
        rounds=[row["seconds"] for row in measured],
        threads=task.threads,
        processes=task.processes,
        clients=min(row["clients_ok"] for row in measured),
        steps=int(task.options.get("steps", 0)),
        samples=int(task.options.get("samples", 0)),
        trainable=int(plan["trainable_parameters"]),
        form=str(task.options.get("form", "")),
        extra=extra,
    )


def _note_start(begun: list[float]) -> None:
    """Note when the Flower engine is called: what comes before is this package's own checking."""
    from fedloru_flwr.engines import flower

    run_on_flower = flower.run_on_flower

    def noted(*arguments: Any, **named: Any) -> Any:
        begun.append(time.time())
        return run_on_flower(*arguments, **named)

    flower.run_on_flower = noted


if __name__ == "__main__":
    main(measure)
