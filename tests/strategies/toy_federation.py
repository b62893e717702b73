"""A small federation in one process, whose every message can be watched, delayed, tampered with or withheld."""

import contextlib
import hashlib
import json
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from torch import nn
from torch.nn import functional

from fedloru_flwr import wire
from fedloru_flwr.clients import LowRankSession, client_identity, session
from fedloru_flwr.engines.in_process import InProcessGrid

RATE, STEPS = 0.2, 2


class Mlp(nn.Module):
    """``hidden`` is factorised in most tests, ``head`` and the biases are dense leaves."""

    shape = (12,)

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(12, 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x)))


class ConvNet(nn.Module):
    """Convolution, batch normalisation, biases; the names are not in alphabetical order."""

    shape = (1, 4, 4)

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.hidden = nn.Linear(32, 12)
        self.after = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        x = functional.max_pool2d(torch.relu(self.norm(self.stem(x))), 2)
        return self.head(torch.relu(self.after(self.hidden(x.flatten(1)))))


def seeded(net, seed=3):
    """A factory whose models do not depend on the run's seed."""

    def factory():
        torch.manual_seed(seed)
        return net()

    factory.shape = net.shape
    return factory


def samples(client, shape):
    """The client's own data, of another number of examples than the others'."""
    generator = torch.Generator().manual_seed(100 + client)
    count = 4 + 3 * client
    return torch.randn(count, *shape, generator=generator), torch.randint(3, (count,), generator=generator)


