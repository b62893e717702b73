"""`fedloru plan` as a Python function: settings in, what a run of them will cost out."""

import dataclasses
import importlib.metadata
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fedloru_flwr.config import ConfigError, RunConfig, name_to_key, read_config_file
from fedloru_flwr.job import build_strategy, run_options
from fedloru_flwr.lowrank import LEAST_APART, FactorisedLayer
from fedloru_flwr.models.layout import shapes, shared_keys
from fedloru_flwr.plan.memory import ClientMemory, ServerMemory, client_memory, server_memory
from fedloru_flwr.plan.rehearsal import CatchUp, PlannedRound, Rehearsal
from fedloru_flwr.plan.subject import Subject, subject_of
from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.strategies import FederatedStrategy

_AWAY = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
_ALWAYS = (
    "every client answers every message, and none has lost what it held or has other initial weights",
    "every factorised layer gets a gradient, and training changes every tensor that gets one",
)


@dataclass(frozen=True)
class Bandwidth:
    """A client's connection, and the server's.

    Attributes:
        down: to a client, in Mbit/s (1 Mbit = 10^6 bits).
        up: from a client, in Mbit/s.
        server: of the server, in each direction, in Mbit/s; 0: it is never what one waits for.
    """

    down: float
    up: float
    server: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Bandwidth":
        """Read ``"100/20"``, or ``"100/20/1000"`` with the server's.

        Raises:
            ConfigError: if it is no such text.
        """
        try:
            numbers = [float(part) for part in text.split("/")]
        except ValueError:
            numbers = []
        if len(numbers) not in (2, 3) or not all(0 < number < float("inf") for number in numbers):
            raise ConfigError(
                f"bandwidth = {text!r}: expected a client's DOWN/UP in Mbit/s, such as 100/20, or DOWN/UP/SERVER, such "
                "as 100/20/1000"
            )
        return cls(*numbers)

    def __str__(self) -> str:
        return f"{self.down:g}/{self.up:g}" + (f"/{self.server:g}" if self.server else "")

    def seconds(self, planned: PlannedRound) -> float:
        """How long a round's messages take: all clients at once, then waiting for the slowest.

        ``max(max_k (8 d_k / down + 8 u_k / up), 8 sum_k d_k / server + 8 sum_k u_k / server)`` in seconds, with
        ``d_k`` and ``u_k`` the bytes of client ``k``; messages' latency and the clients' training are not in it.
        """
        slowest = max((8e-6 * (d / self.down + u / self.up) for d, u in planned.of_clients), default=0.0)
        shared = 8e-6 * (planned.bytes_down + planned.bytes_up) / self.server if self.server else 0.0
        return max(slowest, shared)


@dataclass(frozen=True)
class PlannedLayer:
    """What is trained of one layer, or of one parameter that is trained as it is.

    Attributes:
        name: the layer's, or the parameter's.
        kind: ``linear``, ``conv1d``, ``conv2d``, ``embedding`` or ``dense``.
        shape: of the weight.
        rank: of its factors; 0 for ``dense``.
        trainable: numbers a client of full rank trains.
        parameters: numbers the plain layer has (its weight, without its bias).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    trainable: int
    parameters: int


@dataclass(frozen=True)
class Transfer:
    """How long messages take at one bandwidth, in seconds; see `Bandwidth.seconds`.

    Attributes:
        bandwidth: the connections.
        longest_round: the round that takes longest.
        run: all rounds, one after the other.
    """

    bandwidth: Bandwidth
    longest_round: float
    run: float


@dataclass(frozen=True)
class MethodPlan:
    """One method's costs.

    Attributes:
        algorithm: its name.
        layers: what is trained.
        trainable_parameters: numbers a client of full rank sends in a round, as ``summary.json`` counts them.
        rounds: the bytes of every round, as ``metrics.jsonl`` will have them.
        catch_up: what clients are sent that have been away, in the last round.
        client: memory of a client of the highest rank.
        server: memory of the server.
        transfers: times at the given bandwidths.
        stopped: whether ``max-total-bytes`` ends the run.
        left_out: settings of the file that this method does not have.
    """

    algorithm: str
    layers: tuple[PlannedLayer, ...]
    trainable_parameters: int
    rounds: tuple[PlannedRound, ...]
    catch_up: tuple[CatchUp, ...]
    client: ClientMemory
    server: ServerMemory
    transfers: tuple[Transfer, ...]
    stopped: bool
    left_out: tuple[str, ...] = ()

    @property
    def bytes_up(self) -> int:
        """From all clients, in the whole run."""
        return sum(one.bytes_up for one in self.rounds)

    @property
    def bytes_down(self) -> int:
        """To all clients, in the whole run."""
        return sum(one.bytes_down for one in self.rounds)

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {
            "algorithm": self.algorithm,
            "trainable_parameters": self.trainable_parameters,
            "total_bytes_up": self.bytes_up,
            "total_bytes_down": self.bytes_down,
            "stopped": self.stopped,
            "left_out": list(self.left_out),
            "rounds": [_round_as_json(one) for one in self.rounds],
            "layers": [asdict(layer) for layer in self.layers],
            "catch_up": [asdict(one) for one in self.catch_up],
            "client_memory": _memory_as_json(self.client),
            "server_memory": _memory_as_json(self.server),
            "transfers": [
                {"bandwidth": str(t.bandwidth), "longest_round_seconds": t.longest_round, "run_seconds": t.run}
                for t in self.transfers
            ],
        }


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        config: the settings.
        subject: the model's and the data's name.
        model_parameters: of the plain model.
        model_bytes: its weights and buffers in the number formats it is built in.
        methods: the settings' own method first.
        refused: methods that cannot do what the settings ask for, each with the reason.
        assumptions: what the figures take for granted, for people.
    """

    config: RunConfig
    subject: str
    model_parameters: int
    model_bytes: int
    methods: tuple[MethodPlan, ...]
    refused: Mapping[str, str]
    assumptions: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """What JSON can hold: bytes, numbers of parameters, seconds."""
        return {
            "subject": self.subject,
            "config": self.config.as_mapping(),
            "model_parameters": self.model_parameters,
            "model_bytes": self.model_bytes,
            "methods": [method.as_json() for method in self.methods],
            "refused": dict(self.refused),
            "assumptions": list(self.assumptions),
        }


