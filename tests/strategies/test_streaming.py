"""Replies folded into their mean as they come give what all replies at once give, in whatever order they come."""

import copy
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedMedian, FedYogi, Krum
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from toy_federation import ConvNet, Mlp, WatchedGrid, client_app, federate, same, seeded, task, timeless, usual

from fedloru_flwr import strategies, wire
from fedloru_flwr.strategies import FedAvg, FedExLoRA, FedLoRU, FLoRA, exchange, federated, receiving
from fedloru_flwr.strategies.exchange import Shelf
from fedloru_flwr.strategies.orders import in_turn
from fedloru_flwr.strategies.receiving import receive

NET, CONV = seeded(Mlp), seeded(ConvNet)
RANKS = {"ranks": "1:0.5,2:0.5"}
METHODS = {
    "FedAvg with statistics": (FedAvg, CONV, {}),
    "FedLoRU with statistics": (FedLoRU, CONV, {"target_modules": ("stem", "hidden"), "accumulate_every": 2}),
    "FedLoRU with control variates": (FedLoRU, CONV, {"target_modules": ("stem", "hidden"), "scaffold": True}),
    "FedLoRUSeeded": (strategies.FedLoRUSeeded, NET, {}),
    "FedPara": (strategies.FedPara, NET, {}),
    "RoLoRA": (strategies.RoLoRA, NET, {}),
    "FedSALoRA": (strategies.FedSALoRA, NET, {}),
    "PFedLoRU": (strategies.PFedLoRU, NET, {}),
    "LowRankEF": (strategies.LowRankEF, NET, {}),
    "FlexLoRA of different ranks": (strategies.FlexLoRA, NET, RANKS),
    "HetLoRA of different ranks": (strategies.HetLoRA, NET, RANKS),
    "MFedLoRU of different ranks": (strategies.MFedLoRU, NET, {"ranks": "1:0.5,2:0.5"}),
    "FedHM": (strategies.FedHM, NET, {}),
    "FedAdam": (FedLoRU, NET, {"inner": lambda: FedAdam(eta=0.05)}),
    "FedYogi": (FedLoRU, NET, {"inner": lambda: FedYogi(eta=0.05)}),
    "FedAvgM": (FedLoRU, NET, {"inner": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.5)}),
}


def make(method, *, whole=False, **more):
    kind, net, options = METHODS[method]
    options = {**options, **({"inner": options["inner"]()} if "inner" in options else {})}
    if kind is not FedAvg:
        options = {"rank": 2, "target_modules": ("hidden",), **options}
    strategy = kind(net, **usual(**{"num_clients": 6, **options, **more}))
    assert strategy._keeps_replies == ""
    if whole:
        strategy._keeps_replies = "to compare"
    return strategy


def run(strategy, net, rounds, *, shuffle=None, tamper=None, configs=None):
    grid = WatchedGrid(client_app(net, tamper=tamper), strategy.num_clients, shuffle=shuffle, node_configs=configs)
    federate(strategy, grid, rounds)
    return timeless(grid.watch.rows)


def without_errors(rows):
    return [{key: value for key, value in row.items() if key != "aggregation_error"} for row in rows]


