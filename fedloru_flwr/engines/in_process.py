"""The same ServerApp and ClientApp in one Python process: no Ray, no ports, breakpoints work.

::

    run_in_process(server_app, client_app, num_supernodes=100, run_config={"learning-rate": 0.1})
"""

import itertools
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from fedloru_flwr.environment import STORE

Request = tuple[Message, Context]
Together = Callable[[list[Request]], list[Message | Exception | None]]
UserConfig = Mapping[str, bool | int | float | str]
_SERVER_NODE = 1
_RUN = 1
_FEW = 32  # fewer clients than this, where they fit one batch, are not worth dividing
FIRST_NODE = 1000


class VirtualGrid(Grid):
    """A grid of virtual clients that are all there from the start; what its kinds have in common.

    Attributes:
        on_reply: called at every client's reply.
        at_once: how many clients are one share at most; see `shares`.
    """

    at_once: int
    complete = True  # no more nodes will come: a strategy need not wait for them

    def __init__(self) -> None:
        self.on_reply: Callable[[], None] = lambda: None
        self._replies: dict[str, Message] = {}

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as ``flwr.app.Message`` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes, in the order of their partition ids."""
        return [NodeInfo(node_id=node_id, registered_at=f"{node_id:020d}") for node_id in self.get_node_ids()]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies to these messages."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]


_ids = itertools.count(1)


def named(messages: Iterable[Message]) -> list[Message]:
    """The messages, each with an id of its own in this process."""
    messages = list(messages)
    for message in messages:
        message.metadata.__dict__["_message_id"] = str(next(_ids))
    return messages


class InProcessGrid(VirtualGrid):
    """A grid whose nodes are contexts in this process; messages are handled one after the other, as they are sent.

    Each node keeps its ``Context.state`` between messages, as in a simulation. A client app that raises gives an error
    reply with the exception's text.

    Args:
        client_app: handles the messages.
        num_supernodes: number of nodes; node ``i`` has ``partition-id`` ``i``.
        run_config: for every context.
        node_configs: one a node, instead of ``partition-id`` and ``num-partitions``.
        together: handles the messages that are sent together, as one: the reply to each, the exception it ended in, or
            None for what the client app has to handle.
        at_once: how many of them at most; see `shares`.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        run_config: UserConfig,
        node_configs: list[UserConfig] | None = None,
        together: Together | None = None,
        at_once: int = 25,
    ) -> None:
        super().__init__()
        self._app = client_app
        self._handle_together = together
        self.at_once = at_once
        nodes = range(FIRST_NODE, FIRST_NODE + len(node_configs or range(num_supernodes)))
        self._contexts = {
            node_id: _context(node_id, node_configs[index], run_config)
            if node_configs
            else client_context(node_id, num_supernodes, run_config)
            for index, node_id in enumerate(nodes)
        }

    def set_run(self, run: Any) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Run:
        """A run with nothing but its id, which legacy ServerApps ask for."""
        return Run.create_empty(_RUN)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes' ids."""
        return list(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Handle the messages at once and keep the replies."""
        messages = named(messages)
        for reply in self._stream(messages):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in messages]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Handle the messages and return the replies, in the order sent."""
        return self.pull_messages(self.push_messages(messages))

    def send_and_stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterator[Message]:
        """Handle the messages, share by share, and give each reply as soon as its share is done, in the order sent."""
        return self._stream(named(messages))

    def _stream(self, messages: Sequence[Message]) -> Iterator[Message]:
        there = [message for message in messages if message.metadata.dst_node_id in self._contexts]
        replies = self._answers([(message, self._contexts[message.metadata.dst_node_id]) for message in there])
        for message in messages:
            if message.metadata.dst_node_id in self._contexts:
                reply = next(replies)
            else:
                reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
            self.on_reply()
            yield reply

    def _answers(self, requests: Sequence[Request]) -> Iterator[Message]:
        """The replies to messages that are sent together, in order."""
        for part in shares(len(requests), self.at_once):
            yield from self._answer_share(requests[part])

    def _answer_share(self, requests: Sequence[Request]) -> Iterator[Message]:
        return answers(lambda message, _: self._handle(message), requests, self._handle_together)

    def _handle(self, message: Message) -> Message:
        """The reply to one message."""
        return handle(self._app, message, self._contexts[message.metadata.dst_node_id])


def shares(count: int, at_once: int) -> list[slice]:
    """Divide so many clients into shares of about equal size, each to be trained as one batch.

    A client's last bits depend on whom it is trained with. So the shares are the same however many processes or hosts
    there are to train them: where one batch will not do, an even number.

    Args:
        count: number of clients.
        at_once: largest share.
    """
    number = -(-count // at_once)
    if number > 1 or count >= _FEW:
        number = min(number + number % 2, count)
    return [slice(count * i // number, count * (i + 1) // number) for i in range(number)]


def answers(
    alone: Callable[[Message, Context], Message], requests: Sequence[Request], together: Together | None = None
) -> Iterator[Message]:
    """Handle messages of clients that live in this process, one after the other or as one; replies in order.

    Args:
        alone: handles what is not handled as one, see `handle`.
        requests: the messages, each with its client's context.
        together: see `InProcessGrid`.
    """
    early: list[Message | Exception | None] = [None] * len(requests)
    if together is not None and len(requests) > 1:
        early = together(list(requests))
    for (message, context), reply in zip(requests, early, strict=True):
        if reply is None:
            yield alone(message, context)
        else:
            yield error_reply(reply, message) if isinstance(reply, Exception) else reply


def handle(app: ClientApp, message: Message, context: Context) -> Message:
    """The app's reply to a message; what it raises becomes an error reply, as in Flower."""
    # The app gets records of its own: what it changes in them must not reach the next client.
    records = {key: type(record)(dict(record)) for key, record in message.content.items()}  # type: ignore[arg-type]
    own = copy(message)
    own.content = RecordDict(records)
    try:
        return app(own, context)
    except Exception as error:
        return error_reply(error, message)


def client_context(node_id: int, num_clients: int, run_config: UserConfig) -> Context:
    """The context of a virtual client; client ``i`` is node ``1000 + i`` and has ``partition-id`` ``i``."""
    config: UserConfig = {"partition-id": node_id - FIRST_NODE, "num-partitions": num_clients}
    return _context(node_id, config, run_config)


def _context(node_id: int, node_config: UserConfig, run_config: UserConfig) -> Context:
    return Context(
        run_id=_RUN,
        node_id=node_id,
        node_config=dict(node_config),
        state=RecordDict(),
        run_config=dict(run_config),
    )


def error_reply(error: Exception, message: Message) -> Message:
    """The reply of a client whose app has raised."""
    reason = f"{type(error)}:<'{error}'>"  # as on a deployed client
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def run_in_process(
    server_app: ServerApp,
    client_app: ClientApp,
    *,
    num_supernodes: int,
    run_config: UserConfig | None = None,
    node_configs: list[UserConfig] | None = None,
    store_dir: Path | None = None,
    together: Together | None = None,
    at_once: int = 25,
) -> None:
    """Run a ServerApp and a ClientApp in this process.

    Args:
        server_app: any; its exceptions are raised here.
        client_app: any.
        num_supernodes: number of clients.
        run_config: for the server's and the clients' contexts.
        node_configs: see `InProcessGrid`.
        store_dir: where clients keep bases and entries; a temporary directory by default.
        together: see `InProcessGrid`.
        at_once: see `InProcessGrid`.
    """
    with store_at(store_dir):
        grid = InProcessGrid(client_app, num_supernodes, run_config or {}, node_configs, together, at_once)
        serve(server_app, grid, run_config or {})


def serve(server_app: ServerApp, grid: Grid, run_config: UserConfig) -> None:
    """Run a ServerApp on a grid in this process."""
    context = Context(
        run_id=_RUN, node_id=_SERVER_NODE, node_config={}, state=RecordDict(), run_config=dict(run_config)
    )
    with _task_identity():
        server_app(grid, context)


@contextmanager
def _task_identity() -> Iterator[None]:
    """Flower's messages want to know the task they are made in."""
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, _RUN, _SERVER_NODE
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@contextmanager
def store_at(directory: Path | None) -> Iterator[dict[str, str]]:
    """Have clients keep what they hold in a directory, by default a temporary one; yield the variables that say so."""
    before = os.environ.get(STORE)
    with tempfile.TemporaryDirectory(prefix="fedloru-") as temporary:
        variables = {STORE: str(directory or temporary)}
        os.environ |= variables
        try:
            yield variables
        finally:
            if before is None:
                del os.environ[STORE]
            else:
                os.environ[STORE] = before
