"""The drop-in session: what a client does with a message, apart from training.

::

    @app.train()
    def train(msg, context):
        session = LowRankSession(Net, msg, context)
        loss = my_training_loop(session.model, my_loader)
        return session.reply({"train_loss": loss, "num-examples": len(my_loader.dataset)})
"""

import logging
import math
import numbers
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord
from torch import Tensor, nn

from fedloru_flwr import wire
from fedloru_flwr.clients.control import correction, new_control
from fedloru_flwr.clients.identity import client_identity
from fedloru_flwr.clients.method import ClientMethod, Site, client_method
from fedloru_flwr.clients.task import LocalResult, LocalTask
from fedloru_flwr.coding import RESIDUAL, Follow, Parcel, encode_update, flat_parts
from fedloru_flwr.data import Samples
from fedloru_flwr.lowrank import (
    Codec,
    CodecError,
    Entry,
    derive_seed,
    digest_tensors,
    generator_states,
    restore_generators,
    seed_everything,
)
from fedloru_flwr.lowrank.random import GeneratorStates
from fedloru_flwr.models.adapters import AdaptedModel
from fedloru_flwr.models.plan import AdapterPlan, build_seeded, initial_trainables, plain_state, plan_model
from fedloru_flwr.store import CHAINS_KEPT, Holdings, Store, default_store

ModelSource = Callable[[], nn.Module] | nn.Module
_log = logging.getLogger("flwr")
_MODELS_KEPT = 4


class SessionAnswer(Exception):
    """Raised by `LowRankSession` where there is nothing to train yet; the server understands it and sends more.

    Let it pass through your function. To keep it out of Flower's error log, return ``answer.message`` instead.
    """

    def __init__(self, order: wire.Order, message: Message, answer: wire.Answer) -> None:
        super().__init__(str(answer))
        self.message = Message(wire.answer_content(order, answer), reply_to=message)


