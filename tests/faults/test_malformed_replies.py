"""Whatever a client replies, the round goes on, and what is not used is not used for a stated reason."""

import math
import re
import time
from collections import Counter

import pytest
import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from malformed import Malformer
from toy_federation import ConvNet, WatchedGrid, client_app, federate, seeded, set_header, task, usual

from fedloru_flwr import wire
from fedloru_flwr.strategies import FedLoRU

NET = seeded(ConvNet)
AT_ONCE = 40
METRICS = {"num-examples", "train_loss"}


class Answering(Grid):
    """Gives the replies it is told to give, whatever is asked."""

    def __init__(self):
        self.contents = {}

    def set_run(self, run):
        pass

    @property
    def run(self):
        raise RuntimeError

    def get_node_ids(self):
        return range(1000, 1000 + AT_ONCE)

    def get_nodes(self):
        return [NodeInfo(node_id=node, registered_at=f"{node:020d}") for node in self.get_node_ids()]

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def push_messages(self, messages):
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            what = self.contents[str(message.metadata.dst_node_id - 1000)]
            replies.append(Message(what if isinstance(what, Error) else copied(what), reply_to=message))
        return replies


def copied(content):
    return RecordDict({key: type(record)(dict(record)) for key, record in content.items()})


def valid_replies(server_round):
    """What well-behaved clients send in a round: statistics, control variates and all."""
    taken = {}

    def take(reply, low_rank):
        taken[low_rank.client] = copied(reply.content)
        return reply

    strategy = make(num_clients=4)
    federate(strategy, WatchedGrid(client_app(NET, tamper=take), 4), server_round)
    assert set(taken) == set("0123")
    replies = {}
    for client in range(AT_ONCE):
        replies[str(client)] = copied(taken[str(client % 4)])
        set_header(replies[str(client)], client=str(client))
    return replies


def make(**more):
    return FedLoRU(
        NET, rank=1, target_modules=("stem", "hidden"), accumulate_every=5, scaffold=True, measure_aggregation=False,
        **usual(**more),
    )  # fmt: skip


def is_one_of_the_good(reply, valid):
    """Whether what the server takes from a reply could have come from a well-behaved client, and how near it is.

    Said anew here, without the code that judges.
    """
    parts = ("tensors", "statistics", "extras")
    for part in parts:
        got, wanted = getattr(reply, part), getattr(valid, part)
        assert list(got) == list(wanted)
        for key, tensor in got.items():
            assert (tensor.shape, tensor.dtype) == (wanted[key].shape, wanted[key].dtype)
            assert not bool((tensor.isnan() | tensor.isinf()).any())
    assert set(reply.metrics) == METRICS
    assert all(type(value) in (int, float) for value in reply.metrics.values())
    assert 0 < reply.metrics["num-examples"] < math.inf
    assert (reply.client, reply.lineage, reply.server_round) == (valid.client, valid.lineage, valid.server_round)
    same = all(
        torch.equal(getattr(reply, part)[key], one) for part in parts for key, one in getattr(valid, part).items()
    )
    return "the same" if same and reply.metrics == valid.metrics else "other numbers"


def check(count, seed):
    """Send so many malformed replies, and return what became of how many."""
    strategy, grid, malformer = make(num_clients=AT_ONCE), Answering(), Malformer(seed)
    verdicts, reasons, changed_one = Counter(), Counter(), 0
    strategy._keeps_replies = "they are looked at"
    with task():
        strategy._roster.refresh(grid)
        valid = grid.contents = valid_replies(1)
        parsed = {client: wire.read_reply(content, trained=True) for client, content in valid.items()}
        strategy._remember()
        honest, _ = strategy._train(grid, 1, ConfigRecord(), 60)
        assert honest.failures == {}, "they are valid"
        for _ in range(0, count, AT_ONCE):
            strategy._recall()
            told, grid.contents = {}, {}
            for client, content in valid.items():
                told[client], grid.contents[client] = malformer.reply(content)
                changed_one += not told[client].startswith(("several", "error", "something"))
            exchange, _ = strategy._train(grid, 1, ConfigRecord(), 60)
            assert set(exchange.good).isdisjoint(exchange.failures)
            assert set(exchange.good) | set(exchange.failures) == set(valid)
            for client, reason in exchange.failures.items():
                assert re.fullmatch(r"error \d+: .*\S.*|(?!error).{20,}", reason), (told[client], reason)
                verdicts["refused"] += 1
                reasons[" ".join(reason.split()[:4])] += 1
            for client, kept in exchange.good.items():
                verdicts[is_one_of_the_good(kept.reply, parsed[client])] += 1
            for part in (strategy.state.trainables, strategy.state.statistics, strategy.state.control):
                assert all(bool(tensor.isfinite().all()) for tensor in part.values())
    assert changed_one >= 0.8 * count
    return verdicts, reasons


def assert_few_pass(verdicts, reasons, count):
    assert sum(verdicts.values()) == count
    # What is not looked at: other names of records, fields nobody reads, what Flower says of an array beside its bytes.
    assert verdicts["the same"] <= 0.25 * count, verdicts
    # Another bit of a number, or another positive weight, is what another client might have sent.
    assert verdicts["other numbers"] <= 0.1 * count, verdicts
    assert len(reasons) > 30


def test_a_thousand_malformed_replies_are_refused_with_a_reason_or_shown_to_be_harmless():
    assert_few_pass(*check(1000, seed=0), 1000)


@pytest.mark.slow
def test_ten_thousand_malformed_replies_are_refused_with_a_reason_or_shown_to_be_harmless():
    begun = time.monotonic()
    assert_few_pass(*check(10_000, seed=1), 10_000)
    assert time.monotonic() - begun < 240
