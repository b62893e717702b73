"""Few SuperNodes that host many clients each: what the strategies see is a node for every client.

In a simulation with fewer SuperNodes than clients, each SuperNode trains a share of a round's clients as one batch. The
orders for a share travel as one Flower message, and so do the replies; the strategies judge, count and average the
messages that every client by itself would have sent and received.
"""

import os
import time
from collections.abc import Iterable
from logging import INFO
from typing import Any

from flwr.app import Error, Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedloru_flwr.engines.in_process import FIRST_NODE, VirtualGrid, named, shares
from fedloru_flwr.environment import SUPERNODES
from fedloru_flwr.packets import ACTION, Packet, pack_orders, unpack_replies
from fedloru_flwr.strategies.receiving import is_in_memory
from fedloru_flwr.wire import WireError

_SETTLE_SECONDS = 1.0
_PATIENCE_SECONDS = 30.0
_POLL_SECONDS = 0.05


class HostedGrid(VirtualGrid):
    """A grid with a node for every client, over one whose nodes host them.

    Args:
        grid: Flower's.
        hosts: the ids of its nodes.
        num_clients: client ``i`` is node ``1000 + i`` and has ``partition-id`` ``i``.
        at_once: how many clients are trained as one batch at most.
    """

    simulated = True

    def __init__(self, grid: Grid, hosts: list[int], num_clients: int, at_once: int) -> None:
        super().__init__()
        self._grid = grid
        self._hosts = sorted(hosts)
        self._num_clients = num_clients
        self.at_once = at_once

    def set_run(self, run: Any) -> None:
        """Flower's own."""
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        """Flower's own."""
        return self._grid.run

    def get_node_ids(self) -> Iterable[int]:
        """The clients' ids."""
        return range(FIRST_NODE, FIRST_NODE + self._num_clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send the messages and wait for the replies."""
        messages = list(messages)
        for reply in self.send_and_receive(messages):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in messages]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send the messages to the hosts and return the replies, in the order sent."""
        messages = named(messages)
        sent: dict[int, tuple[Message, list[list[Message]]]] = {}
        parts = [messages[part] for part in shares(len(messages), self.at_once)] if messages else []
        for host, node_id in enumerate(self._hosts):
            own = parts[len(parts) * host // len(self._hosts) : len(parts) * (host + 1) // len(self._hosts)]
            if own:
                kind = f"{messages[0].metadata.message_type}.{ACTION}"
                packet = pack_orders([message for part in own for message in part], [len(part) for part in own])
                sent[node_id] = Message(packet.to_record_dict(), node_id, kind), own
        received = self._grid.send_and_receive([message for message, _ in sent.values()], timeout=timeout)
        replies: dict[str, Message] = {}
        # For a host that is gone the SuperLink replies, as itself.
        by_message = {message.metadata.message_id: node_id for node_id, (message, _) in sent.items()}
        for reply in received:
            told = reply.metadata
            node_id = told.src_node_id if told.src_node_id in sent else by_message.get(told.reply_to_message_id, -1)
            if node_id in sent:
                asked = [message for part in sent[node_id][1] for message in part]
                for one in _unpacked(reply, asked):
                    replies[one.metadata.reply_to_message_id] = one
                    self.on_reply()
        return [replies[message.metadata.message_id] for message in messages if message.metadata.message_id in replies]


def _unpacked(reply: Message, asked: list[Message]) -> list[Message]:
    """What a host's clients say; what goes wrong with the host goes wrong with each of them."""
    if reply.has_error():
        error = reply.error
        return [Message(Error(error.code, error.reason), reply_to=message) for message in asked]
    try:
        return unpack_replies(Packet.from_record_dict(reply.content), asked)
    except WireError as error:
        return [Message(Error(0, str(error)), reply_to=message) for message in asked]


def hosted(grid: Grid, num_clients: int, at_once: int) -> Grid:
    """The grid itself, or, in a simulation with fewer SuperNodes than clients, one that has a node for every client.

    Args:
        grid: Flower's.
        num_clients: number of clients.
        at_once: how many clients are trained as one batch at most.
    """
    if not is_in_memory(grid):
        return grid
    # Flower's own is 0.1 s, of which every phase costs one.
    grid.pull_interval = _POLL_SECONDS / 2  # type: ignore[attr-defined]  # it is an InMemoryGrid
    expected = int(os.environ.get(SUPERNODES, "0")) or num_clients
    nodes: list[int] = []
    changed = time.monotonic()
    while True:
        there = list(grid.get_node_ids())
        if len(there) >= expected:
            break
        now = time.monotonic()
        if len(there) != len(nodes):
            changed = now
        elif now - changed >= (_SETTLE_SECONDS if there else _PATIENCE_SECONDS):
            break
        nodes = there
        time.sleep(_POLL_SECONDS)
    if not there or len(there) >= num_clients:
        return grid
    log(INFO, "%d SuperNodes host %d clients, up to %d trained as one batch", len(there), num_clients, at_once)
    return HostedGrid(grid, there, num_clients, at_once)
