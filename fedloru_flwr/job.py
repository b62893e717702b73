"""One run from settings to run directory: everything the ServerApp does, whatever engine calls it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack, get_args

import torch
from flwr.serverapp import Grid
from rich.console import Console
from torch import nn

from fedloru_flwr.clients.language import LanguageWork
from fedloru_flwr.clients.training import choose_device
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.data import Samples, notes, partition_indices
from fedloru_flwr.engines.in_process import VirtualGrid
from fedloru_flwr.environment import SUPERNODES
from fedloru_flwr.models.quantised import Quantised, check_installed
from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.runs import OutputError, RoundProgress, RunDirectory, closing_table, make_trackers
from fedloru_flwr.strategies import FederatedStrategy
from fedloru_flwr.strategies.federated import CommonOptions, ModelSource
from fedloru_flwr.strategies.inner import server_optimizer
from fedloru_flwr.workload import (
    check_init_adapter,
    data_config,
    local_work,
    network_factory,
    server_data,
    settings_for_model,
)

AfterRound = Callable[[FederatedStrategy], None]


def check(config: RunConfig) -> None:
    """Refuse, before any client starts, what could not run: data, model, targets, output directory.

    Raises:
        ValueError: `ConfigError`, `DataError`, `PlanError`, `TrackerError` or `OutputError`, each naming the setting.
    """
    if config.base_precision in get_args(Quantised) and config.dataset != "clients":
        check_installed(config.base_precision)
    _, spec = server_data(config)
    check_init_adapter(config)
    build_strategy(config, network_factory(config, spec))  # it refuses what the method cannot do
    choose_device(config.device)
    make_trackers(config.trackers, config.track_project)
    continued = run_to_continue(config)
    if continued is None:
        RunDirectory.check(config.output_dir, config.run_name)
    elif changed := config.changed_from(recorded_settings(continued)):
        told = "; ".join(f"{key} was {was!r}, is {now!r}" for key, (was, now) in changed.items())
        raise ConfigError(
            f"resume: settings that change the result differ from those {continued.path} began with: {told}"
        )


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
    factory: Callable[[], nn.Module]
    directory: RunDirectory

    @classmethod
    def prepare(cls, config: RunConfig) -> "Job":
        """Load the data, make the run directory and write the manifest."""
        check(config)
        samples, spec = server_data(config)
        factory = network_factory(config, spec)
        directory = run_to_continue(config) or RunDirectory.create(config.output_dir, config.run_name)
        supernodes = os.environ.get(SUPERNODES)  # that the run may be continued in the same form
        directory.update_manifest(
            {"config": config.as_mapping(), **({"supernodes": int(supernodes)} if supernodes else {})}
        )
        return cls(config, samples, factory, directory)

    def strategy(self, progress: RoundProgress | None) -> FederatedStrategy:
        """The strategy the settings describe."""
        common = run_options(self.config)
        common |= {"run_dir": self.directory.path, "observer": progress}
        common["trackers"] = make_trackers(self.config.trackers, self.config.track_project)
        common["resume"] = "auto"  # the directory is this run's own: new, or to be continued
        return build_strategy(self.config, self.factory, **common)

    def run(self, grid: Grid, console: Console | None = None, after_round: AfterRound | None = None) -> dict[str, Any]:
        """Train, show progress, and return the summary.

        Args:
            grid: to talk to the clients through.
            console: for people; default standard output.
            after_round: called before round 1 and after every round, before the round's checkpoint is written, with
                the strategy, whose state is the round's. Methods without a global model do not call it.
        """
        config = self.config
        console = console or Console()
        rows = self.directory.read_rounds()
        found = self.directory.latest_checkpoint()
        resumed_from = next((row for row in rows if found and row["round"] == found[0]), None)
        with RoundProgress(console, config.num_server_rounds, resumed_from=resumed_from) as progress:
            strategy = self.strategy(progress)

            def evaluate_round(server_round: int, model: nn.Module) -> dict[str, float]:
                if after_round is not None:
                    after_round(strategy)
                return self._central(server_round, model)

            _introduce(console, strategy, config, self.directory, found[0] if found else 0)
            if isinstance(grid, VirtualGrid):
                grid.on_reply = progress.client_done
                grid.at_once = min(grid.at_once, self._clients_that_fit())
            strategy.start(
                grid,
                strategy.initial_arrays(),
                num_rounds=config.num_server_rounds,
                timeout=config.timeout,
                evaluate_fn=strategy.central_evaluation(evaluate_round) if self.samples is not None else None,
            )
        summary = self.directory.read_summary()
        assert summary is not None
        console.print(closing_table(summary))
        console.print(f"run directory: {self.directory.path}", soft_wrap=True, highlight=False)
        return summary

    def _clients_that_fit(self) -> int:
        """How many clients are trained at once: a larger share would only keep other processes from training them."""
        from fedloru_flwr.clients.cohort import clients_that_fit  # which a deployment does without

        if self.samples is None:
            return self.config.clients_per_batch
        if self.config.pretrained:
            return 1
        largest = max(len(part) for part in partition_indices(data_config(self.config)))
        inputs = self.samples.inputs[:1].expand(min(self.config.batch_size, largest), *self.samples.inputs.shape[1:])
        return clients_that_fit(self.factory(), inputs, choose_device(self.config.device))

    def _central(self, server_round: int, model: nn.Module) -> dict[str, float]:
        assert self.samples is not None
        config, work, device = self.config, local_work(self.config), choose_device(self.config.device)
        found = work.evaluate(model, self.samples, device)
        if isinstance(work, LanguageWork) and server_round in (0, config.num_server_rounds):
            self._write_answers(server_round, work, model, device)
        return found

    def _write_answers(self, server_round: int, work: LanguageWork, model: nn.Module, device: torch.device) -> None:
        """Have the model answer held-out prompts before and after training, for people."""
        config = self.config
        if work.task != "causal-lm" or not config.generated_samples:
            return
        assert self.samples is not None
        rows = work.answers(model, self.samples, config.generated_samples, config.max_new_tokens, device)
        self.directory.write_answers(server_round, rows)


def run_options(config: RunConfig) -> CommonOptions:
    """How the settings have a strategy run, but for where it leaves its files."""
    return {
        "checkpoint_every": config.checkpoint_every,
        "max_failure_fraction": config.max_failure_fraction,
        "max_norm_ratio": config.max_norm_ratio,
        "max_total_bytes": config.max_total_bytes,
        "target_accuracy": config.target_accuracy,
        "enrol": True,
        "fraction_train": config.fraction_train,
        "fraction_evaluate": config.fraction_evaluate,
        "evaluate_every": config.evaluate_every,
        "evaluate_all_at_end": True,
        "min_train_nodes": 1,
        "min_evaluate_nodes": 1,
        "min_available_nodes": 1,
    }


def build_strategy(config: RunConfig, model: ModelSource, **common: Unpack[CommonOptions]) -> FederatedStrategy:
    """The strategy with what the settings combine it with.

    Args:
        config: the settings.
        model: builds the network, or is one.
        common: see `FederatedStrategy`.

    Raises:
        ValueError: where they make no sense together, with the reason.
    """
    inner = server_optimizer(
        config.server_optimizer,
        config.server_learning_rate,
        config.server_momentum,
        config.server_second_momentum,
        config.server_adaptivity,
    )
    config = settings_for_model(config)
    common["inner"] = inner
    common["num_clients"] = config.num_clients
    common["proximal_mu"] = config.proximal_mu
    common["scaffold"] = config.scaffold
    common["measure_aggregation"] = config.aggregation_error
    common["uplink_codec"] = config.uplink_codec
    common["downlink_codec"] = config.downlink_codec
    common["error_feedback"] = None if config.error_feedback == "auto" else config.error_feedback == "on"
    return ALGORITHMS[config.algorithm].build(config, model, **common)


def _introduce(
    console: Console, strategy: FederatedStrategy, config: RunConfig, directory: RunDirectory, done: int
) -> None:
    plan = strategy.plan
    trained = strategy.parameters_sent()
    total = sum(tensor.numel() for tensor in strategy.merged_state_dict().values())
    lines = [
        f"{config.algorithm}: {config.num_server_rounds} rounds, {config.num_clients} clients, "
        f"{config.fraction_train:g} of them a round, seed {config.seed}",
        f"{config.model} on {config.dataset}: {trained} of {total} parameters travel ({100 * trained / total:.1f} %)",
    ]
    if plan.layers:
        lines.append(f"rank {config.rank} factors for: {', '.join(layer.name for layer in plan.layers)}")
    if not config.pretrained:  # a pretrained model leaves what is not named as it is
        lines += [f"  {note}" for note in plan.notes]
    elif config.dataset != "clients":
        lines += [f"  {note}" for note in notes(data_config(config))]
    if done:
        lines.append(f"continuing after round {done}")
    lines.append(f"run directory: {directory.path}")
    for line in lines:
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def run_to_continue(config: RunConfig) -> RunDirectory | None:
    """The run that ``resume`` asks to continue; with ``"auto"``, None where there is none yet.

    ``"auto"`` means the run of the given name, or without a name the newest one unless it has finished.

    Raises:
        OutputError: if ``resume`` names no run.
    """
    if config.resume not in ("", "auto"):
        return RunDirectory.open(config.resume)
    path = Path(config.output_dir).expanduser() / (config.run_name or "latest")
    if not config.resume or not path.exists():
        return None
    directory = RunDirectory.open(path)
    summary = directory.read_summary()
    return directory if config.run_name or summary is None or summary["status"] != "finished" else None


def recorded_settings(directory: RunDirectory) -> dict[str, Any]:
    """The settings a run began with; empty if it ended before it wrote them down."""
    return dict(_recorded(directory).get("config", {}))


def recorded_supernodes(directory: RunDirectory) -> int | None:
    """How many SuperNodes a run on Flower's simulation began with, where that is known."""
    found = _recorded(directory).get("supernodes")
    return found if isinstance(found, int) else None


def _recorded(directory: RunDirectory) -> dict[str, Any]:
    try:
        return directory.read_manifest()
    except OutputError:
        return {}
