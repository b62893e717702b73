"""The books: what is said to have been sent is what has passed, to the byte."""

import json

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from toy_federation import (
    ConvNet,
    Mlp,
    Watch,
    WatchedGrid,
    client_app,
    each_its_own,
    federate,
    own_instances,
    own_machines,
    seeded,
    serialised,
    timeless,
    usual,
)

from fedloru_flwr import wire
from fedloru_flwr.strategies import FedAvg, FedLoRU

NET = seeded(ConvNet)


def make(net=NET, **more):
    arguments = {"rank": 2, "target_modules": ("stem", "hidden"), "accumulate_every": 2, **usual(), **more}
    return FedLoRU(net, **arguments)


def counted(grid, server_round):
    """Bytes down and up of a round, as the grid saw them."""
    passed = [p for p in grid.passed if p.server_round == server_round]
    return sum(p.size for p in passed), sum(p.reply_size for p in passed)


def expected_purposes(grid, server_round):
    """What each byte down was for, from the messages alone."""
    down, ordered = {}, set()
    for p in grid.passed:
        if p.server_round != server_round:
            continue
        if p.kind == "enrol":
            purpose = "enrolment"
        elif p.kind != "work":
            purpose = p.kind
        elif (p.node, p.phase) in ordered:
            purpose = "repeats"
        else:
            purpose = {"train": "trainables", "evaluate": "evaluation"}[p.phase]
            ordered.add((p.node, p.phase))
        for name, size in ((purpose, p.size - p.entries), ("entries", p.entries)):
            down[name] = down.get(name, 0) + size
    return {name: size for name, size in down.items() if size}


def assert_books_are_right(grid, rows):
    for row in rows:
        down, up = counted(grid, row["round"])
        assert (row["bytes_down"], row["bytes_up"]) == (down, up)
        purposes = row["bytes_by_purpose"]
        assert {name: way["down"] for name, way in purposes.items() if way["down"]} == expected_purposes(
            grid, row["round"]
        )
        assert sum(way["down"] for way in purposes.values()) == row["bytes_down"]
        assert sum(way["up"] for way in purposes.values()) == row["bytes_up"]


def test_bytes_of_a_content_are_the_sum_over_flowers_own_objects():
    content = RecordDict(
        {
            "arrays": ArrayRecord({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}),
            "metrics": MetricRecord({"loss": 0.5, "num-examples": 7}),
            "config": ConfigRecord({"header": "x" * 40, "raw": b"\x00" * 100}),
        }
    )
    parts = get_all_nested_objects(content)
    kinds = sorted(type(part).__name__ for part in parts.values())
    assert " ".join(kinds) == "Array Array ArrayChunk ArrayChunk ArrayRecord ConfigRecord MetricRecord RecordDict"
    assert wire.content_bytes(content) == sum(len(part.deflate()) for part in parts.values()) == serialised(content)
    assert wire.content_bytes(content) > 2 * 128 + 24 + 16 + 140


def test_the_books_of_a_quiet_run_are_what_passed():
    grid = WatchedGrid(client_app(NET, query=True), 4)
    federate(make(fraction_evaluate=0.5, min_evaluate_nodes=1, enrol=True), grid, 5)
    rows = grid.watch.rows
    assert_books_are_right(grid, rows)
    assert set(rows[0]["bytes_by_purpose"]) == {"trainables", "evaluation", "enrolment"}
    assert set(rows[2]["bytes_by_purpose"]) == {"trainables", "evaluation", "entries"}
    assert rows[2]["bytes_by_purpose"]["entries"]["up"] == 0
    assert rows[0]["bytes_by_purpose"]["trainables"]["down"] == rows[1]["bytes_by_purpose"]["trainables"]["down"]


def test_the_books_of_a_run_with_bases_repeats_and_failures_are_what_passed(tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "INLINE_LIMIT", 100)

    def sometimes_fail(reply, low_rank):
        if low_rank.server_round == 3 and low_rank.client == "1":
            raise ValueError("no more")
        return reply

    grid = WatchedGrid(
        client_app(own_instances(ConvNet, 4), tamper=sometimes_fail),
        4,
        node_configs=own_machines(tmp_path, 4),
        actor=each_its_own,
    )
    federate(make(), grid, 5)
    rows = grid.watch.rows
    assert_books_are_right(grid, rows)
    assert set(rows[0]["bytes_by_purpose"]) == {"trainables", "base", "repeats"}
    assert set(rows[2]["bytes_by_purpose"]) == {"trainables", "entries"}
    assert rows[2]["clients_failed"] == 1


def test_an_order_sent_again_is_a_repeat_and_the_reply_to_it_is_not():
    grid = WatchedGrid(client_app(own_instances(ConvNet, 4)), 4, actor=each_its_own)
    federate(make(), grid, 1)
    purposes = grid.watch.rows[0]["bytes_by_purpose"]
    assert purposes["repeats"]["down"] == purposes["trainables"]["down"], "the same order, once more"
    assert purposes["repeats"]["up"] == 0
    assert purposes["trainables"]["up"] == sum(p.reply_size for p in grid.passed)


@pytest.mark.parametrize("make_strategy", [make, lambda **more: FedAvg(NET, **usual(**more))])
def test_two_runs_of_one_seed_give_the_same_rows_and_another_seed_does_not(make_strategy):
    books = []
    for seed in (1, 1, 2):
        watch = Watch()
        strategy = make_strategy(seed=seed, fraction_train=0.5, fraction_evaluate=0.5)
        federate(strategy, WatchedGrid(client_app(NET), 4, watch=watch), 4)
        books.append(json.dumps(timeless(watch.rows)))
    assert books[0] == books[1]
    assert books[0] != books[2]


def test_factors_cost_a_fraction_of_the_model():
    rows = []
    for strategy in (make(seeded(Mlp), target_modules="hidden", rank=1), FedAvg(seeded(Mlp), **usual())):
        watch = Watch()
        federate(strategy, WatchedGrid(client_app(seeded(Mlp)), 4, watch=watch), 1)
        rows.append(watch.rows[0])
    # 12 x 10 weights against (12 + 10) factors, as float32, four clients.
    saved = 4 * 4 * (120 - 22)
    assert rows[1]["bytes_up"] - rows[0]["bytes_up"] == pytest.approx(saved, abs=4 * 500)
