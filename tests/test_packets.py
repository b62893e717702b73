"""Replies at hand and packed together are the messages that every client by itself would have sent."""

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedloru_flwr import wire
from fedloru_flwr.client_app import app, train_or_evaluate_together
from fedloru_flwr.config import RunConfig
from fedloru_flwr.engines.in_process import InProcessGrid, serve, shares, store_at
from fedloru_flwr.packets import Packet, pack_orders, pack_replies, unpack_orders, unpack_replies
from fedloru_flwr.server_app import app as server_app

pytestmark = pytest.mark.usefixtures("quick_books", "fresh_process", "task")


@pytest.fixture
def task(monkeypatch):
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class CheckedGrid(InProcessGrid):
    """Sends everything through packets, as Flower would, and compares with each client's own message."""

    def __init__(self, settings):
        super().__init__(app, settings["num-clients"], settings, together=train_or_evaluate_together)
        self.checked = 0

    def _answers(self, requests):
        orders = through_flower(pack_orders([message for message, _ in requests]))
        for (sent, _), received in zip(requests, *unpack_orders(orders), strict=True):
            assert received.metadata.dst_node_id == sent.metadata.dst_node_id
            assert received.metadata.message_type == sent.metadata.message_type
            assert received.content == sent.content
        replies = list(super()._answers(requests))
        unpacked = unpack_replies(through_flower(pack_replies(replies)), [message for message, _ in requests])
        for mine, theirs in zip(replies, unpacked, strict=True):
            same_message(mine, theirs)
            self.checked += isinstance(theirs, wire.ReadyReply)
        return iter(unpacked)


def through_flower(packet):
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    content = packet.to_record_dict()
    objects = {name: part.deflate() for name, part in get_all_nested_objects(content).items()}
    return Packet.from_record_dict(inflate_object_from_contents(content.object_id, objects))


def same_message(mine, theirs):
    assert mine.has_error() == theirs.has_error()
    if mine.has_error():
        assert (mine.error.code, mine.error.reason) == (theirs.error.code, theirs.error.reason)
        return
    size, reply = wire.size_of(theirs), None
    if isinstance(theirs, wire.ReadyReply):
        assert theirs.is_ready
        reply = wire.reply_of(theirs, trained=theirs.trained)
    content = theirs.content
    assert content == mine.content
    assert size == (wire.content_bytes(content), wire.extras_bytes(content))
    if reply is not None:
        same_reply(reply, wire.read_reply(content, trained=theirs.trained))


def same_reply(mine, parsed):
    for part in ("tensors", "statistics", "extras"):
        one, other = getattr(mine, part), getattr(parsed, part)
        assert list(one) == list(other)
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    plain = [{k: v for k, v in vars(reply).items() if not isinstance(v, dict)} for reply in (mine, parsed)]
    assert plain[0] == plain[1]
    assert mine.metrics == parsed.metrics


@pytest.mark.parametrize(
    "more",
    [
        {"algorithm": "fedloru", "scaffold": True, "accumulate-every": 2},
        {"algorithm": "pfedloru"},
        {"algorithm": "mfedloru", "ranks": "2:0.5,4:0.5"},
        {"algorithm": "lowrank-ef"},
        {"algorithm": "flora", "ranks": "2:0.5,4:0.5"},
        {"algorithm": "rolora"},
    ],
    ids=lambda more: more["algorithm"],
)
def test_packed_replies_are_each_clients_own(more, tmp_path):
    settings = {"num-clients": 4, "fraction-train": 1.0, "num-server-rounds": 2, "local-epochs": 3, "rank": 4}
    settings |= {"model": "mlp", "hidden": "32,32", "fraction-evaluate": 0.5, "output-dir": str(tmp_path), **more}
    config = RunConfig.from_mapping(settings).as_mapping()
    grid = CheckedGrid(config)
    with store_at(None):
        serve(server_app, grid, config)
    assert grid.checked >= 8


def a_message():
    return Message(RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord()}), 1000, "train")


@pytest.fixture
def order():
    settings = wire.Settings("plain", "factors", 2, 2.0, (), "all", 0, "merge")
    digest = "0" * 64
    return wire.Order("work", digest, digest, settings, {}, (), {}, 3, "arrays", "config")


