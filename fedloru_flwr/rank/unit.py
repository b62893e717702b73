"""One training of an analysis: run it, keep the server's state at chosen rounds, and measure the states kept.

::

    <directory>/
      run/  snapshots/round-000010.safetensors  measures.jsonl

A line of measures.jsonl is one measurement: of a sample or a client, at one round, in one space. Whatever is there is
kept, so that an interrupted unit goes on where it was.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import Tensor, nn

from fedloru_flwr import atomic
from fedloru_flwr.clients.cohort import obstacle, train_cohort
from fedloru_flwr.clients.task import LocalTask, Phase
from fedloru_flwr.clients.training import choose_device
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.data import ClientData, Samples, load_client
from fedloru_flwr.engines.in_process import run_in_process
from fedloru_flwr.export import Trained
from fedloru_flwr.job import Job, build_strategy
from fedloru_flwr.lowrank import FactorisedLayer, Ledger, as_pair, choose, derive_seed
from fedloru_flwr.lowrank.factors import has_product, product
from fedloru_flwr.models import AdapterPlan, plan_adapter
from fedloru_flwr.models.functional import FunctionalModel
from fedloru_flwr.rank.advice import Evidence, evidence_of
from fedloru_flwr.rank.learned import LEDGER, ledger_rows
from fedloru_flwr.rank.operators import LossHessian, adapter_hessian, module_hessian
from fedloru_flwr.rank.products import matrix_rank
from fedloru_flwr.rank.similarity import Similarity, pair_similarities, similarities
from fedloru_flwr.rank.spec import Measure, Space
from fedloru_flwr.rank.spectra import stable_ranks
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FederatedStrategy
from fedloru_flwr.strategies.state import ServerState, merged_state_dict
from fedloru_flwr.workload import data_config, local_optimisation, network_factory, server_data

Row = dict[str, Any]
_ROUNDS_COMPARED = 4  # of a pilot
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)
_TELLING = "plain"  # the clients' method whose training can be carried out apart from a run


class UnitFiles:
    """The files of one unit.

    Args:
        directory: made when first written to.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "run"

    def snapshot(self, server_round: int) -> Path:
        """The server's state after a round."""
        return self.directory / "snapshots" / f"round-{server_round:06d}.safetensors"

    def measures(self) -> dict[tuple[str, str], list[Row]]:
        """What has been measured, by part (a round's number, or ``ledger``) and step."""
        lines = atomic.read_lines(self.directory / "measures.jsonl")
        return {(line["part"], line["step"]): line["rows"] for line in lines}

    def add(self, part: str, step: str, rows: Sequence[Row]) -> None:
        """Write down one measurement."""
        atomic.append_line(self.directory / "measures.jsonl", {"part": part, "step": step, "rows": rows})

    def progress(self) -> int:
        """Rounds trained and measurements made so far."""
        total = 0
        for path in (self.run / "metrics.jsonl", self.directory / "measures.jsonl"):
            if path.exists():
                total += path.read_bytes().count(b"\n")
        return max(total - 1, 0)


def carry_out(
    settings: Mapping[str, Any], clients: Mapping[str, Any], measure: Measure, directory: Path
) -> dict[tuple[str, str], list[Row]]:
    """Train and measure, or go on with that.

    Args:
        settings: of the training.
        clients: settings that say who the clients are.
        measure: what is measured; without sizes of samples, models are kept and nothing is measured.
        directory: the unit's.

    Returns:
        See `UnitFiles.measures`.

    Raises:
        ConfigError: there are fewer samples than are asked for.
    """
    files = UnitFiles(directory)
    done = files.measures()
    if measure.points and len(done) == measure.steps:
        return done
    config = RunConfig.from_mapping(settings)
    people = _people(RunConfig.from_mapping(clients), measure) if measure.points else None
    train(config, files, measure.rounds)
    if people is None:
        return {}
    torch.set_num_threads(measure.threads)
    subject = Subject.of(config)
    for server_round in measure.rounds:
        part = str(server_round)
        for step, rows in _Round(subject, files.snapshot(server_round), people, measure).steps():
            if (part, step) not in done:
                files.add(part, step, list(rows()))
    if (LEDGER, LEDGER) not in done:
        files.add(LEDGER, LEDGER, ledger_rows(Trained.of_run(files.run)))
    return files.measures()