def far(one, other):
    """How far two dicts of tensors are apart, by the largest number."""
    return max(
        float((value - other[key]).abs().max() / other[key].abs().max().clamp_min(1e-3)) for key, value in one.items()
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_round_gives_what_all_replies_at_once_give(method):
    _, net, _ = METHODS[method]
    whole, folded = make(method, whole=True), make(method)
    expected, rows = run(whole, net, 1), run(folded, net, 1)
    assert without_errors(rows) == without_errors(expected)
    for got, wanted in zip(rows, expected, strict=True):
        assert ("aggregation_error" in got) == ("aggregation_error" in wanted)
        assert got.get("aggregation_error", {}) == pytest.approx(
            wanted.get("aggregation_error", {}), rel=1e-5, abs=1e-6
        )
    assert list(folded.state.trainables) == list(whole.state.trainables)
    assert far(folded.state.trainables, whole.state.trainables) < 1e-6
    for part in ("statistics", "control"):
        assert getattr(folded.state, part).keys() == getattr(whole.state, part).keys()
        if getattr(whole.state, part):
            assert far(getattr(folded.state, part), getattr(whole.state, part)) < 1e-6
    assert folded._memory.norms == whole._memory.norms
    assert folded._memory.examples == whole._memory.examples


def spoil(server_round, client, content):
    """What is wrong with a reply, by round and client."""
    tensors = content["arrays"].to_torch_state_dict()
    if (server_round, client) in ((1, "4"), (3, "2")):  # without a history, and with one
        content["arrays"] = wire.to_record({key: value + 1e4 for key, value in tensors.items()})
    if (server_round, client) in ((2, "0"), (3, "5")):
        content["metrics"] = MetricRecord({**content["metrics"], "odd": 1.0})
    if (server_round, client) == (2, "3"):
        raise OSError("lost")
    if (server_round, client) == (4, "1"):
        tensors["head.bias"][0] = torch.nan
        content["arrays"] = wire.to_record(tensors)


def tamper(reply, low_rank):
    spoil(low_rank.server_round, low_rank.client, reply.content)
    return reply


def test_failures_are_the_same_ones_and_the_order_of_arrival_changes_no_bit():
    method = "FedLoRU with control variates"
    whole = make(method, whole=True)
    expected = run(whole, CONV, 4, tamper=tamper)
    found = []
    for seed in range(6):
        strategy = make(method)
        rows = run(strategy, CONV, 4, tamper=tamper, shuffle=random.Random(seed) if seed else None)
        assert [row["failures"] for row in rows] == [row["failures"] for row in expected]
        found.append((rows, strategy))
    assert [set(row["failures"]) for row in expected] == [{"4"}, {"0", "3"}, {"2", "5"}, {"1"}]
    first_rows, first = found[0]
    for rows, strategy in found[1:]:
        assert rows == first_rows
        for part in ("trainables", "statistics", "control"):
            assert same(getattr(strategy.state, part), getattr(first.state, part))
        assert strategy._memory.norms == first._memory.norms
        assert list(strategy._memory.held.items()) == list(first._memory.held.items())


def test_what_is_set_aside_lies_on_disk_beyond_a_limit_and_is_gone_afterwards(monkeypatch, tmp_path):
    plain = make("FedLoRU with statistics")
    rows = run(plain, CONV, 2, tamper=tamper)
    written = []
    write = exchange.Aside.write

    def watched(self, path):
        write(self, path)
        written.append(path)
        assert path.exists()

    monkeypatch.setattr(Shelf, "limit", 1500)
    monkeypatch.setattr(exchange.Aside, "write", watched)
    monkeypatch.setattr(exchange.tempfile, "tempdir", str(tmp_path))
    spilled = make("FedLoRU with statistics")
    assert run(spilled, CONV, 2, tamper=tamper, shuffle=random.Random(0)) == rows
    assert len(written) >= 4
    assert same(spilled.state.trainables, plain.state.trainables)
    assert not any(path.parent.exists() for path in written)


def test_a_full_disk_leaves_replies_in_memory(monkeypatch):
    plain, full = make("FedLoRUSeeded"), make("FedLoRUSeeded")
    run(plain, NET, 1)

    def fail(self, path):
        raise OSError("No space left on device")

    monkeypatch.setattr(Shelf, "limit", 0)
    monkeypatch.setattr(exchange.Aside, "write", fail)
    run(full, NET, 1)
    assert same(full.state.trainables, plain.state.trainables)


def test_with_a_history_replies_are_folded_at_once_and_nothing_is_set_aside(monkeypatch):
    aside = []
    put = Shelf.put
    monkeypatch.setattr(Shelf, "put", lambda self, parts: aside.append(1) or put(self, parts))
    strategy = make("FedLoRUSeeded")
    grid = WatchedGrid(client_app(NET), 6)
    grid.watch.at_end = lambda row: aside.append(row["round"])
    federate(strategy, grid, 3)
    assert aside == [1] * 6 + [1, 2, 3]


@pytest.mark.parametrize("names", [["2", "0", "3", "1"], ["north", "10", "9", "a"]])
def test_whose_name_was_not_known_is_folded_in_at_the_place_of_its_own(names):
    """Nodes register in another order, and their clients say who they are with the first reply."""
    results = []
    for seed in range(4):
        order = random.Random(seed).sample(range(4), 4)
        configs = [{"partition-id": index, "client-id": names[index]} for index in order]
        strategy = make("PFedLoRU", num_clients=4)
        run(strategy, NET, 2, configs=configs, shuffle=random.Random(seed))
        results.append(strategy)
    for strategy in results[1:]:
        assert same(strategy.state.trainables, results[0].state.trainables)


def test_the_inner_strategy_sees_one_reply_with_the_weight_and_the_metrics_of_all(monkeypatch):
    seen = []
    aggregate = FlowerFedAvg.aggregate_train

    def watched(self, server_round, replies):
        seen.append([copy.deepcopy(reply.content) for reply in replies])
        return aggregate(self, server_round, replies)

    monkeypatch.setattr(FlowerFedAvg, "aggregate_train", watched)
    for whole in (True, False):
        run(make("FedAdam", whole=whole), NET, 1)
    every, (one,) = seen
    assert len(every) == 6
    assert list(one) == list(every[0]) == ["arrays", "metrics"]
    assert list(one["arrays"]) == list(every[0]["arrays"])
    weights = [content["metrics"]["num-examples"] for content in every]
    assert one["metrics"]["num-examples"] == sum(weights)
    losses = [content["metrics"]["train_loss"] for content in every]
    assert one["metrics"]["train_loss"] == pytest.approx(
        sum(map(float.__mul__, losses, map(float, weights))) / sum(weights)
    )


class Own(FlowerFedAvg):
    """Somebody's own strategy."""


DECLINED = {
    "Krum": (FedLoRU, {"inner": lambda: Krum(num_malicious_nodes=1)}, "Krum may look at each"),
    "FedMedian": (FedLoRU, {"inner": FedMedian}, "FedMedian may look at each"),
    "a strategy of one's own": (FedLoRU, {"inner": Own}, "Own may look at each"),
    "metrics of one's own": (
        FedLoRU,
        {"train_metrics_aggr_fn": lambda: lambda records, key: MetricRecord({"replies": len(records)})},
        "FedAvg has a train_metrics_aggr_fn, which may look at each",
    ),
    "FLoRA": (FLoRA, {}, "FLoRA stacks the factors of all"),
    "FedEx-LoRA": (FedExLoRA, {}, "FedEx-LoRA's residual is made of the factors of all"),
}


@pytest.mark.parametrize("what", DECLINED)
def test_where_each_reply_is_needed_all_are_kept_and_the_log_says_so_once(what, monkeypatch):
    kind, options, reason = DECLINED[what]
    options = {name: value() for name, value in options.items()}
    said = []
    monkeypatch.setattr(federated, "log", lambda level, text, *values: said.append(text % values))
    replies = []
    aggregate = FlowerFedAvg._check_and_log_replies

    def watched(self, those, *more, **others):
        replies.append(len(those))
        return aggregate(self, those, *more, **others)

    monkeypatch.setattr(FlowerFedAvg, "_check_and_log_replies", watched)
    run(kind(NET, rank=2, target_modules=("hidden",), **usual(**options)), NET, 2)
    assert [line for line in said if "kept in memory" in line] == [
        f"all replies of a round are kept in memory until its end: {reason}"
    ]
    assert replies == [4, 4]


def test_clients_take_turns_by_number_and_other_names_after_them():
    assert sorted(["10", "b", "9", "100"], key=in_turn) == ["9", "10", "100", "b"]


class Flower(InMemoryGrid):
    """Flower's grid, whose clients finish when they are told to."""

    def __init__(self, finish):
        self.pull_interval = 0.01
        self.finish = finish
        self.asked = []
        self.sent = {}

    def push_messages(self, messages):
        for index, message in enumerate(messages):
            message.metadata.__dict__["_message_id"] = f"m{index}"
            self.sent[f"m{index}"] = message
        return list(self.sent)

    def pull_messages(self, message_ids):
        self.asked.append(list(message_ids))
        ready = [key for key in message_ids if key in self.sent and self.finish(key, len(self.asked))]
        return [Message(RecordDict(), reply_to=self.sent.pop(key)) for key in reversed(ready)]


def pulled(grid, count, turn=None, size=10**12, timeout=60.0):
    with task():
        messages = [Message(RecordDict(), index + 1, "train") for index in range(count)]
        got = receive(grid, messages, turn or range(count), size, timeout)
        return [reply.metadata.src_node_id - 1 for reply in got]


def test_replies_are_pulled_by_turn_in_a_window_of_those_still_missing():
    grid = Flower(lambda key, times: True)
    assert sorted(pulled(grid, 10, turn=list(reversed(range(10))))) == list(range(10))
    assert grid.asked == [["m9", "m8", "m7", "m6"], ["m5", "m4", "m3", "m2"], ["m1", "m0"]]


def test_one_that_is_late_does_not_hold_up_the_others():
    grid = Flower(lambda key, times: key != "m0" or times > 6)
    assert pulled(grid, 10)[-1] == 0
    assert max(map(len, grid.asked)) == 4
    assert grid.asked[1] == ["m0", "m4", "m5", "m6"]


def test_small_replies_are_pulled_in_a_larger_window():
    grid = Flower(lambda key, times: True)
    pulled(grid, 100, size=1000)
    assert [len(ids) for ids in grid.asked] == [64, 36]


def test_when_time_is_up_what_is_there_is_still_taken():
    late = {"m0", "m1", "m2", "m3"}
    grid = Flower(lambda key, times: key not in late)
    begun = time.monotonic()
    assert sorted(pulled(grid, 10, timeout=0.1)) == [4, 5, 6, 7, 8, 9]
    assert time.monotonic() - begun < 30
    assert pulled(Flower(lambda key, times: True), 3, timeout=0.0) == []


def test_what_flower_could_not_send_has_no_reply():
    class Refusing(Flower):
        def push_messages(self, messages):
            return [None if key == "m1" else key for key in super().push_messages(messages)]

    assert sorted(pulled(Refusing(lambda key, times: True), 3)) == [0, 2]


def test_a_grid_of_ones_own_is_used_as_it_says_itself():
    class Streaming(WatchedGrid):
        def send_and_stream(self, messages, *, timeout=None):
            yield from super().send_and_receive(messages, timeout=timeout)

        def send_and_receive(self, messages, *, timeout=None):
            raise AssertionError("it can do better")

    class Withholding(Streaming):
        def send_and_receive(self, messages, *, timeout=None):
            return list(WatchedGrid.send_and_receive(self, messages, timeout=timeout))[1:]

    rows = []
    for kind in (WatchedGrid, Streaming, Withholding):
        grid = kind(client_app(NET), 6)
        federate(make("FedLoRUSeeded"), grid, 2)
        rows.append(timeless(grid.watch.rows))
    assert rows[1] == rows[0]
    assert all(list(row["failures"].values()) == ["no reply within 3600 s"] for row in rows[2])
    assert receiving._overrides(Streaming(client_app(NET), 1), "send_and_stream", "send_and_receive")


def memory_for(replies):
    root = Path(__file__).parents[2]
    command = [sys.executable, str(root / "benchmarks" / "streaming.py"), "round", "--replies", str(replies)]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return json.loads(told.splitlines()[-1])["peak_memory_mib"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_thousand_replies_need_the_memory_of_a_hundred():
    assert memory_for(1000) < 1.2 * memory_for(100)