def ready(order, message, tensors, metrics=None):
    reply = wire.make_reply(
        order, client="7", metrics=MetricRecord(metrics or {"num-examples": 4}), tensors=tensors, silent_layers=["x"]
    )
    return wire.ReadyReply(reply, trained=True, arrays_key="arrays", config_key="config", reply_to=message)


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"a": torch.zeros(3, 4), "b": torch.zeros(3, 4)},
        {"a": torch.zeros(3, 4), "b": torch.zeros(4, 3)},
        {"a": torch.zeros(2), "b": -torch.zeros(2), "c": torch.ones(2)},
        {"a": torch.zeros(0), "b": torch.tensor(1.0)},
        {"a": torch.ones(3, dtype=torch.bfloat16), "b": torch.ones(3, dtype=torch.int64)},
        {"a": torch.ones(3, dtype=torch.float64), "b": torch.ones(3)},
        {"a": torch.zeros(3_000_000), "b": torch.zeros(3_000_000)},
        {"a": torch.full((2,), torch.nan), "b": torch.full((2,), torch.nan)},
        {"é/ü": torch.arange(4.0).reshape(2, 2).T},
    ],
)
def test_the_bytes_of_a_reply_are_told_without_making_it(tensors, order):
    made, asked = ready(order, a_message(), tensors), ready(order, a_message(), tensors)
    assert made.size() == (wire.content_bytes(asked.content), 0)
    (unpacked,) = unpack_replies(through_flower(pack_replies([made])), [a_message()])
    assert wire.size_of(unpacked) == made.size()
    assert unpacked.content == asked.content


def test_a_reply_somebody_has_had_in_hand_is_read_from_its_records(order):
    reply = ready(order, a_message(), {"a": torch.ones(2)})
    reply.content["arrays"] = wire.to_record({"a": torch.zeros(2)})
    assert not reply.is_ready
    assert wire.reply_of(reply, trained=True).tensors["a"].tolist() == [0.0, 0.0]
    reply.content = RecordDict()
    with pytest.raises(wire.WireError):
        wire.reply_of(reply, trained=True)


def test_errors_and_other_contents_are_passed_on(order):
    messages = [a_message() for _ in range(3)]
    other = RecordDict({"told": ConfigRecord({"x": b"\0\xff"}), "metrics": MetricRecord({"y": [1.5, 2.5]})})
    replies = [
        Message(Error(2, "why"), reply_to=messages[0]),
        Message(other, reply_to=messages[1]),
        ready(order, messages[2], {"a": torch.ones(2)}, {"num-examples": 2**70}),
    ]
    got = unpack_replies(through_flower(pack_replies(replies)), messages)
    assert (got[0].error.code, got[0].error.reason) == (2, "why")
    assert got[1].content == other
    assert got[2].error.reason.startswith("Flower cannot send its reply")


@pytest.mark.parametrize("client", ["7", "123456", "\u00e9"])
@pytest.mark.parametrize(
    "metrics",
    [
        {"num-examples": number, "train_loss": loss, "list": [1, 300, -70_000], "floats": [loss, 0.0, -1e300]}
        for number, loss in [(1, 0.0), (63, 2.5), (64, -0.0), (10**15, float("inf")), (2**53, float("nan"))]
    ]
    + [{"num-examples": 1.5, "empty": []}, {"num-examples": 1, "\u00fc": -1}],
)
@pytest.mark.parametrize("statistics", [{}, {"running": torch.arange(5.0)}])
def test_the_bytes_of_a_reply_follow_from_its_metrics_its_clients_name_and_what_is_attached(
    client, metrics, statistics, order
):
    def reply():
        told = wire.make_reply(
            order,
            client=client,
            metrics=MetricRecord(metrics),
            tensors={"a": torch.ones(3)},
            statistics=statistics,
            extras={f"c/{key}": value for key, value in statistics.items()},
        )
        return wire.ReadyReply(told, trained=True, arrays_key="arrays", config_key="own", reply_to=a_message())

    content = reply().content
    assert reply().size() == (wire.content_bytes(content), wire.extras_bytes(content))


def test_a_packet_that_is_none_is_named(order):
    for content in (RecordDict(), RecordDict({"config": ConfigRecord({wire.HEADER: "{}"})})):
        with pytest.raises(wire.WireError, match="a packet"):
            Packet.from_record_dict(content)
    packet = pack_replies([ready(order, a_message(), {"a": torch.ones(2)})])
    with pytest.raises(wire.WireError, match="1 replies to 2 messages"):
        unpack_replies(packet, [a_message(), a_message()])
    with pytest.raises(wire.WireError, match="orders does not parse"):
        unpack_orders(packet)


@pytest.mark.parametrize(("count", "at_once"), [(1, 25), (25, 25), (31, 40), (50, 25), (99, 10), (1000, 25), (3, 1)])
def test_shares_cover_all_clients_once_and_are_about_equal(count, at_once):
    parts = [range(count)[part] for part in shares(count, at_once)]
    assert [i for part in parts for i in part] == list(range(count))
    sizes = {len(part) for part in parts}
    assert max(sizes) <= at_once
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) >= 1
