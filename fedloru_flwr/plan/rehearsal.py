"""A run without its numbers: who takes part, who lacks what, which message goes where, and how many bytes it has.

The rehearsal draws participants, keeps the ledger and completes orders as `fedloru_flwr.strategies` does, with a
strategy's own settings and shapes, and with sketches in place of tensors. It assumes a run in which nothing goes wrong:
every client answers every message, no client has lost what it held, and training changes every tensor that it trains.
"""

import json
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fedloru_flwr import wire
from fedloru_flwr.coding import Follow, Parcel, Step
from fedloru_flwr.lowrank import Codec, Entry, choose
from fedloru_flwr.lowrank.factors import FactorisedLayer
from fedloru_flwr.lowrank.ledger import CODED
from fedloru_flwr.models.layout import nested_keys
from fedloru_flwr.plan.sizes import (
    Blob,
    Sketch,
    Sketches,
    array_record_bytes,
    arrays_bytes,
    config_bytes,
    content_bytes,
    distinct_arrays_bytes,
    metrics_bytes,
    name_characters,
    safetensors_bytes,
    total_nbytes,
)
from fedloru_flwr.strategies import FederatedStrategy, FedExLoRA, FedLoRUSeeded, FLoRA, HetLoRA, MFedLoRU
from fedloru_flwr.strategies.flexlora import ProductStrategy
from fedloru_flwr.strategies.orders import Bill
from fedloru_flwr.strategies.roster import participants

_DIGEST = "0" * 64
_TOKEN = "0" * 16


@dataclass(frozen=True)
class Cast:
    """Who takes part in a run.

    Attributes:
        clients: their names, in a simulation ``"0"`` to ``"K-1"``.
        train: how many samples each trains on, in the order of ``clients``.
        held_out: how many each evaluates on.
        steps: optimiser steps each takes in a round.
        train_metrics: names of the numbers that a training reply has beside ``num-examples``.
        evaluate_metrics: the same for an evaluation.
        version: of the package, as clients tell it when they enrol; None: they do not enrol.
        is_saved: whether the run has a directory, as runs of the command have.
    """

    clients: tuple[str, ...]
    train: tuple[int, ...]
    held_out: tuple[int, ...]
    steps: tuple[int, ...]
    train_metrics: tuple[str, ...] = ("train_loss",)
    evaluate_metrics: tuple[str, ...] = ("accuracy", "loss")
    version: str | None = None
    is_saved: bool = True


@dataclass(frozen=True)
class PlannedRound:
    """One round's bytes.

    Attributes:
        server_round: the round.
        bytes_up: from all clients together.
        bytes_down: to all clients together.
        bytes_by_purpose: ``{purpose: {"up": bytes, "down": bytes}}``, as ``metrics.jsonl`` has it.
        clients: how many train.
        evaluated: how many evaluate.
        ledger_version: accumulations so far.
        of_clients: ``(down, up)`` bytes of each client that takes part, in no particular order.
    """

    server_round: int
    bytes_up: int
    bytes_down: int
    bytes_by_purpose: dict[str, dict[str, int]]
    clients: int
    evaluated: int
    ledger_version: int
    of_clients: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CatchUp:
    """What a client is sent that has been away.

    Attributes:
        rounds: for so many rounds before the last one; it took part in the round before them.
        entries: accumulations it lacks.
        bytes: of what it is sent for them.
        as_base: it is sent ``W`` instead, which is smaller.
    """

    rounds: int
    entries: int
    bytes: int
    as_base: bool


@dataclass(frozen=True)
class _EntrySketch:
    adapter: Sketches
    scale: float
    draw: int
    codec: Codec | None = None

    @cached_property
    def tensors(self) -> Sketches:
        return self.adapter if self.codec is None else _coded(self.codec, self.adapter)

    @cached_property
    def nbytes(self) -> int:
        return total_nbytes(self.tensors.values())

    @cached_property
    def arrays(self) -> int:
        return distinct_arrays_bytes(self.tensors.values())

    @cached_property
    def characters(self) -> int:
        return sum(map(name_characters, self.tensors))

    def link(self, index: int) -> Entry:
        """The entry of this place in a stretch, for what is said of it beside its tensors."""
        if self.codec is None:
            return Entry(f"{index + 1:064x}", f"{index:064x}", self.scale, {}, self.draw)
        shapes = {key: torch.empty(sketch.shape, device="meta") for key, sketch in self.adapter.items()}
        return Entry(f"{index + 1:064x}", f"{index:064x}", self.scale, shapes, self.draw, str(self.codec))


