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
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message, MetricRecord
from torch import Tensor, nn

from fedloru_flwr import wire
from fedloru_flwr.clients.identity import client_identity
from fedloru_flwr.lowrank import (
    Entry,
    derive_seed,
    digest_tensors,
    generator_states,
    restore_generators,
    seed_everything,
)
from fedloru_flwr.lowrank.random import GeneratorStates
from fedloru_flwr.models.adapters import AdaptedModel
from fedloru_flwr.models.plan import build_seeded, plan_model
from fedloru_flwr.store import Store, default_path

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

    def __init__(self, source: ModelSource, settings: wire.Settings) -> None:
        self._factory = None if isinstance(source, nn.Module) else source
        self._settings = settings
        module = source if isinstance(source, nn.Module) else build_seeded(source, settings.seed)
        s = settings
        plan = plan_model(module, s.factorised, s.rank, s.alpha, s.target_modules, s.dense_leaves)
        self.adapted = AdaptedModel(module, plan)
        averaged = set(plan.statistics)
        self._counters = {name: b.clone() for name, b in module.named_buffers() if name not in averaged}
        self.own_root = digest_tensors(self.adapted.read_base())
        self.lineage = self.base_lineage = self.own_root
        self.mark()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        # An instance carries its host; a copy or a file of the user's model does not.
        return type(None), ()

    def mark(self) -> None:
        """Note the base as it is now."""
        self._marks = self.adapted.base_marks()

    def mend(self) -> None:
        """Undo what a user's loop may have done to what stays in the process, its failures included."""
        changed = self.adapted.base_written(self._marks) or self.adapted.base_replaced(self._marks)
        if self.adapted.restore_dtypes() or changed:
            self.forget_base()

    def trained_frozen(self) -> tuple[str, ...]:
        """The frozen parameters that a user's loop has trained; the base is then built or loaded anew next time."""
        touched = self.adapted.frozen_with_gradient() or self.adapted.base_written(self._marks)
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
            return {name: parameters[name].detach() for name in self.adapted.plan.base}
        return store.base(lineage)

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


_hosted: "OrderedDict[tuple[object, wire.Settings], _HostedModel]" = OrderedDict()
_INSTANCE_HOST = "_fedloru_host"


def _host(source: ModelSource, settings: wire.Settings) -> _HostedModel:
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
    key = (source, settings)
    if key not in _hosted:
        _hosted[key] = _HostedModel(source, settings)
        while len(_hosted) > _MODELS_KEPT:
            _hosted.popitem(last=False)
    _hosted.move_to_end(key)
    return _hosted[key]