def plan(
    conf: str | os.PathLike[str] | None = None,
    config: Mapping[str, object] | None = None,
    *,
    all_methods: bool = False,
    bandwidths: Sequence[Bandwidth] = (Bandwidth(100, 20),),
    transformers: str | os.PathLike[str] | None = None,
    sequence_length: int = 512,
    examples: int = 0,
) -> Plan:
    """Tell what a run will cost, before anything is trained and without any weights.

    Args:
        conf: a CONF.toml with settings; absent ones take their defaults.
        config: settings that go over the file's.
        all_methods: plan every method with these settings, not the settings' own alone. What a method does not have,
            such as an accumulation period, is left out for it.
        bandwidths: to tell transfer times for.
        transformers: a model of the transformers library instead of the settings' network, see `subject_of`.
        sequence_length: tokens a sample, for such a model.
        examples: samples a client trains on, where its data is not at hand; 0: 100.

    Returns:
        Bytes, memory and times. The bytes of every round are those that the run of these settings will write to
        ``metrics.jsonl``, under the assumptions that the plan names.

    Raises:
        ValueError: a setting makes no sense, or the method cannot do what is asked.
    """
    settings: dict[str, object] = dict(read_config_file(Path(conf))) if conf is not None else {}
    checked = RunConfig.from_mapping({**settings, **dict(config or {})})
    path = None if transformers is None else os.fspath(transformers)
    subject = subject_of(checked, path, sequence_length, examples)
    activations: dict[object, int | str] = {}
    methods = [_method_plan(checked, subject, bandwidths, activations, ())]
    refused: dict[str, str] = {}
    for algorithm in ALGORITHMS if all_methods else ():
        if algorithm == checked.algorithm:
            continue
        other, left_out = _for_method(checked, algorithm)
        try:
            methods.append(_method_plan(RunConfig.from_mapping(other), subject, bandwidths, activations, left_out))
        except ValueError as error:
            refused[algorithm] = str(error)
    model = subject.model
    return Plan(
        config=checked,
        subject=subject.name,
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        model_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        methods=tuple(methods),
        refused=refused,
        assumptions=(*_ALWAYS, *_of_settings(checked), *subject.assumptions, *_unknown(activations)),
    )


def _of_settings(config: RunConfig) -> Iterator[str]:
    """What depends on how training goes."""
    if config.accumulate_when:
        yield (
            f"accumulate-when = {config.accumulate_when!r} finds a plateau every {LEAST_APART} rounds, as often as it "
            "can: the run may accumulate less often, and then sends fewer entries"
        )
    if config.target_accuracy:
        yield f"target-accuracy = {config.target_accuracy:g} is not reached: the round that reaches it ends the run"


def _for_method(config: RunConfig, algorithm: str) -> tuple[dict[str, object], tuple[str, ...]]:
    """The settings with another method, without what it does not have; and the names of that."""
    row = ALGORITHMS[algorithm]
    without = set(row.foreign)
    strategy: Any = row.strategy
    if row.factorised and strategy.accumulation.refused:
        without |= {"accumulate_every", "accumulate_at", "accumulate_when", "reinit", "accumulate_into"}
    if row.factorised and (strategy.fixed_form or strategy.form == "hadamard"):
        without.add("adapter")
    mapping: dict[str, object] = dict(config.as_mapping())
    left_out = []
    for setting in dataclasses.fields(RunConfig):
        key = name_to_key(setting.name)
        if setting.name in without and mapping[key] != setting.default:
            mapping[key] = setting.default
            left_out.append(key)
    return {**mapping, "algorithm": algorithm}, tuple(left_out)


