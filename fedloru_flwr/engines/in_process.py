"""The same ServerApp and ClientApp in one Python process: no Ray, no ports, breakpoints work.

::

    run_in_process(server_app, client_app, num_supernodes=100, run_config={"learning-rate": 0.1})
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

Together = Callable[[list[tuple[Message, Context]]], list[Message | Exception | None]]
UserConfig = Mapping[str, bool | int | float | str]
_SERVER_NODE = 1
_RUN = 1


class InProcessGrid(Grid):
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
    """

    complete = True  # no more nodes will come: a strategy need not wait for them

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        run_config: UserConfig,
        node_configs: list[UserConfig] | None = None,
        together: Together | None = None,
    ) -> None:
        self._app = client_app
        self._handle_together = together
        self.on_reply: Callable[[], None] = lambda: None
        configs = node_configs or [
            {"partition-id": index, "num-partitions": num_supernodes} for index in range(num_supernodes)
        ]
        self._contexts = {
            1000 + index: Context(
                run_id=_RUN,
                node_id=1000 + index,
                node_config=dict(config),
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for index, config in enumerate(configs)
        }
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Any) -> None:
        """Nothing to set: there is one run."""

    @property
    def run(self) -> Any:
        """There is no run object without a SuperLink."""
        raise RuntimeError("an in-process grid has no Flower run")

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message, as ``flwr.app.Message`` does."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """The nodes' ids."""
        return list(self._contexts)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes, in the order of their partition ids."""
        return [NodeInfo(node_id=node_id, registered_at=f"{node_id:020d}") for node_id in self._contexts]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Handle the messages at once and keep the replies."""
        ids = []
        messages = list(messages)
        for message, early in zip(messages, self._together(messages), strict=True):
            message_id = str(uuid4())
            message.metadata.__dict__["_message_id"] = message_id
            if early is None:
                early = self._handle(message)
            self._replies[message_id] = _error_reply(early, message) if isinstance(early, Exception) else early
            ids.append(message_id)
            self.on_reply()
        return ids

    def _together(self, messages: list[Message]) -> list[Message | Exception | None]:
        """What comes of handling these messages as one; None for each that is to be handled by itself."""
        contexts = [self._contexts.get(message.metadata.dst_node_id) for message in messages]
        known = [context for context in contexts if context is not None]
        if self._handle_together is None or len(messages) < 2 or len(known) < len(contexts):
            return [None] * len(messages)
        return self._handle_together(list(zip(messages, known, strict=True)))

    def _handle(self, message: Message) -> Message:
        context = self._contexts.get(message.metadata.dst_node_id)
        if context is None:
            return Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
        # The app gets records of its own: what it changes in them must not reach the next client.
        records = {key: type(record)(dict(record)) for key, record in message.content.items()}  # type: ignore[arg-type]
        own = copy(message)
        own.content = RecordDict(records)
        try:
            return self._app(own, context)
        except Exception as error:  # whatever the app raises becomes an error reply, as in Flower
            return _error_reply(error, message)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Take the replies to these messages."""
        return [self._replies.pop(message_id) for message_id in message_ids if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Handle the messages and return the replies, in the order sent."""
        return self.pull_messages(self.push_messages(messages))


def _error_reply(error: Exception, message: Message) -> Message:
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
    """
    grid = InProcessGrid(client_app, num_supernodes, run_config or {}, node_configs, together)
    context = Context(
        run_id=_RUN, node_id=_SERVER_NODE, node_config={}, state=RecordDict(), run_config=dict(run_config or {})
    )
    with _task_identity(), _store(store_dir):
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
def _store(directory: Path | None) -> Iterator[None]:
    before = os.environ.get("FEDLORU_STORE")
    with tempfile.TemporaryDirectory(prefix="fedloru-") as temporary:
        os.environ["FEDLORU_STORE"] = str(directory or temporary)
        try:
            yield
        finally:
            if before is None:
                del os.environ["FEDLORU_STORE"]
            else:
                os.environ["FEDLORU_STORE"] = before
