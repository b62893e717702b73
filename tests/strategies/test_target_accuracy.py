"""A target for the accuracy: the run stops with the round that reaches it, and goes on when the target is raised."""

from functools import partial

import pytest
from toy_federation import Mlp, Watch, WatchedGrid, client_app, federate, seeded, timeless, usual

from fedloru_flwr import launch
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.plan import plan
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FedLoRU, FedSALoRA, PFedLoRU

NET = seeded(Mlp)
ACCURACY = [0.1, 0.3, 0.5, 0.4, 0.7, 0.8, 0.9]  # by round, from before the first on


class Killed(Exception):
    pass


def make(run_dir=None, cls=FedLoRU, **more):
    own = {"rank": 2, "target_modules": "hidden", "accumulate_every": 3, "checkpoint_every": 100}
    return cls(NET, run_dir=run_dir, resume="auto" if run_dir else None, **{**own, **usual(), **more})


def run(directory, *, central=True, app=None, at_end=lambda row: None, **more):
    """Six rounds at most; the central accuracy is that of the table."""
    grid = WatchedGrid(app or client_app(NET), 4, watch=Watch(at_end=at_end))
    strategy = make(directory / "run", **more)
    evaluate_fn = None
    if central:
        evaluate_fn = strategy.central_evaluation(lambda server_round, model: {"accuracy": ACCURACY[server_round]})
    federate(strategy, grid, 6, store=directory / "store", evaluate_fn=evaluate_fn)
    return grid.watch.rows


def summary(directory):
    return RunDirectory.open(directory / "run").read_summary()


def test_the_first_round_that_reaches_the_target_is_the_last_one(tmp_path):
    rows = run(tmp_path, target_accuracy=0.5)
    assert [row["round"] for row in rows] == [0, 1, 2]
    found = summary(tmp_path)
    assert (found["status"], found["rounds"], found["final_accuracy"]) == ("stopped", 2, 0.5)
    assert found["stopped_because"] == "target-accuracy = 0.5: the accuracy is 0.5"
    assert RunDirectory.open(tmp_path / "run").latest_checkpoint().server_round == 2


@pytest.mark.parametrize("target", [0.0, 0.95, 0.9])
def test_without_a_target_or_with_one_that_only_the_last_round_reaches_the_run_finishes(tmp_path, target):
    assert len(run(tmp_path, target_accuracy=target)) == 7
    assert summary(tmp_path)["status"] == "finished"
    assert "stopped_because" not in summary(tmp_path)


def test_a_stopped_run_stops_again_at_once_and_goes_on_with_a_higher_target(tmp_path):
    run(tmp_path, target_accuracy=0.5)
    told = summary(tmp_path)["stopped_because"]
    assert run(tmp_path, target_accuracy=0.5) == []
    assert (summary(tmp_path)["status"], summary(tmp_path)["stopped_because"]) == ("stopped", told)
    assert [row["round"] for row in run(tmp_path, target_accuracy=0.7)] == [3, 4]
    assert [row["round"] for row in run(tmp_path)] == [5, 6]
    assert summary(tmp_path)["status"] == "finished"


def test_a_run_that_was_killed_on_its_way_to_the_target_is_the_run_that_was_not(tmp_path):
    def kill(row):
        if row["round"] == 3:
            raise Killed

    run(tmp_path / "whole", target_accuracy=0.7, checkpoint_every=2)
    with pytest.raises(Killed):
        run(tmp_path / "killed", target_accuracy=0.7, checkpoint_every=2, at_end=kill)
    run(tmp_path / "killed", target_accuracy=0.7, checkpoint_every=2)
    left = [RunDirectory.open(tmp_path / name / "run") for name in ("whole", "killed")]
    assert timeless(left[0].read_rounds()) == timeless(left[1].read_rounds())
    assert (left[0].path / "model.safetensors").read_bytes() == (left[1].path / "model.safetensors").read_bytes()
    assert summary(tmp_path / "killed")["stopped_because"] == summary(tmp_path / "whole")["stopped_because"]