@dataclass
class _State:
    """What the server would know after a round."""

    trainables: dict[str, Sketch]
    entries: list[_EntrySketch] = field(default_factory=list)
    draw: int = 0
    held: dict[str, int] = field(default_factory=dict)
    counted: dict[str, int] = field(default_factory=dict)
    counted_before: list[dict[str, int]] = field(default_factory=list)
    spent: int = 0
    steps: list[Step] = field(default_factory=list)
    step_draw: int = 0
    followed: dict[str, int] = field(default_factory=dict)


class Rehearsal:
    """A strategy's run of ``num_rounds``, round by round.

    Args:
        strategy: not started; its model may lie on the meta device, where tensors are taken to be all different.
        cast: who takes part.
        num_rounds: of the run.
        equals: dense leaves that stay equal to others however they are trained, each with a name that those share;
            without a name (empty), one that is not trained at all.
    """

    def __init__(
        self,
        strategy: FederatedStrategy,
        cast: Cast,
        num_rounds: int,
        equals: Mapping[str, str] | None = None,
    ) -> None:
        self._strategy = strategy
        self._equals = dict(equals or {})
        self._cast = cast
        self._num_rounds = num_rounds
        self._number = {client: index for index, client in enumerate(cast.clients)}
        base = strategy.state.base
        self._base = {name: Sketch.of(tensor) for name, tensor in base.items()}
        self._base_nbytes = total_nbytes(self._base.values())
        self._statistics = {name: Sketch.of(tensor) for name, tensor in strategy.state.statistics.items()}
        self._likes: dict[tuple[int, wire.Half], dict[str, Sketch]] = {}
        self._scale = strategy.plan.scale
        self._keeps_client_state = strategy._keeps_client_state
        self._state = _State({key: Sketch.of(tensor) for key, tensor in strategy.state.trainables.items()})
        factors = set(strategy.plan.factor_keys)
        self._fresh = {key: sketch for key, sketch in self._state.trainables.items() if key in factors}
        self._sizes: dict[object, int] = {}

    # --- the run ---------------------------------------------------------------------------------------------------

    def rounds(self) -> Iterator[PlannedRound]:
        """Go through the run once; it ends early where ``max_total_bytes`` ends it."""
        strategy, state, cast = self._strategy, self._state, self._cast
        for server_round in range(1, self._num_rounds + 1):
            bill = Bill()
            of_clients: dict[str, tuple[int, int]] = {}
            if server_round == 1 and cast.version is not None:
                self._enrol(bill, of_clients)
            drawn = self._exchange("train", server_round, strategy.fraction_train, bill, of_clients)
            before = len(state.entries)
            self._settle(server_round, drawn)
            state.counted |= dict.fromkeys(drawn, server_round)
            spent = state.spent + bill.total("up") + bill.total("down")
            last = server_round == self._num_rounds or self._is_spent(spent)
            asked = self._evaluate(server_round, last, bill, of_clients)
            state.spent += bill.total("up") + bill.total("down")
            yield PlannedRound(
                server_round,
                bill.total("up"),
                bill.total("down"),
                bill.by_purpose(),
                len(drawn),
                asked,
                len(state.entries),
                tuple(of_clients.values()),
            )
            ends = server_round == self._num_rounds or self._is_spent(state.spent)
            accumulated = strategy.schedule.due(server_round) and len(state.entries) > before
            if server_round % strategy.checkpoint_every == 0 or ends or accumulated:
                state.counted_before = [*state.counted_before, dict(state.counted)][-2:]
            if ends:
                return

    def _is_spent(self, total: int) -> bool:
        return 0 < self._strategy.max_total_bytes <= total

    def _enrol(self, bill: Bill, of_clients: dict[str, tuple[int, int]]) -> None:
        query = wire.enrolment_query()
        down = wire.content_bytes(query)
        for client in self._cast.clients:
            up = wire.content_bytes(wire.enrolment_reply(query, wire.Enrolment(client, self._cast.version or "")))
            bill.add("down", "enrolment", down)
            bill.add("up", "enrolment", up)
            of_clients[client] = (down, up)

    def _evaluate(self, server_round: int, last: bool, bill: Bill, of_clients: dict[str, tuple[int, int]]) -> int:
        strategy = self._strategy
        off = strategy.fraction_evaluate == 0.0 and not (last and strategy.has_personal_model)
        if off or not (last or server_round % strategy.evaluate_every == 0):
            return 0
        fraction = 1.0 if last and strategy._evaluate_all_at_end else strategy.fraction_evaluate
        return len(self._exchange("evaluate", server_round, fraction, bill, of_clients))

    # --- one phase -------------------------------------------------------------------------------------------------

    def _exchange(
        self, phase: str, server_round: int, fraction: float, bill: Bill, of_clients: dict[str, tuple[int, int]]
    ) -> list[str]:
        strategy, state = self._strategy, self._state
        count = participants(len(self._cast.clients), fraction, strategy._at_least[phase])
        drawn = choose(strategy.seed, "participants", phase, server_round, items=list(self._cast.clients), count=count)
        trains = phase == "train"
        purpose = "trainables" if trains else "evaluation"
        half: wire.Half = strategy._half(server_round) if trains else "both"
        extras = 0
        if trains and strategy.scaffold:
            like = self._like(wire.Work(half=half))
            extras = safetensors_bytes({f"{wire.CONTROL}{key}": sketch for key, sketch in like.items()})
        version = len(state.entries)
        downlink = strategy.downlink.at(server_round)
        follows = trains and downlink.keep < 1
        if follows:
            self._advance(downlink)
        supplies: dict[int, tuple[wire.SupplyKind, int] | None] = {}
        answers: dict[int, int] = {}
        orders: dict[tuple[int, wire.Work, int], tuple[int, int]] = {}
        replies: dict[object, int] = {}
        for client in drawn:
            down, up = of_clients.get(client, (0, 0))
            held = state.held.get(client, 0)
            if held not in supplies:
                supplies[held] = self._supply(held, server_round)
            if (supply := supplies[held]) is not None:
                kind, size = supply
                spelt = len(urllib.parse.quote(client, safe=""))
                if spelt not in answers:
                    answers[spelt] = self._answer(client, server_round)
                answer = answers[spelt]
                bill.add("down", kind, size)
                bill.add("up", kind, answer)
                down, up = down + size, up + answer
                held = version
            work = self._work(client, half, strategy.uplink.at(server_round) if trains else None)
            followed = state.followed.get(client, 0) if follows else -1
            if (held, work, followed) not in orders:
                orders[held, work, followed] = self._order(held, work, server_round, extras, followed)
            size, entries = orders[held, work, followed]
            bill.add("down", "entries", entries)
            bill.add("down", "control", extras)
            bill.add("down", purpose, size - entries - extras)
            reply = self._reply(trains, client, work, server_round, extras, replies)
            bill.add("up", "control", extras)
            bill.add("up", purpose, reply - extras)
            of_clients[client] = (down + size, up + reply)
        state.held |= dict.fromkeys(drawn, version)
        if follows:
            state.followed |= dict.fromkeys(drawn, len(state.steps))
        return drawn

    def _advance(self, codec: Codec) -> None:
        """One step on with what all clients that follow hold."""
        state = self._state
        begins = state.draw if state.draw != state.step_draw else -1
        size = codec.size(sketch.shape for sketch in state.trainables.values())
        state.steps.append(Step(begins, str(codec), bytes(size)))
        state.step_draw = state.draw

    def _lacks(self, followed: int) -> tuple[Sketches, Follow]:
        """What a client is sent that holds what came of so many steps."""
        now, steps = self._state.trainables, tuple(self._state.steps[followed:])
        known, size = 0, 0
        for step in reversed(self._state.steps):
            size += len(step.data)
            if known and size >= total_nbytes(now.values()):
                break
            known += 1
        if len(steps) > known:
            return now, Follow(_DIGEST, "", _DIGEST)
        data = sum(len(step.data) for step in steps)
        return {CODED: Sketch((data,), torch.uint8)}, Follow(_DIGEST, _DIGEST, _DIGEST, steps)

    def _work(self, client: str, half: wire.Half, codec: Codec | None = None) -> wire.Work:
        """What a client is to do; see `FederatedStrategy`."""
        strategy, state = self._strategy, self._state
        rank = 0 if strategy.ranks.uniform else strategy.ranks.of(client)
        coded = codec is not None and (codec != Codec() or strategy.feedback)
        uplink, feedback = str(codec) if coded else "", coded and strategy.feedback
        mu, scaffold = strategy.proximal_mu, strategy.scaffold
        if not self._keeps_client_state:
            return wire.Work(rank, state.draw, half, proximal_mu=mu, uplink=uplink, feedback=feedback)
        counted = state.counted.get(client, 0)
        before = state.counted_before
        safe = before[0].get(client, 0) if len(before) > 1 else 0
        keep_from = safe if self._cast.is_saved else counted
        return wire.Work(rank, state.draw, half, _TOKEN, counted, keep_from, mu, scaffold, uplink, feedback)

    def _is_supplied(self, held: int) -> wire.SupplyKind | None:
        """What goes ahead of the order for a client that has so many entries: a base, entries, or nothing."""
        missing = self._state.entries[held:]
        nbytes = sum(entry.nbytes for entry in missing)
        if missing and self._base_nbytes < nbytes:
            return "base"
        return "entries" if nbytes > wire.INLINE_LIMIT else None

    def _supply(self, held: int, server_round: int) -> tuple[wire.SupplyKind, int] | None:
        """The message that goes ahead: its kind and size."""
        kind = self._is_supplied(held)
        if kind is None:
            return None
        missing, base = (self._state.entries[held:], {}) if kind == "entries" else ([], self._base)
        hollow = wire.supply_content(
            kind,
            root=_DIGEST,
            lineage=_DIGEST,
            settings=self._strategy.settings,
            template=_template(server_round),
            entries=[entry.link(index) for index, entry in enumerate(missing)],
            base={name: torch.empty(0, dtype=sketch.dtype) for name, sketch in base.items()},
        )
        if kind == "base":
            arrays = arrays_bytes(self._base)
        else:
            names = sum(len(entry.tensors) for entry in missing)
            numbers = sum(len(entry.tensors) * len(f"{index}/") for index, entry in enumerate(missing))
            characters = numbers + sum(entry.characters for entry in missing)
            arrays = array_record_bytes(names, characters, names) + sum(entry.arrays for entry in missing)
        return kind, content_bytes({wire.ARRAYS: arrays, wire.CONFIG: config_bytes(dict(_config_of(hollow)))})

    def _answer(self, client: str, server_round: int) -> int:
        """A client's answer that it has kept what went ahead."""
        return wire.content_bytes(
            wire.answer_content(self._read_order(server_round), wire.Answer("stored", client, _DIGEST))
        )

    def _entries(self, held: int) -> int:
        """The entries that ride along with an order."""
        missing = self._state.entries[held:]
        if not missing:
            return 0
        tensors = {f"{index}/{key}": one for index, entry in enumerate(missing) for key, one in entry.tensors.items()}
        return safetensors_bytes(
            tensors, json.dumps(wire.chain_links([entry.link(index) for index, entry in enumerate(missing)]))
        )

    def _order(self, held: int, work: wire.Work, server_round: int, extras: int, followed: int) -> tuple[int, int]:
        """An order's size, and how much of it ledger entries are."""
        codec = replace(self._strategy.downlink.at(server_round), keep=1.0)
        payload = self._payload(work)
        coded: Parcel | Follow | None = None
        if followed >= 0:
            payload, coded = self._lacks(followed)
        elif codec != Codec() and payload:
            coded = Parcel(str(codec), {key: sketch.shape for key, sketch in payload.items()}, False, b"")
            payload = _coded(codec, payload)
        hollow = wire.order_content(
            _template(server_round),
            root=_DIGEST,
            lineage=_DIGEST,
            settings=self._strategy.settings,
            work=work,
            coded=coded,
        )
        entries = self._entries(held)
        statistics = safetensors_bytes(self._statistics) if self._statistics else 0
        blobs = {wire.EXTRAS: extras, wire.ENTRIES: entries, wire.STATISTICS: statistics}
        config = {**_config_of(hollow), **{name: Blob(size) for name, size in blobs.items() if size}}
        key = "down", work.rank, codec if followed < 0 else tuple(payload.values())
        if key not in self._sizes:
            self._sizes[key] = arrays_bytes(payload)
        arrays = self._sizes[key]
        return content_bytes({wire.ARRAYS: arrays, wire.CONFIG: config_bytes(config)}), entries

    def _reply(
        self, trains: bool, client: str, work: wire.Work, server_round: int, extras: int, known: dict[object, int]
    ) -> int:
        """A reply's size."""
        cast, index = self._cast, self._number[client]
        examples = cast.train[index] if trains else cast.held_out[index]
        single = trains and cast.steps[index] == 1
        key = (len(json.dumps(client)), work.rank, single, examples)
        if key in known:
            return known[key]
        names = cast.train_metrics if trains else cast.evaluate_metrics
        metrics: dict[str, float] = {**dict.fromkeys(names, 0.5), self._strategy.settings.weighted_by: examples}
        order = self._read_order(server_round)
        told = wire.make_reply(order, client=client, metrics=MetricRecord())
        hollow = wire.reply_records(told, None, wire.ARRAYS, wire.CONFIG)
        config: dict[str, object] = dict(_config_of(hollow))
        records = {wire.METRICS: metrics_bytes(metrics)}
        if trains:
            of_arrays = "up", work.rank, work.half, single, work.uplink
            if of_arrays not in self._sizes:
                sent = self._sent(work, single)
                sent = _coded(Codec.parse(work.uplink), sent) if work.uplink else sent
                self._sizes[of_arrays] = arrays_bytes(sent)
            records[wire.ARRAYS] = self._sizes[of_arrays]
            if self._statistics:
                config[wire.STATISTICS] = Blob(safetensors_bytes(self._statistics))
            if extras:
                config[wire.EXTRAS] = Blob(extras)
        known[key] = content_bytes({**records, wire.CONFIG: config_bytes(config)})
        return known[key]

    def _read_order(self, server_round: int) -> wire.Order:
        settings = self._strategy.settings
        return wire.Order(
            "work", _DIGEST, _DIGEST, settings, {}, (), {}, server_round, wire.ARRAYS, wire.CONFIG, wire.Work()
        )

    # --- what the methods exchange ---------------------------------------------------------------------------------

    def _like(self, work: wire.Work) -> dict[str, Sketch]:
        """What a client sends, by key."""
        key = work.rank, work.half
        if key not in self._likes:
            like = self._strategy._reply_like(wire.Work(rank=work.rank, half=work.half))
            now = self._state.trainables
            self._likes[key] = {
                name: self._trained(name, Sketch(tuple(tensor.shape), tensor.dtype, value=_value_of(now.get(name))))
                for name, tensor in like.items()
            }
        return self._likes[key]

    def _trained(self, key: str, sketch: Sketch) -> Sketch:
        """What becomes of a tensor in training."""
        equals = self._equals.get(key)
        return sketch if equals == "" else sketch.trained(equals)

    def _payload(self, work: wire.Work) -> Sketches:
        """The arrays for a client; see the methods' ``_payload``."""
        strategy, now = self._strategy, self._state.trainables
        if isinstance(strategy, ProductStrategy):
            layers = strategy.plan.layers
            is_fresh = all(now[layer.delta_key].value == 0 for layer in layers)
            return {key: now[key] for key in strategy.plan.dense_leaves} if is_fresh else self._pairs(work)
        if isinstance(strategy, HetLoRA):
            return self._pairs(work)
        keys = strategy.plan.factor_keys
        if isinstance(strategy, FedLoRUSeeded) and all(now[key].value == 0 for key in keys):
            return {key: sketch for key, sketch in now.items() if key not in keys}
        return now

    def _pairs(self, work: wire.Work) -> Sketches:
        """Pairs of a client's rank, and the dense leaves."""
        now = self._state.trainables
        found = {}
        for key, sketch in self._like(work).items():
            whole = now.get(key)
            found[key] = sketch if whole is None else replace(sketch, value=whole.value)
        return found

    def _sent(self, work: wire.Work, single_step: bool) -> Sketches:
        """What a client sends after training, in ``single_step`` or more."""
        like = self._like(work)
        strategy, now = self._strategy, self._state.trainables
        if single_step and isinstance(strategy, MFedLoRU) and strategy._is_nested(work):
            # Where B is zero, the first step leaves A_u at zero: its gradient has B as a factor.
            zero = {nested_keys(layer)[1] for layer in strategy.plan.layers if now[layer.b_key].value == 0}
            return {key: replace(sketch, value=0.0) if key in zero else sketch for key, sketch in like.items()}
        return like

    def _settle(self, server_round: int, drawn: Sequence[str]) -> None:
        """What the server makes of the replies."""
        strategy, state = self._strategy, self._state
        plan, half = strategy.plan, strategy._half(server_round)
        self._become(
            {
                key: sketch if wire.is_frozen(key, half) else self._trained(key, sketch)
                for key, sketch in state.trainables.items()
            }
        )
        draw, codec = state.draw if plan.one_sided else 0, strategy.downlink.of_entries(server_round)
        rank = strategy.settings.rank
        ranks = [self._work(client, half).rank or rank for client in drawn]
        if isinstance(strategy, FLoRA):
            state.entries.append(_EntrySketch(self._stacked(ranks), self._scale, draw, codec))
            state.draw += 1
        if isinstance(strategy, FedExLoRA):
            state.entries.append(_EntrySketch(self._stacked([*ranks, rank]), self._scale, draw, codec))
        if strategy.schedule.due(server_round) and plan.adapted:
            adapter = {key: state.trainables[key] for key in plan.factor_keys}
            state.entries.append(_EntrySketch(adapter, self._scale, draw, codec))
            if strategy.reinit == "reset":
                state.draw += 1
                self._become({**state.trainables, **self._fresh})

    def _become(self, trainables: dict[str, Sketch]) -> None:
        """Take other trainables; sizes told of those before are forgotten."""
        if trainables != self._state.trainables:
            self._state.trainables = trainables
            self._sizes.clear()

    def _stacked(self, ranks: Sequence[int]) -> dict[str, Sketch]:
        """Pairs side by side, or their product where that is smaller; see `fedloru_flwr.lowrank.stacked`."""
        tensors: dict[str, Sketch] = {}
        for layer in self._strategy.plan.layers:
            is_double = self._base[layer.weight_key].dtype == torch.float64
            dtype = torch.float64 if is_double else torch.float32
            tensors |= {key: Sketch(shape, dtype) for key, shape in _stacked_shapes(layer, sum(ranks)).items()}
        return tensors

    # --- what the plan says beside the rows ------------------------------------------------------------------------

    @property
    def ledger_bytes(self) -> int:
        """The numbers of all accumulated entries, in bytes."""
        return sum(entry.nbytes for entry in self._state.entries)

    @property
    def received_bytes(self) -> int:
        """The numbers that a client of full rank receives in a round, in bytes."""
        return total_nbytes(self._payload(wire.Work()).values())

    @property
    def replies_bytes(self) -> int:
        """The numbers that a round's clients send at most, in bytes."""
        strategy = self._strategy
        count = participants(len(self._cast.clients), strategy.fraction_train, strategy._at_least["train"])
        halves: tuple[wire.Half, ...] = (strategy._half(1), strategy._half(2))
        return count * max(total_nbytes(self._like(wire.Work(half=half)).values()) for half in halves)

    def catch_up(self, rounds: Sequence[int], versions: Sequence[int]) -> list[CatchUp]:
        """What a client is sent in the last round that has been away for so many rounds before it.

        Args:
            rounds: the numbers of rounds.
            versions: the number of accumulations before each round of the run, which is over.
        """
        state, last = self._state, len(versions)
        after, state.entries = state.entries, state.entries[: versions[-1]]
        try:
            found = []
            for away in rounds:
                present = last - away - 1
                held = versions[present - 1] if present > 0 else 0
                supply = self._supply(held, last)
                missing = len(state.entries) - held
                size = self._entries(held) if supply is None else supply[1]
                found.append(CatchUp(away, missing, size, supply is not None and supply[0] == "base"))
            return found
        finally:
            state.entries = after


def _coded(codec: Codec, tensors: Sketches) -> Sketches:
    """What travels of tensors under a codec; of zstd, whose gain nobody knows before, as if there were none."""
    return {CODED: Sketch((codec.size(sketch.shape for sketch in tensors.values()),), torch.uint8)}


def _stacked_shapes(layer: FactorisedLayer, rank: int) -> Mapping[str, tuple[int, ...]]:
    rows, columns = layer.out_features, layer.in_features
    if rank * (rows + columns) >= rows * columns:
        return {layer.delta_key: layer.weight_shape}
    return {layer.a_key: layer.a_shape(rank), layer.b_key: layer.b_shape(rank)}


def _value_of(sketch: Sketch | None) -> float | str | None:
    return None if sketch is None else sketch.value


def _template(server_round: int) -> RecordDict:
    """What Flower's averaging strategies would send to all, without the arrays."""
    return RecordDict({wire.ARRAYS: ArrayRecord(), wire.CONFIG: ConfigRecord({wire.SERVER_ROUND: server_round})})


def _config_of(content: RecordDict) -> ConfigRecord:
    return next(iter(content.config_records.values()))
