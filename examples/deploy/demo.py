"""FedLoRU over a real deployment: one SuperLink with TLS, three SuperNodes that it knows by their keys.

Each SuperNode has a third of scikit-learn's digits in a file that only it reads; the server has no data. The accuracy
is the mean over what the clients hold out. Everything but the run directory is temporary.

::

    python examples/deploy/demo.py [OUTPUT_DIRECTORY]
"""

import json
import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

from fleet import Fleet, FleetError, Value
from sklearn.datasets import load_digits

from fedloru_flwr.engines.app_dir import flower_app

CLIENTS = ("north", "south", "west")


def settings(output: Path, run_name: str = "", rounds: int = 4) -> dict[str, Value]:
    """The run config: FedLoRU on data that only clients have."""
    return {
        "algorithm": "fedloru",
        "num-clients": len(CLIENTS),
        "num-server-rounds": rounds,
        "fraction-train": 1.0,
        "fraction-evaluate": 1.0,
        "evaluate-every": rounds,
        "accumulate-every": max(1, rounds // 2),
        "checkpoint-every": 1,
        "dataset": "clients",
        "input-shape": "1,8,8",
        "num-classes": 10,
        "model": "cnn",
        "rank": 4,
        "batch-size": 32,
        "learning-rate": 0.03,
        "output-dir": str(output),
        "run-name": run_name,
        "timeout": 150.0,
    }


def write_digits(directory: Path) -> dict[str, dict[str, Value]]:
    """Deal the digits out to the clients, a file each, and return their node configs by name."""
    directory.mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    configs: dict[str, dict[str, Value]] = {}
    for index, name in enumerate(CLIENTS):
        images, labels = digits.images[index :: len(CLIENTS)], digits.target[index :: len(CLIENTS)]
        rows = [
            json.dumps({"image": (image / 16).tolist(), "label": int(label)})
            for image, label in zip(images, labels, strict=True)
        ]
        path = directory / f"{name}.jsonl"
        path.write_text("\n".join(rows) + "\n")
        configs[name] = {"client-id": name, "data-path": str(path)}
    return configs


def start(fleet: Fleet, node_configs: dict[str, dict[str, Value]]) -> None:
    """Start the SuperLink and, registered by their keys, the SuperNodes."""
    fleet.start_superlink()
    for name, node_config in node_configs.items():
        fleet.register(name)
        fleet.start_supernode(name, node_config)


def run(directory: Path, output: Path) -> dict[str, Any]:
    """Deploy, train and take everything down again; return the run's summary.

    Args:
        directory: for keys, data, logs and Flower's files.
        output: the run directory is made in it.

    Raises:
        FleetError: something did not start, or the run failed.
    """
    with Fleet(directory) as fleet, flower_app() as app:
        start(fleet, write_digits(directory / "data"))
        run_id = fleet.submit(app, settings(output.absolute()))
        fleet.stream(run_id)
        status = fleet.await_run(run_id, 600)
        if status != "finished:completed":
            raise FleetError(f"the run is {status}:\n{fleet.logs()}")
    return dict(json.loads((output / "latest" / "summary.json").read_text()))


def main() -> None:
    """Run the demo and say what came of it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    output = Path(sys.argv[1] if len(sys.argv) > 1 else "runs")
    try:
        with tempfile.TemporaryDirectory(prefix="fedloru-deploy-") as scratch:
            summary = run(Path(scratch), output)
    except FleetError as error:
        sys.exit(f"deploy-demo: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"accuracy over the clients' held-out samples: {summary['final_accuracy']:.3f}")
    print(f"run directory: {(output / 'latest').resolve()}")


if __name__ == "__main__":
    main()