class _HostedModel:
    """An adapted model that stays in the process, and the lineage its base is at.

    ``base_lineage`` names what is folded into ``W``; ``lineage`` what the model computes, stacked entries included.
    """

    def __init__(self, source: ModelSource, settings: wire.Settings, make: type[Any] = AdaptedModel) -> None:
        self._factory = None if isinstance(source, nn.Module) else source
        self._settings = settings
        module = source if isinstance(source, nn.Module) else build_seeded(source, settings.seed)
        s = settings
        plan = plan_model(module, s.form, s.rank, s.alpha, s.target_modules, s.dense_leaves)
        self.adapted = make(module, plan, settings.seed)
        averaged = set(plan.statistics)
        self._counters = {name: b.clone() for name, b in module.named_buffers() if name not in averaged}
        self.own_root = digest_tensors(self.adapted.read_base())
        if kind := getattr(self._factory, "quantised", None):  # after the digest: it is of what the server has too
            self.adapted.quantise(kind)
        self.lineage = self.base_lineage = self.own_root
        self.corrections: _Corrections | None = None
        self.followed: dict[str, dict[str, Tensor]] = {}
        self._digest = ""
        self.mark()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # An instance carries its host; a copy or a file of the user's model does not.
        return type(None), ()

    def mark(self, *, by_value: bool = False) -> None:
        """Note the base as it is now; by value, so that `forgive_rewriting` can tell what it was."""
        self._marks = self.adapted.base_marks()
        self._digest = digest_tensors(self.adapted.read_base()) if by_value else ""

    def forgive_rewriting(self) -> None:
        """Where the base was noted by value: have it written, if it is what it was, count as left alone."""
        changed = self.adapted.base_written(self._marks) or self.adapted.base_replaced(self._marks)
        if self._digest and changed and digest_tensors(self.adapted.read_base()) == self._digest:
            self.mark()

    def mend(self) -> None:
        """Undo what a user's loop may have done to what stays in the process, its failures included."""
        self.stop_correcting()
        changed = self.adapted.base_written(self._marks) or self.adapted.base_replaced(self._marks)
        if self.adapted.restore_dtypes() or changed:
            self.forget_base()

    def stop_correcting(self) -> None:
        """Leave gradients alone from now on."""
        if self.corrections is not None:
            self.corrections.stop()
            self.corrections = None

    def trained_frozen(self) -> tuple[str, ...]:
        """The frozen parameters that a user's loop has trained; the base is then built or loaded anew next time."""
        touched: tuple[str, ...] = self.adapted.frozen_with_gradient() or self.adapted.base_written(self._marks)
        if touched:
            self.forget_base()
        return touched

    def forget_base(self) -> None:
        """Build or load the base anew next time: somebody has written to it."""
        self.lineage = self.base_lineage = ""

    def reset_counters(self) -> None:
        """Give buffers that do not travel their first values: who trained here before must not matter."""
        buffers = dict(self.adapted.module.named_buffers())
        for name, value in self._counters.items():
            if name in buffers and buffers[name].shape == value.shape:
                buffers[name].detach().copy_(value)

    def _base(self, lineage: str, store: Store) -> dict[str, Tensor] | None:
        """The base of a lineage, from the store or built anew."""
        if lineage == self.own_root and self._factory is not None:
            parameters = dict(build_seeded(self._factory, self._settings.seed).named_parameters())
            base: dict[str, Tensor] = self.adapted.plan.base_of({n: p.detach() for n, p in parameters.items()})
            return base
        return store.base(lineage)

    def initial_trainables(self, digest: str) -> dict[str, Tensor] | None:
        """The Trainables before round 1 as this client builds them, if they have this digest."""
        if self._factory is None:
            return None
        seed = self._settings.seed
        built = initial_trainables(plain_state(build_seeded(self._factory, seed)), self.adapted.plan, seed)
        return built if digest_tensors(built) == digest else None

    def remember(self, digest: str, y: dict[str, Tensor]) -> None:
        """Keep what many clients of this process hold: the last ends of chains."""
        self.followed[digest] = y
        while len(self.followed) > CHAINS_KEPT:
            del self.followed[next(iter(self.followed))]

    def has_base(self, lineage: str, store: Store) -> bool:
        """Whether the base of a lineage is at hand."""
        built = {self.base_lineage} | ({self.own_root} if self._factory is not None else set())
        return lineage in built or store.has_base(lineage)

    def _path(self, lineage: str, store: Store, start: str | None) -> tuple[str, list[Entry]] | None:
        """Which entries lead from ``start``, or from the nearest base, to ``lineage``; None if the store lacks some."""
        path: list[Entry] = []
        at = lineage
        while at != start and (start is not None or not self.has_base(at, store)):
            entry = store.entry(at)
            if entry is None:
                return None
            path.insert(0, entry)
            at = entry.previous
        return at, path

    def bring_to(self, lineage: str, store: Store, root: str, client_base: str) -> bool:
        """Bring the model to ``lineage`` of the models that descend from ``root``; False if the store lacks it.

        Folding gives the same bits from whatever base. Stacking does not, and therefore starts from the client's own.
        """
        stacked = self._settings.accumulate_into == "stack"
        if self.lineage == lineage and (not stacked or self.base_lineage == client_base):
            return True
        if self._factory is None and self.base_lineage == self.own_root == root:
            store.put_base(root, self.adapted.read_base())  # an instance cannot be built again
        while True:
            found = self._path(lineage, store, client_base if stacked else None)
            if found is None:
                return False
            start, path = found
            if start == self.base_lineage:
                break
            if (base := self._base(start, store)) is not None:
                self.adapted.write_base(base)
                self.adapted.stack([])
                self.lineage = self.base_lineage = start
                break
            if stacked:
                return False
            # The file was damaged and is gone now: there may be another way.
        if stacked:
            self.adapted.stack(path)
            self.lineage = lineage
            return True
        for entry in path:
            self.adapted.fold(entry)
            self.lineage = self.base_lineage = entry.digest
        if path:
            store.put_base(lineage, self.adapted.read_base())
        return True


