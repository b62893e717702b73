"""Replies taken from a grid one after the other, so that nobody has to hold all of them."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from flwr.app import Message
from flwr.serverapp import Grid

_WINDOW_BYTES = 256 * 2**20
_FEWEST, _MOST = 4, 64
_POLL_SECONDS = 3.0  # Flower's, for a SuperLink


class StreamingGrid(Protocol):
    """A grid that can hand out replies as they finish."""

    def send_and_stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Send messages and give each reply as soon as it is there; end when all are, or when time is up."""


def receive(
    grid: Grid, messages: Sequence[Message], turn: Sequence[int], size: int, timeout: float
) -> Iterator[Message]:
    """Send messages and give each reply that comes in time, in any order.

    From Flower's own grids replies are pulled in a window: those to the first messages, by ``turn``, that are without
    one yet. Flower keeps the others meanwhile. When time is up, those that are there are still taken. A grid that has
    `StreamingGrid.send_and_stream` is asked for it; any other one is asked for all replies at once, which are let go of
    one by one.

    Args:
        grid: to send through.
        messages: in the order in which they are sent.
        turn: their indices in the order in which their replies are wanted.
        size: about how many bytes a reply has.
        timeout: in seconds.
    """
    if _is_flowers_own(grid):
        return _pull(grid, messages, turn, max(_FEWEST, min(_MOST, _WINDOW_BYTES // max(1, size))), timeout)
    if _overrides(grid, "send_and_stream", "send_and_receive"):
        return grid.send_and_stream(messages, timeout=timeout)  # type: ignore[attr-defined,no-any-return]
    return _let_go(list(grid.send_and_receive(messages, timeout=timeout)))


def is_in_memory(grid: Grid) -> bool:
    """Whether it is the grid of Flower's simulation."""
    return _flowers_own(grid, "InMemoryGrid") is not None


def _is_flowers_own(grid: Grid) -> bool:
    """Whether it sends and receives as Flower does, by pushing and pulling."""
    kind = _flowers_own(grid, "InMemoryGrid", "HttpGrid")
    return kind is not None and type(grid).send_and_receive is kind.send_and_receive


def _flowers_own(grid: Grid, *names: str) -> type[Grid] | None:
    """The class of one of these names in Flower's SuperLink that the grid is of; to import them would take seconds."""
    kinds = type(grid).__mro__
    return next((k for k in kinds if k.__name__ in names and k.__module__.startswith("flwr.superlink.grid")), None)


def _overrides(grid: Grid, name: str, other: str) -> bool:
    """Whether the grid has a method, and not in a class that a more special one's other method stands in for."""
    first = next((kind for kind in type(grid).__mro__ if name in vars(kind) or other in vars(kind)), object)
    return name in vars(first)


def _let_go(replies: list[Message]) -> Iterator[Message]:
    replies.reverse()
    while replies:
        yield replies.pop()


def _pull(
    grid: Grid, messages: Sequence[Message], turn: Sequence[int], window: int, timeout: float
) -> Iterator[Message]:
    end = time.monotonic() + timeout
    pushed = set(grid.push_messages(messages)) - {None}
    known = [messages[index].metadata.message_id for index in turn]
    waiting = deque(message_id for message_id in known if message_id in pushed)
    waiting.extend(sorted(pushed.difference(known)))
    asked: list[str] = []
    while asked or waiting:
        late = time.monotonic() >= end
        if late and not timeout > 0:
            return
        while waiting and len(asked) < window:
            asked.append(waiting.popleft())
        replies = _let_go(list(grid.pull_messages(list(asked))))
        came = set()
        for reply in replies:
            came.add(reply.metadata.reply_to_message_id)
            yield reply
            del reply
        asked = [message_id for message_id in asked if message_id not in came]
        if late:
            asked = []  # their time is up; whether others have come is still to be asked
        elif asked and not (came and waiting):
            time.sleep(min(getattr(grid, "pull_interval", _POLL_SECONDS), max(0.0, end - time.monotonic())))
