"""Orders brought to clients, each with what that client lacks, and the bill for it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from logging import WARNING

from flwr.app import ArrayRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedloru_flwr import wire
from fedloru_flwr.coding import Follow, Parcel
from fedloru_flwr.lowrank import Entry, place_of
from fedloru_flwr.strategies.receiving import receive
from fedloru_flwr.strategies.state import ServerState

_MOST_ANSWERS = 2  # that a client may give before it trains: it needs a base, and what the Trainables are told from
PURPOSES = ("trainables", "control", "entries", "base", "repeats", "evaluation", "enrolment")


def in_turn(client: str) -> tuple[int, str]:
    """Sorts clients by their places, see `place_of`."""
    return place_of(client), client


class Bill:
    """Bytes by direction and purpose, as if every client were a machine of its own."""

    def __init__(self) -> None:
        self._bytes: Counter[tuple[str, str]] = Counter()

    def add(self, direction: str, purpose: str, count: int) -> None:
        """Count bytes sent ``"up"`` or ``"down"``."""
        self._bytes[direction, purpose] += count

    def message(self, direction: str, purpose: str, message: Message) -> None:
        """Count a message's content."""
        self.add(direction, purpose, wire.content_bytes(message.content))

    def total(self, direction: str) -> int:
        """All bytes of a direction."""
        return sum(count for (way, _), count in self._bytes.items() if way == direction)

    def by_purpose(self) -> dict[str, dict[str, int]]:
        """``{purpose: {"up": bytes, "down": bytes}}`` for every purpose that occurred."""
        return {
            purpose: {way: self._bytes[way, purpose] for way in ("up", "down")}
            for purpose in PURPOSES
            if self._bytes["up", purpose] or self._bytes["down", purpose]
        }


