"""A limit on the bill: the run stops with a checkpoint, and goes on when the limit is raised."""

import json

import pytest
from toy_federation import Mlp, WatchedGrid, client_app, federate, seeded, usual

from fedloru_flwr.compare.places import Places
from fedloru_flwr.compare.records import Record
from fedloru_flwr.config import RunConfig
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FedLoRU

NET = seeded(Mlp)


def make(run_dir=None, **more):
    arguments = {
        "rank": 2,
        "target_modules": "hidden",
        "accumulate_every": 3,
        "checkpoint_every": 100,
        **usual(),
        **more,
    }
    return FedLoRU(NET, run_dir=run_dir, resume="auto" if run_dir else None, **arguments)


def run(directory, rounds=6, **more):
    grid = WatchedGrid(client_app(NET), 4)
    strategy = make(directory, **more)
    federate(strategy, grid, rounds, store=None if directory is None else directory.parent / "store")
    return strategy, grid.watch.rows


def sent(rows):
    return [row["bytes_up"] + row["bytes_down"] for row in rows]


def test_the_round_in_which_the_bill_is_reached_is_the_last_one(tmp_path):
    _, whole = run(None)
    limit = sum(sent(whole)[:2]) + 1
    strategy, rows = run(tmp_path / "run", max_total_bytes=limit)
    assert [row["round"] for row in rows] == [1, 2, 3]
    assert sum(sent(rows)) >= limit > sum(sent(rows)[:2])
    directory = RunDirectory.open(tmp_path / "run")
    assert directory.read_summary()["status"] == "stopped"
    assert directory.read_summary()["rounds"] == 3
    assert directory.latest_checkpoint().server_round == 3
    assert strategy.state.server_round == 3


def test_a_limit_that_is_reached_exactly_stops_and_one_above_does_not(tmp_path):
    _, whole = run(None)
    for name, limit, rounds in (("at", sum(sent(whole)[:2]), 2), ("above", sum(sent(whole)) + 1, 6)):
        _, rows = run(tmp_path / name / "run", max_total_bytes=limit)
        assert len(rows) == rounds
        status = RunDirectory.open(tmp_path / name / "run").read_summary()["status"]
        assert status == ("stopped" if name == "at" else "finished")


def test_a_stopped_run_stops_again_at_once_and_goes_on_with_a_higher_limit(tmp_path):
    _, whole = run(None)
    limit = sum(sent(whole)[:2])
    run(tmp_path / "run", max_total_bytes=limit)
    _, again = run(tmp_path / "run", max_total_bytes=limit)
    assert again == []
    assert RunDirectory.open(tmp_path / "run").read_summary()["status"] == "stopped"
    _, rest = run(tmp_path / "run")
    assert [row["round"] for row in rest] == [3, 4, 5, 6]
    summary = RunDirectory.open(tmp_path / "run").read_summary()
    assert summary["status"] == "finished"
    assert summary["total_bytes_up"] == sum(row["bytes_up"] for row in whole)


def test_the_last_round_evaluates_as_a_last_round_does(tmp_path):
    more = {"fraction_evaluate": 0.5, "evaluate_every": 100, "evaluate_all_at_end": True, "min_evaluate_nodes": 1}
    _, whole = run(None, **more)
    _, rows = run(tmp_path / "run", max_total_bytes=sum(sent(whole)[:2]), **more)
    assert [row.get("clients_evaluated") for row in rows] == [None, 4]


def test_a_limit_below_zero_is_refused():
    with pytest.raises(ValueError, match="max_total_bytes must be at least 0"):
        make(max_total_bytes=-1)


def test_a_run_may_be_continued_with_another_limit():
    config = RunConfig.from_mapping({"max-total-bytes": 10})
    assert config.changed_from({**config.as_mapping(), "max-total-bytes": 5}) == {}


class Wanted:
    """As much of a comparison's run as places look at."""

    def __init__(self):
        self.key, self.method, self.seed, self.at, self.choice = "k", "m", 0, {}, {}
        self.settings = {"num-server-rounds": 9}


def test_a_comparison_takes_a_stopped_run_for_finished(tmp_path):
    places = Places(tmp_path)
    path = places.place(Wanted()).path
    _, rows = run(path, max_total_bytes=1)
    assert len(rows) == 1
    RunDirectory(path).update_manifest({"config": RunConfig().as_mapping()})
    assert places.finished(Wanted())
    assert Record.of_directory(path).finished
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "status": "interrupted"}))
    assert not places.finished(Wanted())