def descend(model, inputs, labels, steps=STEPS, rate=RATE):
    """A user's own loop."""
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(steps):
        loss = functional.cross_entropy(model(inputs), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


@dataclass
class Look:
    """What a client saw of one training message."""

    server_round: int
    client: str
    base: dict
    outputs: torch.Tensor


def client_app(
    net, *, shape=None, rate=RATE, seen=None, tamper=None, before=None, query=False, evaluates=True, mods=()
):
    """An app around `LowRankSession`; ``net`` is a model source or a function of the partition marked ``by_client``."""
    app = ClientApp()
    shape = shape or net.shape

    def source(context):
        return net(context) if getattr(net, "by_client", False) else net

    @app.train(mods=list(mods))
    def train(message, context):
        if before is not None and (instead := before(message, context)) is not None:
            return instead
        low_rank = LowRankSession(source(context), message, context)
        partition = int(context.node_config["partition-id"])
        inputs, labels = samples(partition, shape)
        if seen is not None:
            with torch.no_grad():
                low_rank.model.eval()
                outputs = low_rank.model(samples(7, shape)[0]).clone()
                low_rank.model.train()
            base = {name: tensor.clone() for name, tensor in low_rank._adapted.read_base().items()}
            seen.append(Look(low_rank.server_round, low_rank.client, base, outputs))
        losses = [descend(low_rank.model, inputs, labels, steps, rate) for steps in low_rank.phases(STEPS)]
        reply = low_rank.reply({"train_loss": losses[0], "num-examples": len(labels)})
        return reply if tamper is None else tamper(reply, low_rank)

    if evaluates:

        @app.evaluate()
        def evaluate(message, context):
            if before is not None and (instead := before(message, context)) is not None:
                return instead
            low_rank = LowRankSession(source(context), message, context)
            inputs, labels = samples(int(context.node_config["partition-id"]), shape)
            metrics = {}
            with torch.no_grad():
                for prefix, model in low_rank.models():
                    metrics[f"{prefix}loss"] = functional.cross_entropy(model(inputs), labels)
            return low_rank.reply({**metrics, "num-examples": len(labels)})

    if query:

        @app.query()
        def enrol(message, context):
            told = wire.Enrolment(client_identity(context), "test", context.node_config.get("max-rank", 0))
            return Message(wire.enrolment_reply(message.content, told), reply_to=message)

    return app


def own_instances(net, count, seed=50, step=1):
    """Every client has an instance of its own, with initial weights of its own (or, with step 0, all the same)."""
    instances = [seeded(net, seed + step * index)() for index in range(count)]

    def of(context):
        return instances[int(context.node_config["partition-id"])]

    of.by_client, of.shape = True, net.shape
    return of


def serialised(content):
    """The bytes of a content, each object once, counted by deflating everything in it."""
    sizes = {}

    def visit(part):
        data = part.deflate()
        sizes[hashlib.sha256(data).hexdigest()] = len(data)
        for child in (part.children or {}).values():
            visit(child)

    visit(content)
    return sum(sizes.values())


@dataclass
class Passed:
    """A message that passed through the grid."""

    server_round: int
    node: int
    phase: str
    kind: str
    header: dict
    entries: int
    size: int
    reply_size: int


@dataclass
class Watch:
    """An observer that knows the round, for the grid."""

    server_round: int = 1
    rows: list = field(default_factory=list)
    at_end: Callable = lambda row: None
    drawn: list = field(default_factory=list)

    def start_round(self, server_round, num_clients):
        self.drawn.append(num_clients)

    def end_round(self, row):
        self.rows.append(dict(row))
        self.server_round = row["round"] + 1
        self.at_end(row)


class WatchedGrid(InProcessGrid):
    """Notes what passes; runs each message in a process memory of choice; hides nodes; gives replies in any order."""

    complete = False  # its nodes come and go

    def __init__(self, app, count, *, node_configs=None, watch=None, actor=None, present=None, shuffle=None):
        super().__init__(app, count, {}, node_configs)
        self.watch = watch or Watch()
        self.actor = actor
        self.present = present or (lambda server_round: None)
        self.shuffle = shuffle
        self.passed: list[Passed] = []
        self.actors: dict = {}

    def visible(self):
        chosen = self.present(self.watch.server_round)
        return [node for i, node in enumerate(self._contexts) if chosen is None or i in chosen]

    def get_node_ids(self):
        return self.visible()

    def get_nodes(self):
        visible = set(self.visible())
        return [node for node in super().get_nodes() if node.node_id in visible]

    def send_and_receive(self, messages, *, timeout=None):
        replies = list(super().send_and_receive(messages, timeout=timeout))
        if self.shuffle is not None:
            self.shuffle.shuffle(replies)
        return replies

    def _handle(self, message):
        if self.actor is not None:
            session._hosted = self.actors.setdefault(self.actor(message), OrderedDict())
        size = serialised(message.content)
        config = next(iter(message.content.config_records.values()))
        reply = super()._handle(message)
        header = json.loads(config[wire.HEADER])
        entries = len(config.get(wire.ENTRIES, b""))
        reply_size = serialised(reply.content) if reply.has_content() else 0
        phase, node = message.metadata.message_type, message.metadata.dst_node_id - 1000
        kind = header["kind"]
        self.passed.append(Passed(self.watch.server_round, node, phase, kind, header, entries, size, reply_size))
        return reply

    def to(self, node, server_round=None):
        """What was sent to a node."""
        return [p for p in self.passed if p.node == node and server_round in (None, p.server_round)]


@contextlib.contextmanager
def task():
    """Flower's messages want to know the task they are made in."""
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
    hosted = session._hosted
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before
        session._hosted = hosted


def federate(strategy, grid, rounds, *, store=None, evaluate_fn=None, **arguments):
    """Run a strategy on a grid, with a store of its own, and return the result and the rows."""
    strategy.books.observer = strategy.books.observer or grid.watch
    with tempfile.TemporaryDirectory() as temporary, task(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDLORU_STORE", str(store or temporary))
        return strategy.start(grid, strategy.initial_arrays(), rounds, evaluate_fn=evaluate_fn, **arguments)


def own_machines(directory, count, **more):
    """Node configs that give every client a store of its own."""
    return [{"partition-id": i, "store-path": str(Path(directory) / str(i)), **more} for i in range(count)]


def each_its_own(message):
    """Process memory by node."""
    return message.metadata.dst_node_id


def timeless(rows):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def same(one, other):
    """Whether two dicts of tensors are equal bit for bit."""
    return list(one) == list(other) and all(torch.equal(one[key], other[key]) for key in one)


def usual(**more):
    """Arguments most tests share."""
    return {"num_clients": 4, "min_available_nodes": 1, "min_train_nodes": 1, "fraction_evaluate": 0.0, **more}


def set_header(content, **changes):
    config = next(iter(content.config_records.values()))
    config[wire.HEADER] = json.dumps({**json.loads(config[wire.HEADER]), **changes})