def train(config: RunConfig, files: UnitFiles, rounds: Sequence[int]) -> None:
    """Run the training up to its end, and keep the server's state after these rounds."""
    from fedloru_flwr.client_app import app as client_app
    from fedloru_flwr.client_app import train_or_evaluate_together

    summary = RunDirectory.open(files.run).read_summary() if (files.run / "manifest.json").is_file() else None
    there = all(files.snapshot(server_round).exists() for server_round in rounds)
    if there and summary is not None and summary["status"] == "finished":
        return
    if not (files.run / "manifest.json").is_file():
        shutil.rmtree(files.run, ignore_errors=True)  # killed before it became a run
    settings = {
        **config.as_mapping(),
        "output-dir": str(files.directory),
        "run-name": files.run.name,
        "resume": "auto",
    }
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        torch.set_num_threads(config.threads)
        job = Job.prepare(RunConfig.from_mapping(context.run_config))
        job.run(grid, after_round=lambda strategy: _keep(strategy, files, rounds))

    store = files.run / "store"
    run_in_process(
        server_app,
        client_app,
        num_supernodes=config.num_clients,
        run_config=settings,
        store_dir=store,
        together=train_or_evaluate_together,
        at_once=config.clients_per_batch,
    )
    shutil.rmtree(store, ignore_errors=True)


def _keep(strategy: FederatedStrategy, files: UnitFiles, rounds: Sequence[int]) -> None:
    state = strategy.state
    if state.server_round not in rounds:
        return
    tensors = {f"trainables/{name}": tensor for name, tensor in state.trainables.items()}
    tensors |= {f"statistics/{name}": tensor for name, tensor in state.statistics.items()}
    tensors |= {f"base/{name}": tensor for name, tensor in state.base.items()}
    path = files.snapshot(state.server_round)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_tensors(path, tensors, {"round": str(state.server_round), "draw": str(state.draw)})


def read_snapshot(path: Path) -> ServerState:
    """A state that `train` kept, without its ledger."""
    tensors, metadata = atomic.read_tensors(path)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    return ServerState(
        int(metadata["round"]),
        part("trainables/"),
        part("statistics/"),
        part("base/"),
        Ledger(""),
        int(metadata["draw"]),
    )


@dataclass(frozen=True)
class Subject:
    """What the models of a run are.

    Attributes:
        config: the run's settings.
        factory: builds the plain network.
        strategy: the run's, in its first state.
    """

    config: RunConfig
    factory: Callable[[], nn.Module]
    strategy: FederatedStrategy

    @classmethod
    def of(cls, config: RunConfig) -> "Subject":
        """Of a run with these settings.

        Raises:
            ConfigError: it trains a model of the transformers library.
        """
        if config.pretrained:
            raise ConfigError(
                f"model = {config.model!r}: curvature and similarity are measured of built-in networks alone"
            )
        _, spec = server_data(config)
        factory = network_factory(config, spec)
        return cls(config, factory, build_strategy(config, factory))

    @property
    def plan(self) -> AdapterPlan:
        """The run's."""
        return self.strategy.plan

    def model(self, state: ServerState) -> nn.Module:
        """The merged model."""
        model = self.factory()
        model.load_state_dict(merged_state_dict(state, model, self.plan, self.config.seed))
        return model

    def values(self, state: ServerState) -> dict[str, Tensor] | None:
        """What a client's model holds beside its base, as it begins to train; None where that is not factors alone."""
        values = self.plan.whole(state.trainables, self.config.seed, state.draw)
        function = self._function()
        return values if {*function.keys} <= {*values} else None

    def base(self, state: ServerState) -> dict[str, Tensor]:
        """Everything else."""
        return {**state.base, **state.statistics}

    def restarted(self, state: ServerState) -> bool:
        """Whether the factors are fresh, of product zero: at the start, and right after an accumulation with reset."""
        adapter = self.plan.whole(state.trainables, self.config.seed, state.draw)
        layers = [layer for layer in self.plan.adapted if has_product(layer, adapter)]
        return bool(layers) and not any(bool(product(layer, adapter).any()) for layer in layers)

    def _function(self) -> FunctionalModel:
        return FunctionalModel(self.factory(), self.plan.adapted, self.plan.layout(), self.plan.dense_leaves)

    def locally_trained(self, state: ServerState, people: Mapping[str, Samples]) -> dict[str, dict[str, Tensor]] | None:
        """What clients make of this state in the next round, by client; None where a method's clients do more.

        Those with state of their own, control variates, ranks that differ, or layers that cannot be trained as one
        batch are such methods and models.
        """
        config, strategy = self.config, self.strategy
        plain = strategy.settings.method == _TELLING and strategy.ranks.uniform and not config.scaffold
        values = self.values(state)
        module = self.factory()
        if not plain or values is None or obstacle(module, next(iter(people.values())).inputs[:2]) is not None:
            return None
        how = local_optimisation(config, min(state.server_round + 1, config.num_server_rounds))
        function = self._function()
        phases = (Phase(self.plan.trainable_keys, how.epochs),)
        tasks = [
            LocalTask(
                values={key: values[key] for key in function.keys},
                phases=phases,
                samples=samples,
                seed=derive_seed(config.seed, "rank updates", state.server_round, client),
                proximal_mu=config.proximal_mu,
            )
            for client, samples in people.items()
        ]
        results = train_cohort(function, self.base(state), tasks, how, choose_device(config.device))
        return {client: result.values for client, result in zip(people, results, strict=True)}

    def changes(self, state: ServerState, trained: Mapping[str, Mapping[str, Tensor]]) -> "Changes":
        """What clients changed of the weights' matrices."""
        start = self.values(state)
        assert start is not None
        if not self.plan.adapted:
            names = [name for name, value in start.items() if value.dim() >= 2]
            return Changes(
                [{name: values[name].double() - start[name].double() for name in names} for values in trained.values()]
            )
        clients = []
        for values in trained.values():
            pairs = {}
            for layer in self.plan.adapted:
                (before_a, before_b), (a, b) = (as_pair(layer, one) for one in (start, values))
                pairs[layer.weight_key] = torch.cat([b, -before_b], dim=1), torch.cat([a, before_a])
            clients.append(pairs)
        return Changes(pairs=clients)