_hosted: "OrderedDict[tuple[object, wire.Settings, type[Any]], _HostedModel]" = OrderedDict()
_INSTANCE_HOST = "_fedloru_host"


def _host(source: ModelSource, settings: wire.Settings, make: type[Any]) -> _HostedModel:
    """The model of this source in this process, built at first use."""
    if isinstance(source, nn.Module):
        known: tuple[wire.Settings, _HostedModel | None] | None = source.__dict__.get(_INSTANCE_HOST)
        if known is None:
            known = (settings, _HostedModel(source, settings))
            source.__dict__[_INSTANCE_HOST] = known
        if known[0] != settings or known[1] is None:
            raise ValueError(
                "this model instance already serves another run, whose adapters it carries: pass a factory (a class or "
                "a function without arguments) instead of an instance, or a fresh instance for each run"
            )
        return known[1]
    key = (source, settings, make)
    if key not in _hosted:
        _hosted[key] = _HostedModel(source, settings, make)
        while len(_hosted) > _MODELS_KEPT:
            _hosted.popitem(last=False)
    _hosted.move_to_end(key)
    return _hosted[key]


class Contact:
    """One message to one client, up to the point where its base is there: parsed, caught up, nothing loaded yet.

    Args:
        model: a factory or an instance, see `LowRankSession`.
        message: what the app was called with.
        context: what the app was called with.
        store: where bases, entries and the client's own state are kept.
        make: how the model is held, `AdaptedModel` or something that has its base like it.
        order: the message, where it has been parsed already.

    Attributes:
        client: its identity.
        server_round: the round, from 1.
        seed: of everything random in this contact.
        order: the message, parsed.
        method: what the client does around training.
        site: what that is a function of.
        host: the model with its base brought up to date.

    Raises:
        SessionAnswer: there is nothing to train yet (the base has to come first).
        ValueError: the message is not of this protocol, or the model is not the server's.
    """

    def __init__(
        self,
        model: ModelSource,
        message: Message,
        context: Context,
        store: Store | None = None,
        make: type[Any] = AdaptedModel,
        order: wire.Order | None = None,
    ) -> None:
        self.message = message
        self.order = order = order or wire.read_order(message)
        self.client = client_identity(context)
        if store is None:
            path = context.node_config.get("store-path")
            store = Store(Path(str(path))) if path else default_store()
        self._store = store
        self._noted = store.holdings(order.root, self.client)
        if order.kind != "work":
            self._accept_supply()
        self.method = client_method(order.settings.method)
        self.host = host = _host(model, order.settings, make)
        host.mend()
        base = self._noted.base
        if not host.has_base(base, store):
            base = order.root
        if not (self._can_claim(order.lineage, host) and host.bring_to(order.lineage, store, order.root, base)):
            # What is noted may have been lost: tell only what the model can really be brought to.
            sure = next((at for at in self._claims(host) if host.bring_to(at, store, order.root, base)), "")
            self._answer("need-base", sure)
        self._note(base)
        host.mark()
        work = order.work
        self._own_state = bool(work.run) and (self.method.keeps_state or work.scaffold or work.feedback)
        kept = store.state(work.run, self.client, work.counted) if self._own_state and work.counted else None
        plan = host.adapted.plan
        received = order.tensors if order.parcel is None else _opened(order.parcel, plan, order)
        if order.follow is not None:
            received = self._followed(order.follow)
        self.site = Site(plan, order.settings, work, received, order.server_round, self.client, kept or {})
        self.server_round = order.server_round
        self.seed = derive_seed(
            order.settings.seed, "client", self.client, order.server_round, message.metadata.message_type
        )
        self.trains = message.metadata.message_type.split(".")[0] == "train"

    def _followed(self, follow: Follow) -> dict[str, Tensor]:
        """What this client holds of the Trainables at the end of its order's chain; else it asks for the whole."""
        host, store = self.host, self._store
        y = host.followed.get(follow.end) or store.followed(follow.end)
        if y is None and not follow.start:
            y = self.order.tensors
        if y is None:
            before = host.followed.get(follow.start) or store.followed(follow.start)
            if before is None and follow.start == follow.root:
                before = host.initial_trainables(follow.root)
            if before is None:
                self._answer("need-whole", "")
            y = self._taken(follow, before)
        host.remember(follow.end, y)
        store.put_followed(follow.end, y)
        return {key: y[key] for key in host.adapted.plan.trainable_keys if key in y}

    def _taken(self, follow: Follow, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The end of a chain from its start."""
        plan, seed = self.host.adapted.plan, self.order.settings.seed
        try:
            ordered = {key: before[key] for key in plan.trainable_keys if key in before}  # safetensors knows no order
            return follow.taken(ordered, lambda draw: plan.fresh(seed, draw))
        except CodecError as error:
            raise wire.WireError(f"the Trainables do not parse: {error}") from error

    def _answer(self, kind: wire.AnswerKind, held: str) -> NoReturn:
        raise SessionAnswer(self.order, self.message, wire.Answer(kind, self.client, held))

    def _accept_supply(self) -> None:
        order = self.order
        if order.kind == "base":
            if order.lineage == order.root and digest_tensors(order.tensors) != order.root:
                raise wire.WireError("the base received does not match its digest: it is corrupt or forged")
            self._store.put_base(order.lineage, order.tensors)
            base = order.lineage
        else:
            base = self._noted.base
        for entry in order.entries:
            self._store.put_entry(entry)
        self._note(base)
        self._answer("stored", order.lineage)

    def _note(self, base: str) -> None:
        """Note that this client holds the order's lineage now, and the base it has it from."""
        now = Holdings(self.order.lineage, base)
        if now != self._noted:
            self._store.set_holdings(self.order.root, self.client, now)

    def _claims(self, host: _HostedModel) -> Iterator[str]:
        """The lineages this client holds, newest first; others of this machine may have left more in the store."""
        root = self.order.root
        at = self._noted.lineage
        while at is not None and at != root:
            yield at
            entry = self._store.entry(at)
            at = None if entry is None else entry.previous
        if at == root or host.own_root == root:
            yield root

    def _can_claim(self, lineage: str, host: _HostedModel) -> bool:
        """Whether this client holds ``lineage``, or does so with the entries that came with the order."""
        entries = self.order.entries
        for held in self._claims(host):
            if held == lineage:
                return True
            start = next((i for i, entry in enumerate(entries) if entry.previous == held), None)
            if start is not None:
                for entry in entries[start:]:
                    self._store.put_entry(entry)
                return entries[-1].digest == lineage
        return False

    def task(self, samples: Samples, epochs: int) -> LocalTask:
        """The client's training as a value."""
        control = (
            correction(self.site, self.method.trained(self.site), self.order.extras)
            if self.order.work.scaffold
            else None
        )
        return LocalTask(
            values=self.method.start(self.site),
            phases=self.method.phases(self.site, epochs),
            samples=samples,
            seed=self.seed,
            proximal_mu=self.order.work.proximal_mu,
            control=control,
        )

    def train_reply(
        self, result: LocalResult, statistics: Mapping[str, Tensor], metrics: Mapping[str, object]
    ) -> wire.ReadyReply:
        """Keep the client's own state and answer with what the method sends.

        Raises:
            ValueError: see `LowRankSession.reply`.
        """
        record = self.metrics(metrics)
        sent, kept = self.method.finish(self.site, result.values)
        extras: dict[str, Tensor] = {}
        if self.order.work.scaffold:
            trained, gradients = self.method.trained(self.site), result.mean_gradients or {}
            extras, control = new_control(self.site, trained, gradients, self.order.extras)
            kept |= control
        if self.order.work.uplink:
            sent, kept = self._coded(sent, kept)
        if self._own_state:
            work = self.order.work
            self._store.forget_states(work.run, self.client, work.keep_from)
            self._store.put_state(work.run, self.client, self.server_round, kept)
        if result.silent:
            _log.warning("these factorised layers got no gradient in training: %s", ", ".join(result.silent))
        reply = wire.make_reply(
            self.order,
            client=self.client,
            metrics=record,
            tensors=sent,
            statistics=statistics,
            silent_layers=result.silent,
            extras=extras,
            lost_state=self._own_state and self.site.lost_state,
        )
        return self._ready(reply, trained=True)

    def _coded(
        self, sent: Mapping[str, Tensor], kept: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is sent under the codec, and what is kept with what that leaves out.

        What was left out of a factor is of that factor: where the factors have been drawn anew since, it is dropped.
        """
        site, work = self.site, self.order.work
        known = site.known
        groups = _residual_groups(site, known) if work.feedback else {}
        before: dict[str, Tensor] = {}
        for name, keys in groups.items():
            if name in site.state:
                before |= flat_parts(site.state[name], {key: known[key] for key in keys})
        seed = derive_seed(site.settings.seed, "uplink", self.client, self.server_round)
        coded, arrives, left = encode_update(Codec.parse(work.uplink), sent, known, before, seed)
        kept = self.method.forgive(site, kept, sent, arrives)
        left = {**before, **left}
        for name, keys in groups.items():
            parts = [left[key] if key in left else torch.zeros_like(known[key]) for key in keys]
            kept[name] = torch.cat([part.reshape(-1) for part in parts])
        return coded, kept

    def _ready(self, reply: wire.Reply, *, trained: bool) -> wire.ReadyReply:
        order = self.order
        return wire.ReadyReply(
            reply, trained=trained, arrays_key=order.arrays_key, config_key=order.config_key, reply_to=self.message
        )

    def evaluate_reply(self, metrics: Mapping[str, object]) -> wire.ReadyReply:
        """Answer with metrics alone."""
        reply = wire.make_reply(self.order, client=self.client, metrics=self.metrics(metrics))
        return self._ready(reply, trained=False)

    def metrics(self, metrics: Mapping[str, object]) -> MetricRecord:
        """The metrics as a record, checked."""
        weighted_by = self.order.settings.weighted_by
        record = MetricRecord({name: _metric(name, value) for name, value in metrics.items()})
        weight = record.get(weighted_by)
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(
                f"the metrics of a reply must hold {weighted_by!r}, the number of examples this client used, as a "
                f"positive number; got {metrics.get(weighted_by)!r}"
            )
        return record


def _opened(parcel: Parcel, plan: AdapterPlan, order: wire.Order) -> dict[str, Tensor]:
    """What the order's parcel holds; clients whose messages are of one content share the order."""
    if not order.tensors:
        try:
            drawn = plan.fresh_like(parcel.shapes, order.settings.seed, order.work.draw, order.work.rank)
            order.tensors.update(parcel.opened(drawn))
        except CodecError as error:
            raise wire.WireError(f"the Trainables do not parse: {error}") from error
    return order.tensors


def _residual_groups(site: Site, known: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """What belongs together of what the uplink's codec may leave out, by the name under which it is kept in one piece.

    Factors are told from those of the same names before a restart.
    """
    groups: dict[str, list[str]] = {}
    for key in known:
        group = "dense" if key in site.plan.dense_leaves else str(site.work.draw)
        groups.setdefault(f"{RESIDUAL}{group}", []).append(key)
    return groups


class LowRankSession:
    """One message's work on a client: the base brought up to date, adapters in, factors loaded.

    The model is put into training or evaluation mode, and the global generators of torch, NumPy and Python are seeded
    from (run seed, client, round, kind of message), so that a user's loop, its shuffling and dropout included, is
    repeatable wherever the message is processed; `reply` puts back the states they had.

    Where the run asks for FedProx or SCAFFOLD, the session corrects the gradients of what is trained as they are
    computed, before the loop clips them: ``g + mu (w - w_0) + c - c_k``. The loop calls ``backward`` once a step.

    Args:
        model: a factory (a class or a function without arguments), built under the run's seed and kept per process;
            or an instance, which is changed in place and whose ``W0`` the server has to send if its own differs.
        message: what the app was called with.
        context: what the app was called with.
        store: where bases and entries are kept; by default in the node config's ``store-path``, else in
            ``$FEDLORU_STORE``, else in Flower's home.
        base_by_value: for loops that write the frozen parameters without changing them, as ``load_state_dict`` of
            the model's own state dict does: whether they were trained is then told by their values, which are read
            twice a message, and not by whether they were written.

    Attributes:
        model: the user's own model with adapters inside, trainable exactly where the run trains.
        client: the client's identity.
        server_round: the round, from 1.
        seed: what the generators were seeded with.

    Raises:
        SessionAnswer: there is nothing to train yet (the base has to come first); let it pass.
        ValueError: the message is not of this protocol, or the model is not the server's.
    """

    def __init__(
        self,
        model: ModelSource,
        message: Message,
        context: Context,
        *,
        store: Store | None = None,
        base_by_value: bool = False,
    ) -> None:
        self._contact = contact = Contact(model, message, context, store)
        self._host = contact.host
        if base_by_value:
            contact.host.mark(by_value=True)
        self._adapted: AdaptedModel = contact.host.adapted
        contact.host.reset_counters()
        self.client, self.server_round, self.seed = contact.client, contact.server_round, contact.seed
        order, site = contact.order, contact.site
        self._adapted.use(contact.method.layout(site))
        self._values = contact.method.start(site)
        self._adapted.write_values(self._values)
        if order.statistics or self._adapted.plan.statistics:
            self._adapted.write_statistics(order.statistics)
        self.model: nn.Module = self._adapted.module
        _seed_generators(self.seed)
        self.model.train(contact.trains)
        first = contact.method.phases(site, 1)[0]
        self._adapted.train_only(first.keys)
        contact.host.corrections = self._corrections = self._correct(first.keys)
        self._adapted.watch_gradients()

    def _correct(self, keys: Sequence[str]) -> "_Corrections | None":
        """Have the gradients of these values corrected, if the run asks for it."""
        work, site = self._contact.order.work, self._contact.site
        if not (self._contact.trains and (work.proximal_mu or work.scaffold)):
            return None
        control = correction(site, keys, self._contact.order.extras) if work.scaffold else None
        return _Corrections(self._adapted.trained(), self._values, work.proximal_mu, control)

    def phases(self, epochs: int = 1) -> Iterator[int]:
        """Go through the stretches of training that the method has, yielding the epochs of each.

        ::

            for epochs in session.phases(local_epochs):
                train(session.model, loader, epochs)

        pFedLoRU trains the global pair first, then the personal one; every other method has one stretch. A loop that
        does not ask trains the first stretch alone.
        """
        for index, phase in enumerate(self._contact.method.phases(self._contact.site, epochs)):
            if index:  # corrections are of the global model
                self._adapted.train_only(phase.keys)
                self._host.stop_correcting()
            yield phase.epochs

    def received(self) -> tuple[str, nn.Module]:
        """The model as training starts from it, for an evaluation in the same message: ``("", model)``.

        ``("personal-", model)`` where the client trains a model of its own. The name goes before those of the metrics,
        after ``received-``, by which the server knows them. A training loop puts the model into training mode again.
        """
        contact = self._contact
        return "" if contact.method.personal(contact.site) is None else "personal-", self.model

    def models(self) -> Iterator[tuple[str, nn.Module]]:
        """Yield ``("", global model)`` and, where the client has a model of its own, ``("personal-", that model)``.

        The names go before those of the metrics. FedSA-LoRA has no global model. For evaluation.
        """
        contact = self._contact
        personal = contact.method.personal(contact.site)
        if contact.method.has_global_model():
            if personal is not None:
                plain = ClientMethod()
                self._adapted.use(plain.layout(contact.site))
                self._adapted.write_values(plain.start(contact.site))
            yield "", self.model
        if personal is not None:
            layout, values = personal
            self._adapted.use(layout)
            self._adapted.write_values(values)
            yield "personal-", self.model

    def reply(self, metrics: Mapping[str, object]) -> Message:
        """Answer the message: the Trainables after training (or nothing but metrics after evaluation).

        Args:
            metrics: numbers or lists of numbers by name, ``num-examples`` (the weight of this client) among them.
                NumPy and torch scalars and booleans are accepted.

        Raises:
            ValueError: if ``num-examples`` is missing or not a positive number, a metric is not a number, or the loop
                has trained parameters that are frozen in this run.
        """
        _restore_generators()
        contact = self._contact
        contact.metrics(metrics)
        self._host.forgive_rewriting()
        silent = self._adapted.layers_without_gradient()
        self._adapted.stop_watching()
        if not contact.trains:
            return self._plain(contact.evaluate_reply(metrics))
        gradients = None
        if self._corrections is not None:
            self._host.stop_correcting()
            gradients = self._corrections.mean_gradients()
        if touched := self._host.trained_frozen():
            raise ValueError(
                f"the training loop has trained parameters that are frozen in this run: {', '.join(touched[:5])}; "
                "leave requires_grad as the session sets it (and where the loop only writes them anew as they were, as "
                "loading a checkpoint does, give the session base_by_value=True)"
            )
        result = LocalResult(self._adapted.read_values(), math.nan, gradients, silent)
        return self._plain(contact.train_reply(result, self._adapted.read_statistics(), metrics))

    def _plain(self, reply: wire.ReadyReply) -> Message:
        """The reply as Flower can send it."""
        return Message(reply.content, reply_to=self._contact.message)


class _Corrections:
    """Corrects gradients as they are computed, and keeps the mean of what they were before."""

    def __init__(
        self,
        trained: Mapping[str, nn.Parameter],
        start: Mapping[str, Tensor],
        proximal_mu: float,
        control: Mapping[str, Tensor] | None,
    ) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps: Counter[str] = Counter()
        self._hooks = [
            parameter.register_hook(self._hook(key, parameter, start[key], proximal_mu, (control or {}).get(key)))  # type: ignore[no-untyped-call]  # torch's is untyped
            for key, parameter in trained.items()
        ]

    def _hook(
        self, key: str, parameter: nn.Parameter, start: Tensor, mu: float, control: Tensor | None
    ) -> Callable[[Tensor], Tensor]:
        def correct(gradient: Tensor) -> Tensor:
            plain = gradient.detach()
            self._sums[key] = self._sums[key] + plain if key in self._sums else plain.clone()
            self._steps[key] += 1
            if mu:
                gradient = gradient + mu * (parameter.detach() - start.to(parameter))
            return gradient if control is None else gradient + control.to(parameter)

        return correct

    def stop(self) -> None:
        """Leave the gradients alone from now on."""
        while self._hooks:
            self._hooks.pop().remove()

    def mean_gradients(self) -> dict[str, Tensor]:
        """The mean of the gradients as the loss gave them, by key."""
        return {key: (total / self._steps[key]).cpu() for key, total in self._sums.items()}


_outer_generators: GeneratorStates | None = None


def _seed_generators(seed: int) -> None:
    """Seed the global generators for a user's loop; `_restore_generators` ends it.

    What is drawn after the reply, such as a local-DP mod's noise, must not follow from a seed that the server knows.
    """
    global _outer_generators
    if _outer_generators is None:  # else the last loop ended in an exception
        _outer_generators = generator_states()
    seed_everything(seed)


def _restore_generators() -> None:
    global _outer_generators
    if _outer_generators is not None:
        restore_generators(_outer_generators)
        _outer_generators = None


def _metric(name: str, value: object) -> int | float | list[int] | list[float]:
    if not isinstance(value, list | tuple):
        return _number(name, value)
    numbers_of = [_number(name, one) for one in value]
    whole = [number for number in numbers_of if isinstance(number, int)]
    return whole if len(whole) == len(numbers_of) else [float(number) for number in numbers_of]


def _number(name: str, value: object) -> int | float:
    if type(value) is int or type(value) is float:
        return value
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise ValueError(f"metric {name!r} must be a number, got {type(value).__name__}")