class Orders:
    """One phase's orders: completes the inner strategy's content to each client's needs, and sends it.

    Args:
        template: the content that the inner strategy would send to all.
        phase: ``"train"`` or ``"evaluate"``.
        state: what the clients are to be brought to.
        settings: what they need to make the same plan.
        held: the lineage that each client is believed to hold (the root's where it is not there; empty for none);
            brought up to date as clients answer.
        bill: what is sent and received goes on it.
        assign: gives each client what it is to do, the arrays for it and, where they are coded, what they hold.
        lost: told of a client that does not hold what it was believed to hold of the Trainables.
        extras: what else the method sends to everybody, serialised.
    """

    def __init__(
        self,
        template: RecordDict,
        phase: str,
        state: ServerState,
        settings: wire.Settings,
        held: dict[str, str],
        bill: Bill,
        assign: Callable[[str], tuple[wire.Work, ArrayRecord, Parcel | Follow | None]],
        lost: Callable[[str], None],
        extras: bytes = b"",
    ) -> None:
        self._assign = assign
        self._lost = lost
        self._extras = extras
        self._array_bytes: dict[int, int] = {}
        self._entry_bytes: dict[int, bytes] = {}
        self._template = template
        self._phase = phase
        self._purpose = "trainables" if phase == "train" else "evaluation"
        self._state = state
        self._settings = settings
        self._held = held
        self._bill = bill
        self._made: dict[object, tuple[RecordDict, int, int]] = {}

    def deliver(
        self, grid: Grid, node_of: Mapping[str, int], deadline: float, *, repeat: bool = False
    ) -> Iterator[tuple[str, Message]]:
        """Send the orders, serve the clients that lack the base, and give each one's last reply, if it gave one.

        A client that cannot reach the lineage says at once what it holds; it is sent what it needs and asked again.

        Args:
            grid: to send through.
            node_of: the clients' nodes.
            deadline: by the monotonic clock.
            repeat: they have been asked this round, and are to answer once more.
        """
        pending = dict(node_of)
        for attempt in range(_MOST_ANSWERS + 1):
            wanting: dict[str, Message] = {}
            for client, reply in self._send(grid, pending, deadline, repeat=repeat or attempt > 0):
                if (answer := wire.find_answer(reply)) is None:
                    yield client, reply
                    continue
                if answer.kind == "need-whole":
                    self._lost(client)
                else:
                    self._held[client] = answer.held
                wanting[client] = reply
            pending = {client: node for client, node in node_of.items() if client in wanting}
            if not pending:
                return
        yield from wanting.items()

    def _send(
        self, grid: Grid, node_of: Mapping[str, int], deadline: float, *, repeat: bool = False
    ) -> Iterator[tuple[str, Message]]:
        """Send everybody what it lacks, then the order."""
        supplies = {client: supply for client in node_of if (supply := self._supply(client)) is not None}
        replies = dict(self._send_all(grid, supplies, node_of, deadline))
        ready = dict(node_of)
        for client in supplies:
            answer = wire.find_answer(replies[client]) if client in replies else None
            if answer is not None and answer.kind == "stored":
                self._held[client] = self._state.ledger.lineage
                del replies[client]
            else:
                ready.pop(client)
        purpose = "repeats" if repeat else self._purpose
        contents = {}
        for client in ready:
            content, size, entries_size = self._order(client)
            self._bill.add("down", "entries", entries_size)
            self._bill.add("down", "control", len(self._extras))
            contents[client] = (content, purpose, size - entries_size - len(self._extras))
        yield from replies.items()
        yield from self._send_all(grid, contents, node_of, deadline)

    def _send_all(
        self,
        grid: Grid,
        contents: Mapping[str, tuple[RecordDict, str, int]],
        node_of: Mapping[str, int],
        deadline: float,
    ) -> Iterator[tuple[str, Message]]:
        """Send contents, each with its purpose and size, and put them and the replies on the bill."""
        if not contents:
            return
        asked: dict[str, Message] = {}
        for client, (content, purpose, size) in contents.items():
            self._bill.add("down", purpose, size)
            asked[client] = Message(content, node_of[client], self._phase)
        clients = list(asked)
        turn = sorted(range(len(clients)), key=lambda index: in_turn(clients[index]))
        size = max(size for _, _, size in contents.values())
        timeout = max(0.0, deadline - time.monotonic())
        by_node = {node_of[client]: client for client in asked}
        unheard = set(asked)
        for reply in receive(grid, list(asked.values()), turn, size, timeout):
            told = reply.metadata
            whose = by_node.get(told.src_node_id)
            if whose is None and (to := told.reply_to_message_id):
                # For a node that is gone the SuperLink replies, as itself.
                whose = next((client for client, message in asked.items() if message.metadata.message_id == to), None)
            if whose is None or whose not in unheard:
                log(WARNING, "a reply to none of this round's messages is ignored")
                continue
            unheard.remove(whose)
            purpose = contents[whose][1]
            if reply.has_content():
                try:
                    size, extras = wire.size_of(reply)
                except (ValueError, TypeError) as error:  # only where nothing is sent: an integer of 70 bits, say
                    size = extras = 0
                    reason = wire.cannot_send(error)
                    reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=asked[whose])
                self._bill.add("up", "control", extras)
                self._bill.add("up", self._purpose if purpose == "repeats" else purpose, size - extras)
            yield whose, reply

    def _missing(self, client: str) -> tuple[Entry, ...] | None:
        """The entries a client lacks; None if it needs a base."""
        ledger = self._state.ledger
        held = self._held.get(client, ledger.root)
        return ledger.missing(held) if held else None

    def _supply(self, client: str) -> tuple[RecordDict, str, int] | None:
        """What has to go ahead of the order: a base, or entries too large to ride along; with purpose and size."""
        missing = self._missing(client)
        if missing == ():
            return None
        base_size = sum(tensor.nbytes for tensor in self._state.base.values())
        entries_size = sum(entry.nbytes() for entry in missing or ())
        if missing is None or base_size < entries_size:
            return self._supply_of("base", "supply base", ())
        if entries_size > wire.INLINE_LIMIT:
            return self._supply_of("entries", f"supply {len(missing)}", missing)
        return None

    def _supply_of(self, kind: wire.SupplyKind, key: str, entries: tuple[Entry, ...]) -> tuple[RecordDict, str, int]:
        if key not in self._made:
            ledger = self._state.ledger
            content = wire.supply_content(
                kind,
                root=ledger.root,
                lineage=ledger.lineage,
                settings=self._settings,
                template=self._template,
                entries=entries,
                base=self._state.base,
            )
            self._made[key] = (content, wire.content_bytes(content), 0)
        content, size, _ = self._made[key]
        return content, kind, size

    def _order(self, client: str) -> tuple[RecordDict, int, int]:
        """The order for this client, its size, and how much of that the entries are."""
        missing = self._missing(client) or ()
        work, arrays, coded = self._assign(client)
        key = (len(missing), work, id(arrays))
        if key not in self._made:
            entries = self._entries(missing)
            ledger = self._state.ledger
            content = wire.order_content(
                self._template,
                root=ledger.root,
                lineage=ledger.lineage,
                settings=self._settings,
                arrays=arrays,
                work=work,
                entries=entries,
                statistics=self._state.statistics,
                extras=self._extras,
                coded=coded,
            )
            if id(arrays) not in self._array_bytes:
                self._array_bytes[id(arrays)] = wire.content_bytes(arrays)
            size = wire.content_bytes(content, known={id(arrays): self._array_bytes[id(arrays)]})
            self._made[key] = (content, size, len(entries))
        return self._made[key]

    def _entries(self, missing: tuple[Entry, ...]) -> bytes:
        if len(missing) not in self._entry_bytes:
            self._entry_bytes[len(missing)] = wire.entries_to_bytes(missing) if missing else b""
        return self._entry_bytes[len(missing)]