@dataclass(frozen=True)
class Changes:
    """Clients' updates, as matrices or as pairs ``B``, ``A``."""

    matrices: Sequence[Mapping[str, Tensor]] = ()
    pairs: Sequence[Mapping[str, tuple[Tensor, Tensor]]] = ()

    def compared(self, ranks: Sequence[int]) -> dict[tuple[str, int], Similarity]:
        """How alike they are; see `similarities` and `pair_similarities`."""
        return pair_similarities(self.pairs) if self.pairs else similarities(self.matrices, ranks)


@dataclass(frozen=True)
class _People:
    """Whom and what is measured on: samples by size and number, and clients by name."""

    samples: Mapping[tuple[int, int], Samples]
    clients: Mapping[str, Samples]


def _people(config: RunConfig, measure: Measure) -> _People:
    """Draw the samples and the clients, the same at every round."""
    data = data_config(config)
    everyone = [load_client(data, number)[0] for number in range(config.num_clients)]
    pool = _joined(everyone)
    most = measure.points[-1]
    if most > len(pool):
        raise ConfigError(
            f"points = {list(measure.points)}: the clients have {len(pool)} training samples in all; ask for fewer"
        )
    order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(derive_seed(config.seed, "rank samples")))
    found = {
        (points, draw): pool.subset(order[draw * points : (draw + 1) * points]) for points, draw in measure.samples
    }
    chosen = choose(
        config.seed, "rank clients", items=[str(number) for number in range(config.num_clients)], count=measure.clients
    )
    clients = {client: everyone[int(client)].train for client in sorted(chosen, key=int)}
    return _People(found, clients)


def _joined(everyone: Sequence[ClientData]) -> Samples:
    return Samples(torch.cat([one.train.inputs for one in everyone]), torch.cat([one.train.labels for one in everyone]))