class LowRankSession:
    """One message's work on a client: the base brought up to date, adapters in, factors loaded.

    The model is put into training or evaluation mode, and the global generators of torch, NumPy and Python are seeded
    from (run seed, client, round, kind of message), so that a user's loop, its shuffling and dropout included, is
    repeatable wherever the message is processed; `reply` puts back the states they had.

    Args:
        model: a factory (a class or a function without arguments), built under the run's seed and kept per process;
            or an instance, which is changed in place and whose ``W0`` the server has to send if its own differs.
        message: what the app was called with.
        context: what the app was called with.
        store: where bases and entries are kept; by default in the node config's ``store-path``, else in
            ``$FEDLORU_STORE``, else in Flower's home.

    Attributes:
        model: the user's own model with adapters inside, trainable exactly where the run trains.
        server_round: the round, from 1.
        seed: what the generators were seeded with.

    Raises:
        SessionAnswer: there is nothing to train yet (the base has to come first); let it pass.
        ValueError: the message is not of this protocol, or the model is not the server's.
    """

    def __init__(self, model: ModelSource, message: Message, context: Context, *, store: Store | None = None) -> None:
        self._message = message
        self._order = order = wire.read_order(message)
        self.client = client_identity(context)
        if store is None:
            path = context.node_config.get("store-path")
            store = Store(Path(str(path)) if path else default_path())
        self._store = store
        if order.kind != "work":
            self._accept_supply()
        host = _host(model, order.settings)
        host.mend()
        base = store.client_base(order.root, self.client)
        if not host.has_base(base, store):
            base = order.root
        if not (self._can_claim(order.lineage, host) and host.bring_to(order.lineage, store, order.root, base)):
            # What is noted may have been lost: tell only what the model can really be brought to.
            sure = next((at for at in self._claims(host) if host.bring_to(at, store, order.root, base)), "")
            self._answer("need-base", sure)
        store.set_held(order.root, self.client, order.lineage, base)
        host.mark()
        host.reset_counters()
        self._host = host
        self._adapted = host.adapted
        self._adapted.write_trainables(order.tensors)
        if order.statistics or self._adapted.plan.statistics:
            self._adapted.write_statistics(order.statistics)
        self.model: nn.Module = self._adapted.module
        self.server_round = order.server_round
        self.seed = derive_seed(
            order.settings.seed, "client", self.client, order.server_round, message.metadata.message_type
        )
        _seed_generators(self.seed)
        self._trains = message.metadata.message_type.split(".")[0] == "train"
        self.model.train(self._trains)
        self._adapted.watch_gradients()

    def _answer(self, kind: wire.AnswerKind, held: str) -> None:
        raise SessionAnswer(self._order, self._message, wire.Answer(kind, self.client, held))

    def _accept_supply(self) -> None:
        order = self._order
        if order.kind == "base":
            if order.lineage == order.root and digest_tensors(order.tensors) != order.root:
                raise wire.WireError("the base received does not match its digest: it is corrupt or forged")
            self._store.put_base(order.lineage, order.tensors)
            base = order.lineage
        else:
            base = self._store.client_base(order.root, self.client)
        for entry in order.entries:
            self._store.put_entry(entry)
        self._store.set_held(order.root, self.client, order.lineage, base)
        self._answer("stored", order.lineage)

    def _claims(self, host: _HostedModel) -> Iterator[str]:
        """The lineages this client holds, newest first; others of this machine may have left more in the store."""
        root = self._order.root
        at = self._store.held(root, self.client)
        while at is not None and at != root:
            yield at
            entry = self._store.entry(at)
            at = None if entry is None else entry.previous
        if at == root or host.own_root == root:
            yield root

    def _can_claim(self, lineage: str, host: _HostedModel) -> bool:
        """Whether this client holds ``lineage``, or does so with the entries that came with the order."""
        entries = self._order.entries
        for held in self._claims(host):
            if held == lineage:
                return True
            start = next((i for i, entry in enumerate(entries) if entry.previous == held), None)
            if start is not None:
                for entry in entries[start:]:
                    self._store.put_entry(entry)
                return entries[-1].digest == lineage
        return False

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
        weighted_by = self._order.settings.weighted_by
        record = MetricRecord({name: _metric(name, value) for name, value in metrics.items()})
        weight = record.get(weighted_by)
        if not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(
                f"the metrics of a reply must hold {weighted_by!r}, the number of examples this client used, as a "
                f"positive number; got {metrics.get(weighted_by)!r}"
            )
        if not self._trains:
            self._adapted.stop_watching()
            return Message(wire.reply_content(self._order, client=self.client, metrics=record), reply_to=self._message)
        silent = self._adapted.layers_without_gradient()
        self._adapted.stop_watching()
        if touched := self._host.trained_frozen():
            raise ValueError(
                f"the training loop has trained parameters that are frozen in this run: {', '.join(touched[:5])}; "
                "leave requires_grad as the session sets it"
            )
        if silent:
            _log.warning("these factorised layers got no gradient in training: %s", ", ".join(silent))
        content = wire.reply_content(
            self._order,
            client=self.client,
            metrics=record,
            tensors=self._adapted.read_trainables(),
            statistics=self._adapted.read_statistics(),
            silent_layers=silent,
        )
        return Message(content, reply_to=self._message)


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
    if isinstance(value, torch.Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value)
    raise ValueError(f"metric {name!r} must be a number, got {type(value).__name__}")
