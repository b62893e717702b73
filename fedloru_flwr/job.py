"""One run from settings to run directory: everything the ServerApp does, whatever engine calls it."""

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.serverapp import Grid
from rich.console import Console
from torch import nn

from fedloru_flwr.clients.training import choose_device, evaluate
from fedloru_flwr.config import RunConfig
from fedloru_flwr.data import Samples
from fedloru_flwr.engines.in_process import InProcessGrid
from fedloru_flwr.models import NetworkFactory, plan_adapter, plan_full
from fedloru_flwr.registry import build_strategy
from fedloru_flwr.runs import RoundProgress, RunDirectory, closing_table
from fedloru_flwr.strategies import FederatedStrategy
from fedloru_flwr.strategies.federated import CommonOptions
from fedloru_flwr.workload import network_factory, server_data


def check(config: RunConfig) -> None:
    """Refuse, before any client starts, what could not run: data, model, targets, output directory.

    Raises:
        ValueError: `ConfigError`, `DataError`, `PlanError` or `OutputError`, each naming the setting.
    """
    _, spec = server_data(config)
    model = network_factory(config, spec)()
    if config.algorithm == "fedavg":
        plan_full(model)
    else:
        plan_adapter(model, config.rank, config.alpha, config.target_modules, config.dense_leaves)
    choose_device(config.device)
    if config.resume in ("", "auto"):
        if not _to_continue(config):
            RunDirectory.check(config.output_dir, config.run_name)
    else:
        RunDirectory.open(config.resume)


@dataclass(frozen=True)
class Job:
    """A run that is ready to start.

    Attributes:
        config: the settings.
        samples: the central held-out samples; None where only clients have data.
        factory: builds the network.
        directory: where it leaves its files.
    """

    config: RunConfig
    samples: Samples | None
    factory: NetworkFactory
    directory: RunDirectory

    @classmethod
    def prepare(cls, config: RunConfig) -> "Job":
        """Load the data, make the run directory and write the manifest."""
        check(config)
        samples, spec = server_data(config)
        factory = network_factory(config, spec)
        directory = _directory(config)
        job = cls(config, samples, factory, directory)
        directory.write_manifest(job._manifest())
        return job

    def _manifest(self) -> dict[str, Any]:
        packages = ("fedloru-flwr", "flwr", "torch", "peft", "numpy", "ray", "safetensors", "flwr-datasets")
        return {
            "config": self.config.as_mapping(),
            "seed": self.config.seed,
            "versions": {name: _version(name) for name in packages} | {"python": platform.python_version()},
            "machine": platform.machine(),
            "model": {"name": self.factory.name, "input_shape": list(self.factory.input_shape)},
        }

    def strategy(self, progress: RoundProgress | None) -> FederatedStrategy:
        """The strategy the settings describe."""
        config = self.config
        common: CommonOptions = {
            "num_clients": config.num_clients,
            "run_dir": self.directory.path,
            "resume": "auto",  # the directory is this run's own: new, or to be continued
            "checkpoint_every": config.checkpoint_every,
            "max_failure_fraction": config.max_failure_fraction,
            "observer": progress,
            "enrol": True,
            "fraction_train": config.fraction_train,
            "fraction_evaluate": config.fraction_evaluate,
            "min_train_nodes": 1,
            "min_evaluate_nodes": 1,
            "min_available_nodes": 1,
        }
        return build_strategy(config, self.factory, **common)

    def run(self, grid: Grid, console: Console | None = None) -> dict[str, Any]:
        """Train, show progress, and return the summary."""
        config = self.config
        console = console or Console()
        rows = self.directory.read_rounds()
        found = self.directory.latest_checkpoint()
        resumed_from = next((row for row in rows if found and row["round"] == found[0]), None)
        with RoundProgress(console, config.num_server_rounds, resumed_from=resumed_from) as progress:
            strategy = self.strategy(progress)
            _introduce(console, strategy, config, self.directory, found[0] if found else 0)
            if isinstance(grid, InProcessGrid):
                grid.on_reply = progress.client_done
            strategy.start(
                grid,
                strategy.initial_arrays(),
                num_rounds=config.num_server_rounds,
                timeout=config.timeout,
                evaluate_fn=strategy.central_evaluation(self._central) if self.samples is not None else None,
            )
        summary = self.directory.read_summary()
        assert summary is not None
        console.print(closing_table(summary))
        console.print(f"run directory: {self.directory.path}", soft_wrap=True, highlight=False)
        return summary

    def _central(self, _: int, model: nn.Module) -> dict[str, float]:
        assert self.samples is not None
        return evaluate(model, self.samples, choose_device(self.config.device))


def _introduce(
    console: Console, strategy: FederatedStrategy, config: RunConfig, directory: RunDirectory, done: int
) -> None:
    state, plan = strategy.state, strategy.plan
    trained = sum(tensor.numel() for tensor in state.trainables.values())
    total = sum(tensor.numel() for tensor in strategy.merged_state_dict().values())
    lines = [
        f"{config.algorithm}: {config.num_server_rounds} rounds, {config.num_clients} clients, "
        f"{config.fraction_train:g} of them a round, seed {config.seed}",
        f"{config.model} on {config.dataset}: {trained} of {total} parameters travel ({100 * trained / total:.1f} %)",
    ]
    if plan.layers:
        lines.append(f"rank {config.rank} factors for: {', '.join(layer.name for layer in plan.layers)}")
    lines += [f"  {note}" for note in plan.notes]
    if done:
        lines.append(f"continuing after round {done}")
    lines.append(f"run directory: {directory.path}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def _to_continue(config: RunConfig) -> bool:
    """Whether ``resume = "auto"`` has a run to continue."""
    if config.resume != "auto":
        return False
    path = Path(config.output_dir).expanduser() / (config.run_name or "latest")
    if not path.exists():
        return False
    summary = RunDirectory.open(path).read_summary()
    return bool(config.run_name) or summary is None or summary["status"] != "finished"


def directory_path(config: RunConfig) -> Path:
    """Where the run's directory is or will be; with neither a name nor a run to continue, the output directory."""
    if config.resume not in ("", "auto"):
        return RunDirectory.open(config.resume).path
    path = Path(config.output_dir).expanduser() / (config.run_name or "latest")
    return RunDirectory.open(path).path if _to_continue(config) else path


def _directory(config: RunConfig) -> RunDirectory:
    if config.resume not in ("", "auto") or _to_continue(config):
        return RunDirectory.open(directory_path(config))
    return RunDirectory.create(config.output_dir, config.run_name)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