def _method_plan(
    config: RunConfig,
    subject: Subject,
    bandwidths: Sequence[Bandwidth],
    activations: dict[object, int | str],
    left_out: tuple[str, ...],
) -> MethodPlan:
    strategy = build_strategy(config, subject.model, **run_options(config))
    strategy.schedule = strategy.schedule.most_often()
    cast = subject.cast(config, strategy, importlib.metadata.version("fedloru-flwr"))
    rehearsal = Rehearsal(strategy, cast, config.num_server_rounds, subject.equals)
    rounds = tuple(rehearsal.rounds())
    versions = [0, *(one.ledger_version for one in rounds[:-1])]
    away = [number for number in _AWAY if number < len(rounds) - 1]
    return MethodPlan(
        algorithm=config.algorithm,
        layers=_layers(strategy, subject),
        trainable_parameters=strategy.parameters_sent(),
        rounds=rounds,
        catch_up=tuple(rehearsal.catch_up([*away, len(rounds) - 1], versions)),
        client=client_memory(config, strategy, rehearsal, subject.model, subject.inputs, activations),
        server=server_memory(config, strategy, rehearsal, subject.model),
        transfers=tuple(_transfer(bandwidth, rounds) for bandwidth in bandwidths),
        stopped=len(rounds) < config.num_server_rounds,
        left_out=left_out,
    )


def _transfer(bandwidth: Bandwidth, rounds: Sequence[PlannedRound]) -> Transfer:
    seconds = [bandwidth.seconds(one) for one in rounds]
    return Transfer(bandwidth, max(seconds), sum(seconds))


def _layers(strategy: FederatedStrategy, subject: Subject) -> tuple[PlannedLayer, ...]:
    plan = strategy.plan
    sizes = {name: tuple(parameter.shape) for name, parameter in subject.model.named_parameters()}
    counts = {name: parameter.numel() for name, parameter in subject.model.named_parameters()}
    layout = plan.layout()
    found = []
    for layer in plan.layers:
        own = {key: math.prod(shape) for key, shape in shapes(layer, layout)} | counts
        trained = sum(own[key] for key in _trained_keys(strategy, layer))
        weight = layer.weight_shape
        found.append(PlannedLayer(layer.name, layer.kind, weight, layer.rank, trained, math.prod(weight)))
    factorised = {layer.weight_key for layer in plan.layers}
    found += [
        PlannedLayer(name, "dense", sizes[name], 0, counts[name], counts[name])
        for name in plan.dense_leaves
        if name not in factorised
    ]
    return tuple(found)


def _trained_keys(strategy: FederatedStrategy, layer: FactorisedLayer) -> tuple[str, ...]:
    """What of a factorised layer is trained, but for what is a client's own."""
    if strategy.plan.form == "compressed":
        return (layer.weight_key,)
    return (layer.b_key,) if strategy.plan.one_sided else shared_keys(layer, strategy.plan.family)


def grouped(layers: Sequence[PlannedLayer]) -> list[tuple[str, int, PlannedLayer]]:
    """Layers that differ by a number in their name alone, as one: name with ``*``, how many, one of them."""
    groups: dict[object, list[PlannedLayer]] = {}
    for layer in layers:
        name = re.sub(r"(?<![^.])\d+(?![^.])", "*", layer.name)
        groups.setdefault((name, layer.kind, layer.shape, layer.rank), []).append(layer)
    return [
        (re.sub(r"(?<![^.])\d+(?![^.])", "*", of[0].name) if len(of) > 1 else of[0].name, len(of), of[0])
        for of in groups.values()
    ]


def _memory_as_json(memory: ClientMemory | ServerMemory) -> dict[str, Any]:
    """Bytes by part; ``total`` is None where a part is."""
    return {**asdict(memory), "total": memory.total, "total_at_least": memory.at_least}


def _unknown(activations: Mapping[object, int | str]) -> Iterator[str]:
    """Why activations are not known, for people."""
    for reason in dict.fromkeys(told for told in activations.values() if isinstance(told, str)):
        yield (
            "activations (?) are not in the sums, which are more than that: the model's forward pass cannot be run "
            f"without numbers on a batch such as is planned ({reason})"
        )


def _round_as_json(planned: PlannedRound) -> dict[str, Any]:
    """A round under the names of ``metrics.jsonl``."""
    return {
        "round": planned.server_round,
        "bytes_up": planned.bytes_up,
        "bytes_down": planned.bytes_down,
        "bytes_by_purpose": planned.bytes_by_purpose,
        "clients": planned.clients,
        "clients_evaluated": planned.evaluated,
        "ledger_version": planned.ledger_version,
    }
