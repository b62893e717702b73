"""One phase of a round: who was asked, what was made of the replies, and what is kept of them.

Where the aggregate needs nothing but the weighted mean, a reply is folded into it as it comes (`Folding`), in float32,
in a fixed order of the clients: the result does not depend on the order of arrival, nor on who else was asked. A reply
whose acceptance depends on the others is set aside until they are there, on disk beyond 64 MiB. Otherwise all replies
are kept (`Keeping`).
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import WARNING
from pathlib import Path
from typing import ClassVar, Protocol

from flwr.app import Message
from flwr.common.logger import log
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.lowrank import FactorisedLayer, TreeMean, TreeProducts, place_of
from fedloru_flwr.strategies.judging import Expected, Rejected, judge, metrics_shape
from fedloru_flwr.strategies.orders import in_turn
from fedloru_flwr.strategies.roster import Roster, RosterError

_PARTS = ("tensors", "statistics", "extras")


@dataclass
class Kept:
    """What is kept of a client's reply.

    Attributes:
        work: what it was to do.
        reply: as it was judged; without tensors where it is folded.
        message: that brought it; None where it is folded.
        common: its tensors as the inner strategy averages them, as long as they are kept in memory.
        norm: of its update, as soon as it is known.
        aside: its tensors, as long as they are set aside.
    """

    work: wire.Work
    reply: wire.Reply
    message: Message | None = None
    common: dict[str, Tensor] = field(default_factory=dict)
    norm: float = 0.0
    aside: "Aside | None" = None


class Keeper(Protocol):
    """What becomes of good replies as they come."""

    def look(self, work: wire.Work, message: Message, reply: wire.Reply) -> Kept:
        """Take a reply in, of a client that may not be the one that was asked."""

    def take(self, client: str, kept: Kept) -> None:
        """It is of the client that was asked."""

    def set_aside(self, kept: Kept) -> None:
        """It is not."""

    def drop(self, kept: Kept) -> None:
        """It is not used."""

    def skip(self, client: str) -> None:
        """There will be no good reply of a client that was asked."""


class Keeping:
    """Keeps every reply whole."""

    def look(self, work: wire.Work, message: Message, reply: wire.Reply) -> Kept:
        """See `Keeper`."""
        return Kept(work, reply, message)

    def take(self, client: str, kept: Kept) -> None:
        """See `Keeper`."""

    def set_aside(self, kept: Kept) -> None:
        """See `Keeper`."""

    def drop(self, kept: Kept) -> None:
        """See `Keeper`."""

    def skip(self, client: str) -> None:
        """See `Keeper`."""


@dataclass
class Exchange:
    """What came of one phase of a round."""

    phase: str
    keeper: Keeper = field(default_factory=Keeping)
    drawn: list[str] = field(default_factory=list)
    arrays_key: str = wire.ARRAYS
    work: dict[str, wire.Work] = field(default_factory=dict)
    good: dict[str, Kept] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def refuse(self, refused: Mapping[str, str]) -> None:
        """Leave out clients whose replies were good in themselves."""
        self.failures |= refused
        for client in refused:
            self.keeper.drop(self.good.pop(client))


def gather(
    exchange: Exchange,
    node_of: Mapping[str, int],
    replies: Iterator[tuple[str, Message]],
    expect: Callable[[wire.Work], Expected],
    roster: Roster,
    is_current: Callable[[str, wire.Work], bool],
    timeout: float,
) -> tuple[dict[str, str], dict[str, int]]:
    """Judge replies as they come.

    Those of clients that go by another name than they were asked by are looked at after the others, in a fixed order.

    Args:
        exchange: what comes of it is noted there.
        node_of: the clients that were asked.
        replies: by the names by which they were asked, see `Orders.deliver`.
        expect: what a reply to some work must look like.
        roster: is told who is who.
        is_current: whether work that was given was meant for this client, and not for another's state.
        timeout: how long they had, for the reasons.

    Returns:
        Who has answered, by the names they went by until now; and the nodes of those, by their own names, whose work
        was for another's state and who are to be asked again.
    """
    asked = {client: exchange.work[client] for client in node_of}
    failures: dict[str, str] = {}
    answered: dict[str, str] = {}
    strangers: dict[str, Kept] = {}
    misnamed: dict[str, int] = {}
    for client, message in replies:
        try:
            reply = judge(message, expect(asked[client]))
            if reply.client == client:
                roster.confirm(node_of[client], client)
        except (Rejected, RosterError) as reason:
            failures[client] = str(reason)
            exchange.keeper.skip(client)
            continue
        answered[client] = reply.client
        kept = exchange.keeper.look(asked[client], message, reply)
        if reply.client == client:
            exchange.keeper.take(client, kept)
            exchange.good[client] = kept
        else:
            exchange.keeper.set_aside(kept)
            strangers[client] = kept
    for client, kept in sorted(strangers.items()):
        own = kept.reply.client
        try:
            roster.confirm(node_of[client], own)
        except RosterError as reason:
            failures[client] = str(reason)
            del answered[client]
        else:
            if is_current(own, kept.work):
                exchange.good[own], exchange.work[own] = kept, kept.work
                continue
            misnamed[own] = node_of[client]
        exchange.keeper.drop(kept)
    for client in node_of:
        if client not in answered and client not in failures:
            failures[client] = f"no reply within {timeout:.0f} s"
    exchange.failures |= {client: failures[client] for client in node_of if client in failures}
    return {client: answered[client] for client in node_of if client in answered}, misnamed


class Aside:
    """Some of a reply's tensors, in memory or on disk."""

    def __init__(self, shelf: "Shelf", parts: dict[str, dict[str, Tensor]]) -> None:
        self._shelf = shelf
        self._parts: dict[str, dict[str, Tensor]] | None = parts
        self.size = sum(tensor.nbytes for part in parts.values() for tensor in part.values())
        self._keys = {name: list(part) for name, part in parts.items()}
        self._path: Path | None = None

    def write(self, path: Path) -> None:
        """Put them into a file, and let go of them in memory."""
        assert self._parts is not None
        flat = {f"{name}/{key}": value for name, part in self._parts.items() for key, value in part.items()}
        save_file({key: value.contiguous() for key, value in flat.items()}, path)
        self._path, self._parts = path, None

    def take(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by part, in their order; they are no longer set aside."""
        parts = self._parts
        if parts is None:
            assert self._path is not None
            flat = load_file(self._path)
            parts = {name: {key: flat[f"{name}/{key}"] for key in keys} for name, keys in self._keys.items()}
        self.drop()
        return parts

    def drop(self) -> None:
        """Forget them."""
        if self._parts is not None:
            self._shelf.used -= self.size
        elif self._path is not None:
            self._path.unlink(missing_ok=True)
        self._parts = self._path = None


class Shelf:
    """Where replies are set aside: in memory up to a limit in bytes, and from there on in temporary files."""

    limit: ClassVar[int] = 64 * 2**20

    def __init__(self) -> None:
        self._directory: Path | None = None
        self._count = 0
        self.used = 0

    def put(self, parts: dict[str, dict[str, Tensor]]) -> Aside:
        """Set tensors aside."""
        aside = Aside(self, parts)
        self.used += aside.size
        if self.used > self.limit:
            try:
                if self._directory is None:
                    self._directory = Path(tempfile.mkdtemp(prefix="fedloru-"))
                    # Whatever ends the round: nothing of it is left on disk.
                    weakref.finalize(self, shutil.rmtree, self._directory, ignore_errors=True)
                self._count += 1
                aside.write(self._directory / f"{self._count}.safetensors")
                self.used -= aside.size
            except Exception as error:  # the disk is full, say: safetensors has a type of error of its own
                log(WARNING, "a reply set aside stays in memory: %s", error)
        return aside


@dataclass(frozen=True)
class Form:
    """What of a reply is folded.

    Attributes:
        common: what the inner strategy averages, from work and what was sent.
        norm: of the update, from work, the common form and what was sent.
        adapter: whose products are averaged for the aggregation error, from work and what was sent; None: none are.
        weight: ``w_k`` of a reply.
    """

    common: Callable[[wire.Work, Mapping[str, Tensor]], dict[str, Tensor]]
    norm: Callable[[wire.Work, Mapping[str, Tensor], Mapping[str, Tensor]], float]
    adapter: Callable[[wire.Work, Mapping[str, Tensor]], Mapping[str, Tensor]] | None
    weight: Callable[[wire.Reply], float]


@dataclass
class Folded:
    """The weighted means of a phase's good replies, by part, and the sum of the weights."""

    weight: float
    common: dict[str, Tensor]
    statistics: dict[str, Tensor]
    extras: dict[str, Tensor]
    products: TreeProducts | None


class Folding:
    """Folds good replies into their mean as they come.

    A reply is folded at once where nothing that comes later can make it a bad one: its metrics have the names that most
    have, so far as the first one tells, and its update's norm is one that earlier rounds alone let pass. Others are set
    aside. Both verdicts are the same as with all replies at hand: where the first one's metrics turn out to be the odd
    ones, all that was folded is, and the mean begins anew.

    Args:
        clients: who is asked.
        form: what of a reply is folded.
        certain_norm: see `judging.certain_norm`; below 0 all are set aside, as where it is not sure that those asked go
            by their own names, which give them their places.
        layers: whose products are averaged too.
    """

    def __init__(
        self, clients: Collection[str], form: Form, certain_norm: float, layers: Sequence[FactorisedLayer]
    ) -> None:
        self._form = form
        self._certain_norm = certain_norm
        self._layers = layers
        self._shelf = Shelf()
        self._shape: object = None
        self._begin(clients)

    def _begin(self, clients: Collection[str]) -> None:
        self._index = {client: index for index, client in enumerate(sorted(clients, key=in_turn))}
        places = [place_of(client) for client in self._index]
        self._mean = TreeMean(places)
        self._products = TreeProducts(self._layers, places) if self._form.adapter is not None else None
        self._done: set[str] = set()

    def look(self, work: wire.Work, message: Message, reply: wire.Reply) -> Kept:
        """See `Keeper`."""
        common = self._form.common(work, reply.tensors)
        return Kept(work, reply, common=common, norm=self._form.norm(work, common, reply.tensors))

    def take(self, client: str, kept: Kept) -> None:
        """See `Keeper`."""
        shape = metrics_shape(kept.reply.metrics)
        self._shape = self._shape or shape
        if shape == self._shape and kept.norm <= self._certain_norm:
            self._fold(client, kept)
        else:
            self.set_aside(kept)

    def set_aside(self, kept: Kept) -> None:
        """See `Keeper`."""
        kept.aside = self._shelf.put({name: dict(getattr(kept.reply, name)) for name in _PARTS})
        _strip(kept)

    def drop(self, kept: Kept) -> None:
        """See `Keeper`."""
        if kept.aside is not None:
            kept.aside.drop()
            kept.aside = None

    def skip(self, client: str) -> None:
        """See `Keeper`."""
        if self._certain_norm < 0:
            return  # nothing is folded before the end, and the name may turn out to be another client's
        self._mean.skip(self._index[client])
        if self._products is not None:
            self._products.skip(self._index[client])

    def finish(self, good: Mapping[str, Kept]) -> Folded:
        """Fold in what was set aside of the good replies, which are all there are now; at least one."""
        if self._done.isdisjoint(good):
            self._begin(good)
        elif not self._done <= good.keys():
            raise RuntimeError("some of the replies that were folded at once have turned out bad, and others good")
        for client in sorted((client for client in good if client not in self._done), key=in_turn):
            self._fold(client, good[client])
        mean, weight = self._mean.result()
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in _PARTS}
        for key, value in mean.items():
            name, _, own = key.partition("/")
            parts[name][own] = value
        return Folded(weight, parts["tensors"], parts["statistics"], parts["extras"], self._products)

    def _fold(self, client: str, kept: Kept) -> None:
        index = self._index[client]
        if kept.aside is not None:
            parts = kept.aside.take()
            kept.aside = None
        else:
            parts = {name: dict(getattr(kept.reply, name)) for name in _PARTS}
        weight = self._form.weight(kept.reply)
        if self._products is not None and self._form.adapter is not None:
            self._products.add(index, self._form.adapter(kept.work, parts["tensors"]), weight)
        parts["tensors"] = kept.common or self._form.common(kept.work, parts["tensors"])
        flat = {f"{name}/{key}": value for name, part in parts.items() for key, value in part.items()}
        self._mean.add(index, flat, weight)
        self._done.add(client)
        _strip(kept)


def _strip(kept: Kept) -> None:
    """Leave of a reply what is small."""
    kept.reply, kept.common = replace(kept.reply, tensors={}, statistics={}, extras={}), {}