def test_the_last_round_evaluates_as_a_last_round_does(tmp_path):
    """On all clients, and personal models too."""
    more = {"fraction_evaluate": 0.5, "evaluate_every": 100, "evaluate_all_at_end": True, "min_evaluate_nodes": 1}
    rows = run(tmp_path / "a", target_accuracy=0.5, **more)
    assert [row.get("clients_evaluated") for row in rows] == [None, None, 4]
    rows = run(tmp_path / "b", target_accuracy=0.5, cls=PFedLoRU, evaluate_all_at_end=True)
    assert [row.get("clients_evaluated") for row in rows] == [None, None, 4]


def test_without_a_central_evaluation_the_clients_accuracy_counts(tmp_path):
    app = client_app(NET, evaluates=False)

    @app.evaluate()
    def evaluate(message, context):
        from fedloru_flwr.clients import LowRankSession

        low_rank = LowRankSession(NET, message, context)
        return low_rank.reply({"accuracy": ACCURACY[low_rank.server_round], "num-examples": 1})

    rows = run(tmp_path, central=False, app=app, target_accuracy=0.5, fraction_evaluate=1.0, evaluate_every=2)
    assert [row["accuracy"] for row in rows] == [None, 0.5]
    assert summary(tmp_path)["stopped_because"] == "target-accuracy = 0.5: the accuracy is 0.5"


def test_a_model_that_is_good_enough_before_training_is_not_trained(tmp_path):
    assert [row["round"] for row in run(tmp_path, target_accuracy=0.1)] == [0]
    assert (summary(tmp_path)["status"], summary(tmp_path)["rounds"]) == ("stopped", 0)
    assert [row["round"] for row in run(tmp_path, target_accuracy=0.1)] == [0]


def test_of_two_limits_the_first_one_reached_is_told(tmp_path):
    run(tmp_path, target_accuracy=0.5, max_total_bytes=1)
    assert summary(tmp_path)["rounds"] == 1
    sent = summary(tmp_path)["total_bytes_up"] + summary(tmp_path)["total_bytes_down"]
    assert summary(tmp_path)["stopped_because"] == f"max-total-bytes = 1: {sent} bytes have been sent"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (partial(make, target_accuracy=-0.1), "target_accuracy must be a number of at least 0, got -0.1"),
        (
            partial(make, cls=FedSALoRA, accumulate_every=0, target_accuracy=0.5),
            "target_accuracy=0.5: it has no global",
        ),
        (
            lambda: federate(make(target_accuracy=0.5), WatchedGrid(client_app(NET), 4), 1),
            "target_accuracy=0.5 needs an accuracy: give an evaluate_fn, or a fraction_evaluate above 0",
        ),
    ],
)
def test_a_target_that_could_not_be_reached_is_refused(wrong, told):
    with pytest.raises(ValueError, match=told):
        wrong()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"target-accuracy": 90}, "target-accuracy = 90.0 must be at least 0 and at most 1"),
        (
            {"target-accuracy": 0.9, "dataset": "clients", "input-shape": "4", "num-classes": 2},
            "target-accuracy = 0.9 needs an accuracy, and with dataset = 'clients' only clients can tell one",
        ),
    ],
)
def test_settings_of_a_target_that_make_no_sense_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        RunConfig.from_mapping(settings)


def test_a_run_may_be_continued_with_another_target_and_a_plan_says_that_it_cannot_know_the_round():
    config = RunConfig.from_mapping({"target-accuracy": 0.9})
    assert config.changed_from({**config.as_mapping(), "target-accuracy": 0.5}) == {}
    settings = {"num-clients": 3, "num-server-rounds": 2, "model": "mlp", "hidden": "8"}
    planned, plain = plan(None, {**settings, "target-accuracy": 0.9}), plan(None, settings)
    assert any("target-accuracy = 0.9 is not reached" in line for line in planned.assumptions)
    assert not any("target-accuracy" in line for line in plain.assumptions)
    assert planned.methods[0].rounds == plain.methods[0].rounds


def test_a_run_of_the_command_stops_at_its_target(tmp_path):
    settings = {"num-clients": 4, "num-server-rounds": 9, "model": "mlp", "hidden": "32", "batch-size": 32}
    settings |= {"algorithm": "fedavg", "target-accuracy": 0.5, "output-dir": str(tmp_path), "run-name": "run"}
    found = launch.run(None, settings, engine="in-process")
    assert found["status"] == "stopped"
    assert found["final_accuracy"] >= 0.5
    assert found["rounds"] < 9
    assert found["stopped_because"].startswith("target-accuracy = 0.5: the accuracy is ")