@dataclass(frozen=True)
class _Round:
    """What is measured of a round that was kept; it is read when the first step needs it."""

    subject: Subject
    path: Path
    people: _People
    measure: Measure

    def steps(self) -> Iterator[tuple[str, Callable[[], Iterable[Row]]]]:
        """Every measurement: a name, the same each time, and a function that gives its rows."""
        people, measure = self.people, self.measure
        for (points, number), samples in people.samples.items():
            what = {"of": "sample", "points": points, "number": number}
            for space in measure.spaces:
                yield f"sample {points} {number} {space}", partial(self._hessian, samples, what, space)
        for client, samples in people.clients.items():
            what = {"of": "client", "points": len(samples), "number": int(client)}
            for space in measure.spaces:
                yield f"client {client} {space}", partial(self._hessian, samples, what, space)
        if people.clients:
            yield "gradients", self._gradients
            yield "updates", self._updates
        yield "weights", self._weights

    @cached_property
    def _state(self) -> ServerState:
        return read_snapshot(self.path)

    @cached_property
    def _model(self) -> nn.Module:
        return self.subject.model(self._state)

    @cached_property
    def _device(self) -> torch.device:
        return choose_device(self.subject.config.device)

    def _row(self, kind: str, **values: Any) -> Row:
        return {"kind": kind, "after_restart": self._restarted, **values}

    @cached_property
    def _restarted(self) -> bool:
        return self.subject.restarted(self._state)

    def _hessian(self, samples: Samples, what: Mapping[str, Any], space: Space) -> Iterator[Row]:
        hessian = self._of_module(samples) if space == "full" else self._of_adapter(samples)
        if hessian is None:
            return
        found = stable_ranks(
            hessian,
            layers=self.measure.layers and what["of"] == "sample",
            tolerance=self.measure.tolerance,
            seed=derive_seed(self.subject.config.seed, "rank", self._state.server_round, *what.values()),
        )
        for layer, spectrum in found.items():
            yield self._row("hessian", **what, space=space, layer=layer, **asdict(spectrum))

    def _of_module(self, samples: Samples) -> LossHessian:
        inputs, labels, most = samples.inputs, samples.labels, self.measure.max_bytes
        return module_hessian(self._model, inputs, labels, device=self._device, max_bytes=most)

    def _of_adapter(self, samples: Samples) -> LossHessian | None:
        subject, values = self.subject, self.subject.values(self._state)
        if not subject.plan.adapted or values is None:
            return None
        return adapter_hessian(
            subject.factory(),
            subject.plan,
            values,
            subject.base(self._state),
            samples.inputs,
            samples.labels,
            device=self._device,
            max_bytes=self.measure.max_bytes,
        )

    def _gradients(self) -> Iterator[Row]:
        gradients = [
            {key: value.cpu() for key, value in self._of_module(samples).gradient().items()}
            for samples in self.people.clients.values()
        ]
        yield from self._similarity("gradients", similarities(gradients, self.measure.ranks))

    def _updates(self) -> Iterator[Row]:
        trained = self.subject.locally_trained(self._state, self.people.clients)
        if trained is not None:
            changes = self.subject.changes(self._state, trained)
            yield from self._similarity("updates", changes.compared(self.measure.ranks))

    def _similarity(self, what: str, found: Mapping[tuple[str, int], Similarity]) -> Iterator[Row]:
        for (layer, rank), one in found.items():
            yield self._row("similarity", of=what, layer=layer, rank=rank, **asdict(one))

    def _weights(self) -> Iterator[Row]:
        start = self.subject.factory().state_dict()
        for name, value in self._model.named_parameters():
            if value.dim() >= 2:
                found = matrix_rank(value.detach().double() - start[name].double())
                yield self._row("weights", layer=name, **_without_values(asdict(found)))


def _without_values(row: Row) -> Row:
    return {key: value for key, value in row.items() if key != "singular_values"}


def pilot_evidence(
    config: RunConfig,
    files: UnitFiles,
    rounds: Sequence[int],
    most_clients: int,
    on_step: Callable[[str], None] = lambda _: None,
) -> list[Evidence]:
    """What a full-rank training whose every round was kept says of each layer that could be factorised.

    Args:
        config: of the training.
        files: the unit's.
        rounds: from 0 on, without a gap.
        most_clients: whose updates to compare, at four rounds.
        on_step: told what comes next, for progress.
    """
    subject = Subject.of(config)
    states = [read_snapshot(files.snapshot(server_round)) for server_round in rounds]
    names = [str(number) for number in range(config.num_clients)]
    chosen = choose(config.seed, "rank clients", items=names, count=min(most_clients, len(names)))
    data = data_config(config)
    people = {client: load_client(data, int(client))[0].train for client in sorted(chosen, key=int)}
    halves: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for state in states[:-1][:: max(1, (len(states) - 1) // _ROUNDS_COMPARED)] if len(people) > 1 else []:
        on_step(f"what {len(people)} clients change after round {state.server_round}")
        trained = subject.locally_trained(state, people)
        if trained is None:
            break
        changes = subject.changes(state, trained).matrices
        for name in changes[0]:
            updates = torch.stack([change[name] for change in changes])
            halves.setdefault(name, []).append((updates[::2].mean(dim=0), updates[1::2].mean(dim=0)))
    found = []
    for layer in possible_layers(subject.factory()):
        on_step(f"layer {layer.name}")
        weights = [layer.as_matrix(state.trainables[layer.weight_key]) for state in states]
        pairs = [(layer.as_matrix(one), layer.as_matrix(other)) for one, other in halves.get(layer.weight_key, [])]
        found.append(evidence_of(layer.name, weights, pairs))
    return found


def possible_layers(module: nn.Module) -> tuple[FactorisedLayer, ...]:
    """Every layer of a plain network that could be factorised, the output layer included."""
    kinds = [kind.__name__ for kind in _KINDS if any(isinstance(part, kind) for part in module.modules())]
    return plan_adapter(module, 1, 1.0, kinds).layers
