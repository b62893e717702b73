"""Which clients there are, under which node ids, and who takes part in a round."""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from logging import INFO, WARNING

from flwr.app import Message
from flwr.common.logger import log
from flwr.serverapp import Grid

from fedloru_flwr import wire
from fedloru_flwr.lowrank import choose
from fedloru_flwr.strategies.receiving import is_in_memory

_POLL_SECONDS = 0.2
_SETTLE_SECONDS = 1.0
_SIMULATION_PATIENCE_SECONDS = 30.0


class RosterError(RuntimeError):
    """The clients that were expected are not there, or are not who they should be."""


def participants(total: int, fraction: float, at_least: int) -> int:
    """``floor(fraction * total)``, but at least ``at_least`` and one, at most ``total``; 0 where the fraction is 0."""
    if fraction == 0.0:
        return 0
    return min(total, max(math.floor(fraction * total + 1e-9), at_least, 1))


class Roster:
    """Maps logical clients to the nodes they run on.

    A client's identity comes from its answer to an enrolment query, or from its first reply where the app does not
    answer queries. Until then it goes by the order in which nodes registered, in a simulation its partition id.
    """

    def __init__(self) -> None:
        self._client_of: dict[int, str] = {}
        self._confirmed: set[int] = set()
        self._budgets: dict[str, int] = {}
        self._names: set[str] = set()
        self._restored = False

    def budget(self, client: str) -> int:
        """The largest rank that a client has said it can train; 0 for any."""
        return self._budgets.get(client, 0)

    def is_confirmed(self, client: str) -> bool:
        """Whether a node has said that it is this client."""
        return client in self._names

    def is_sure(self, node_ids: Iterable[int]) -> bool:
        """Whether all these nodes have said who they are."""
        return self._confirmed.issuperset(node_ids)

    def known(self) -> tuple[dict[str, int], dict[str, int]]:
        """The nodes and the rank budgets of the clients that have said who they are, by name, for `restore`."""
        nodes = {self._client_of[node_id]: node_id for node_id in sorted(self._confirmed)}
        return nodes, {client: rank for client, rank in self._budgets.items() if rank}

    def restore(self, nodes: Mapping[str, int], budgets: Mapping[str, int]) -> None:
        """Take up what an earlier life of the run knew; a client that is under a new node now says so itself."""
        self._client_of = {node_id: client for client, node_id in nodes.items()}
        self._confirmed, self._names = set(self._client_of), set(nodes)
        self._budgets = dict(budgets)
        self._restored = True

    def __len__(self) -> int:
        return len(self._client_of)

    def client(self, node_id: int) -> str:
        """The client that runs on this node."""
        return self._client_of.get(node_id, f"node-{node_id}")

    def wait(self, grid: Grid, expected: int | None, at_least: int, timeout: float) -> None:
        """Wait until all expected nodes are connected, or, without a number, until no more are coming.

        Flower starts the server's app before its nodes are registered, so that a strategy that looks at once
        sees few of them or none.

        Raises:
            RosterError: if they do not come in time.
        """
        start = last_change = last_word = time.monotonic()
        count = -1
        patience = min(timeout, _SIMULATION_PATIENCE_SECONDS) if is_in_memory(grid) else timeout
        patience = 0.0 if getattr(grid, "complete", False) else patience
        while True:
            now = time.monotonic()
            online = len(set(grid.get_node_ids()))
            if online != count:
                count, last_change = online, now
            if expected is not None and count >= expected:
                return
            if expected is None and count >= max(at_least, 1) and now - last_change >= _SETTLE_SECONDS:
                return
            wanted = expected if expected is not None else max(at_least, 1)
            if now - start > patience:
                if count >= wanted:
                    return  # nodes come and go without pause
                raise RosterError(
                    f"{count} of {wanted} SuperNodes are connected after {patience:.0f} s. Start the others, or set "
                    "num-clients to the number of SuperNodes (in a simulation num-supernodes of the connection, in "
                    "your own app num_clients or min_available_nodes of the strategy)"
                )
            if now - last_word > 10:
                log(INFO, "waiting for SuperNodes: %d of %d connected", count, wanted)
                last_word = now
            time.sleep(_POLL_SECONDS)

    def refresh(self, grid: Grid) -> list[int]:
        """Learn of the nodes that are online now and return those not seen before."""
        nodes = sorted(grid.get_nodes(), key=lambda node: (str(node.registered_at), node.node_id))
        if self._restored:
            # Of an earlier life's nodes those that are here; the others may have given way to new ones.
            gone = self._confirmed - {node.node_id for node in nodes}
            self._confirmed -= gone
            for node_id in gone:
                self._names.discard(self._client_of.pop(node_id))
            self._restored = False
        new = [node.node_id for node in nodes if node.node_id not in self._client_of]
        taken = set(self._client_of.values())
        for position, node in enumerate(nodes):
            if node.node_id not in self._client_of:
                provisional = str(position)
                self._client_of[node.node_id] = provisional if provisional not in taken else f"node-{node.node_id}"
        self._online = {node.node_id for node in nodes}
        return new

    def enrol(
        self, grid: Grid, node_ids: Sequence[int], timeout: float, count: Callable[[str, Message, Message | None], None]
    ) -> None:
        """Ask the nodes who they are.

        The first time, a node that cannot take part ends the run; later on it is only warned of, and left out as long
        as it cannot: a client that has come back may be listed under its old node id for a while.

        Args:
            grid: to ask through.
            node_ids: whom to ask.
            timeout: seconds to wait.
            count: called with client, query and reply (None if there was no good one), for the bill.

        Raises:
            RosterError: the first time, if two nodes give one identity, or a node speaks another protocol.
        """
        first = not self._confirmed
        queries = {node_id: Message(wire.enrolment_query(), node_id, "query") for node_id in node_ids}
        replies = {r.metadata.src_node_id: r for r in grid.send_and_receive(list(queries.values()), timeout=timeout)}
        for node_id, query in queries.items():
            reply = replies.get(node_id)
            if reply is None or reply.has_error():
                reason = "no reply" if reply is None else wire.error_reason(reply)
                if "No query function registered" not in reason:
                    log(WARNING, "node %d did not enrol: %s", node_id, reason)
                count(self.client(node_id), query, None)
                continue
            try:
                enrolment = wire.read_enrolment(reply.content)
                self.confirm(node_id, enrolment.client)
                self._budgets[enrolment.client] = enrolment.rank
            except (wire.WireError, RosterError) as error:
                told = f"node {node_id} cannot take part: {error}"
                if first:
                    raise RosterError(told) from error
                log(WARNING, "%s", told)
            count(self.client(node_id), query, reply)

    def confirm(self, node_id: int, client: str) -> None:
        """Note the identity a node has given.

        Raises:
            RosterError: if another node that is online gave the same one, or this one has given another.
        """
        if node_id in self._confirmed:
            known = self._client_of[node_id]
            if known != client:
                raise RosterError(f"its SuperNode is client {known!r}, and now says it is client {client!r}")
            return
        for other, name in list(self._client_of.items()):
            if name != client or other == node_id:
                continue
            if other in self._confirmed and other in self._online:
                raise RosterError(
                    f"two SuperNodes ({other} and {node_id}) say they are client {client!r}: give each its own "
                    "client-id (or partition-id) in its node config"
                )
            if other in self._confirmed:
                del self._client_of[other]  # the same client has come back under a new node id
                self._confirmed.discard(other)
            else:
                self._client_of[other] = f"node-{other}"
        self._client_of[node_id] = client
        self._confirmed.add(node_id)
        self._names.add(client)

    def draw(self, seed: int, phase: str, server_round: int, fraction: float, at_least: int) -> list[tuple[str, int]]:
        """Draw this round's participants among the clients online, by logical client, sorted by it."""
        node_of = {self._client_of[node_id]: node_id for node_id in sorted(self._online)}
        count = participants(len(node_of), fraction, at_least)
        drawn = choose(seed, "participants", phase, server_round, items=list(node_of), count=count)
        return [(client, node_of[client]) for client in drawn]
