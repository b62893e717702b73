"""The in-process engine: any ServerApp and ClientApp, one process, one message after the other."""

import os

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.supercore.task_identity import TaskIdentity

from fedloru_flwr.engines.in_process import InProcessGrid, run_in_process


def echo_app():
    app = ClientApp()

    @app.query()
    def query(message, context):
        counter = context.state.setdefault("count", MetricRecord({"calls": 0}))
        counter["calls"] += 1
        told = {
            "partition": context.node_config["partition-id"],
            "partitions": context.node_config["num-partitions"],
            "calls": counter["calls"],
            "mode": context.run_config["mode"],
            "store": os.environ["FEDLORU_STORE"],
        }
        return Message(RecordDict({"told": ConfigRecord(told)}), reply_to=message)

    @app.train()
    def train(message, context):
        message.content["config"]["seen"] = True
        message.content["more"] = ConfigRecord({"a": 1})
        if context.node_config["partition-id"] == 1:
            raise RuntimeError("this one 'fails'")
        return Message(message.content, reply_to=message)

    return app


def run(main, app=None, count=3, **more):
    server, seen = ServerApp(), []

    @server.main()
    def entry(grid, context):
        seen.append(main(grid, context))

    run_in_process(server, app or echo_app(), num_supernodes=count, run_config={"mode": "test"}, **more)
    return seen[0]


def ask(grid, kind="query", **config):
    content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord(config)})
    return list(grid.send_and_receive([Message(content, node_id, kind) for node_id in grid.get_node_ids()]))


def test_every_node_has_its_partition_and_keeps_its_state():
    def main(grid, context):
        ask(grid)
        return [dict(reply.content["told"]) for reply in ask(grid)]

    told = run(main)
    assert [one["partition"] for one in told] == [0, 1, 2]
    assert {(one["partitions"], one["calls"], one["mode"]) for one in told} == {(3, 2, "test")}


def test_node_configs_are_as_given():
    configs = [{"partition-id": i * 10, "num-partitions": 99} for i in range(2)]
    told = run(lambda grid, context: [dict(r.content["told"]) for r in ask(grid)], count=2, node_configs=configs)
    assert [(one["partition"], one["partitions"]) for one in told] == [(0, 99), (10, 99)]


def test_what_raises_is_an_error_reply_with_its_text_and_the_others_go_on():
    replies = run(lambda grid, context: ask(grid, "train"))
    assert [reply.has_error() for reply in replies] == [False, True, False]
    assert replies[1].error.code == 2
    assert replies[1].error.reason == "<class 'RuntimeError'>:<'this one 'fails''>"
    assert [reply.metadata.src_node_id for reply in replies] == [1000, 1001, 1002]


def test_what_a_client_changes_in_its_message_reaches_nobody_else():
    def main(grid, context):
        content = RecordDict({"arrays": ArrayRecord(), "config": ConfigRecord({"lr": 0.1})})
        list(grid.send_and_receive([Message(content, node_id, "train") for node_id in grid.get_node_ids()]))
        return content

    content = run(main)
    assert dict(content["config"]) == {"lr": 0.1}
    assert list(content) == ["arrays", "config"]


def test_a_message_to_a_node_that_is_not_there_is_an_error_reply():
    def main(grid, context):
        return list(grid.send_and_receive([Message(RecordDict(), 7, "train")]))

    (reply,) = run(main)
    assert reply.error == Error(5, "Node Unavailable")


def test_messages_can_be_pushed_and_their_replies_pulled_once_in_any_order():
    def main(grid, context):
        messages = [
            grid.create_message(RecordDict({"config": ConfigRecord()}), "query", node_id, "1")
            for node_id in grid.get_node_ids()
        ]
        ids = list(grid.push_messages(messages))
        assert len(set(ids)) == 3
        first = [reply.content["told"]["partition"] for reply in grid.pull_messages(reversed(ids[1:]))]
        rest = [reply.content["told"]["partition"] for reply in grid.pull_messages(ids)]
        return first, rest

    assert run(main) == ([2, 1], [0])


def test_replies_can_be_taken_as_their_shares_are_done():
    handled = []

    def together(requests):
        handled.append(len(requests))
        return [Message(RecordDict(), reply_to=message) for message, _ in requests]

    def main(grid, context):
        messages = [Message(RecordDict(), node_id, "train") for node_id in grid.get_node_ids()]
        replies = grid.send_and_stream(messages)
        seen = []
        for message, reply in zip(messages, replies, strict=True):
            assert reply.metadata.reply_to_message_id == message.metadata.message_id
            seen.append(sum(handled))
        return seen

    assert run(main, count=8, together=together, at_once=2) == [2, 2, 4, 4, 6, 6, 8, 8]


def test_the_store_is_a_temporary_directory_or_the_one_given_and_the_environment_is_put_back(tmp_path, monkeypatch):
    def main(grid, context):
        store = ask(grid)[0].content["told"]["store"]
        return store, os.path.isdir(store)  # noqa: PTH112

    monkeypatch.setenv("FEDLORU_STORE", "before")
    temporary, existed = run(main)
    assert existed
    assert not os.path.exists(temporary)  # noqa: PTH110
    assert run(main)[0] != temporary
    assert run(main, store_dir=tmp_path) == (str(tmp_path), True)
    assert tmp_path.is_dir()
    assert os.environ["FEDLORU_STORE"] == "before"
    monkeypatch.delenv("FEDLORU_STORE")
    run(main)
    assert "FEDLORU_STORE" not in os.environ


def test_the_servers_exceptions_are_the_callers_and_everything_is_put_back(monkeypatch):
    monkeypatch.setenv("FEDLORU_STORE", "before")
    before = TaskIdentity._task_id

    def main(grid, context):
        assert TaskIdentity.task_id == 1
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        run(main)
    assert os.environ["FEDLORU_STORE"] == "before"
    assert TaskIdentity._task_id == before


def test_progress_is_told_after_every_message():
    done = []

    def main(grid, context):
        assert isinstance(grid, InProcessGrid)
        grid.on_reply = lambda: done.append(len(done))
        ask(grid, "train")

    run(main)
    assert done == [0, 1, 2]


def test_nodes_are_listed_in_the_order_of_their_partitions():
    def main(grid, context):
        nodes = list(grid.get_nodes())
        return [node.node_id for node in sorted(nodes, key=lambda node: node.registered_at)], list(grid.get_node_ids())

    by_registration, ids = run(main, count=12)
    assert by_registration == ids == list(range(1000, 1012))
