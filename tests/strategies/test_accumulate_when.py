"""Accumulation that waits for a plateau: of the training loss, or of how much of the rank is used."""

from functools import partial
from itertools import pairwise

import pytest
import torch
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from toy_federation import Mlp, Watch, WatchedGrid, client_app, federate, seeded, timeless, usual

from fedloru_flwr import launch
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.plan import plan
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FedAvg, FedLoRA, FedLoRU, FedLoRUSeeded, FFALoRA, ResumeError, RoLoRA

NET = seeded(Mlp)


class Killed(Exception):
    pass


def make(run_dir=None, cls=FedLoRU, **more):
    own = {"rank": 2, "target_modules": "hidden", "checkpoint_every": 100}
    return cls(NET, run_dir=run_dir, resume="auto" if run_dir else None, **{**own, **usual(), **more})


def run(strategy, rounds=8, *, losses=None, store=None, at_end=lambda row: None):
    """The rounds that accumulated; every client says the loss of the table."""

    def told(reply, session):
        if losses is not None:
            reply.content["metrics"]["train_loss"] = losses[session.server_round - 1]
        return reply

    grid = WatchedGrid(client_app(NET, tamper=told), 4, watch=Watch(at_end=at_end))
    federate(strategy, grid, rounds, store=store)
    versions = [0, *(row["ledger_version"] for row in grid.watch.rows)]
    return [t for t, (before, after) in enumerate(pairwise(versions), start=1) if after > before]


def test_it_accumulates_where_the_loss_has_plateaued_or_after_the_longest_wait():
    falling = [0.9**n for n in range(8)]
    assert run(make(accumulate_every=5, accumulate_when="loss"), losses=falling) == [5]
    assert run(make(accumulate_every=5, accumulate_when="loss"), losses=[1.0] * 8) == [5]
    # Better in round 2, no better in 3 and 4; what was before the accumulation in round 4 is forgotten.
    assert run(make(accumulate_every=9, accumulate_when="loss"), losses=[4, 3, 3, 3, 9, 5, 5, 5]) == [4, 8]


def test_it_accumulates_where_the_rank_is_used():
    """Of rank 1 everything is used at once, so that it accumulates as often as it may."""
    assert run(make(rank=1, accumulate_every=5, accumulate_when="rank")) == [2, 4, 6, 8]
    seen = []
    strategy = make(rank=4, accumulate_every=4, accumulate_when="rank")
    due = run(strategy, at_end=lambda row: seen.append(strategy.state.progress))
    assert all(0.25 <= used <= 1 for progress in seen for used in progress)
    assert [n for n, progress in enumerate(seen, start=1) if not progress] == due
    assert [2 <= after - before <= 4 for before, after in pairwise([0, *due])] == [True] * len(due)


def test_one_sided_factors_and_hadamard_products_have_a_rank_too():
    for more in ({"cls": FedLoRUSeeded}, {"adapter": "loha"}, {"cls": FFALoRA, "alpha": 40.0}):
        due = run(make(accumulate_every=4, accumulate_when="rank", **more))
        assert due[0] in (2, 3, 4), more


def test_a_round_without_a_result_is_no_round_of_the_wait():
    class Pauses(FlowerFedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            return (None if server_round == 2 else arrays), metrics

    assert run(make(accumulate_every=3, accumulate_when="loss", inner=Pauses()), losses=[0.5**n for n in range(8)]) == [
        4,
        7,
    ]


def left_behind(directory):
    found = RunDirectory.open(directory / "run")
    return timeless(found.read_rounds()), (found.path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("when", ["loss", "rank"])
@pytest.mark.parametrize("kill_at", [1, 2, 3, 5, 6])
def test_a_run_that_was_killed_while_it_waited_is_the_run_that_was_not(tmp_path, when, kill_at):
    more = {"rank": 4, "accumulate_every": 5, "accumulate_when": when, "alpha": 0.4}

    def kill(row):
        if row["round"] == kill_at:
            raise Killed

    due = run(make(tmp_path / "whole/run", **more), store=tmp_path / "whole/store")
    with pytest.raises(Killed):
        run(make(tmp_path / "killed/run", **more), store=tmp_path / "killed/store", at_end=kill)
    found = RunDirectory.open(tmp_path / "killed/run").latest_checkpoint()
    if kill_at > 1:
        waited = kill_at - 1 - max((at for at in due if at < kill_at), default=0)
        assert (found.server_round, len(found.state["progress"])) == (kill_at - 1, waited)
    run(make(tmp_path / "killed/run", **more), store=tmp_path / "killed/store")
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")


def test_a_run_cannot_be_continued_with_another_rule(tmp_path):
    run(make(tmp_path / "run", accumulate_every=4, accumulate_when="loss"), rounds=2)
    with pytest.raises(ResumeError, match="accumulate_when was 'loss', is 'rank'"):
        run(make(tmp_path / "run", accumulate_every=4, accumulate_when="rank"), rounds=3)


def test_replies_without_a_loss_end_the_run_with_the_reason():
    def told(reply, session):
        del reply.content["metrics"]["train_loss"]
        return reply

    strategy = make(accumulate_every=4, accumulate_when="loss")
    with pytest.raises(
        AggregationError, match="waits for the metric train_loss of the clients' replies, which have none"
    ):
        federate(strategy, WatchedGrid(client_app(NET, tamper=told), 4), 2)


def private():
    return DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 0.1, 1.0, 2)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (partial(make, accumulate_when="time"), "accumulate-when must be 'loss' or 'rank', got 'time'"),
        (partial(make, accumulate_when="loss", accumulate_every=2), "which must be at least 3, got 2"),
        (partial(make, cls=FedLoRUSeeded, accumulate_when="loss"), "which must be at least 3, got 1"),
        (partial(make, accumulate_when="loss", accumulate_at="3"), "accumulate_at and accumulate_when='loss' exclude"),
        (partial(make, cls=FedLoRA, accumulate_when="rank"), "FedLoRA cannot accumulate: FedLoRA that accumulates is"),
        (partial(make, cls=FFALoRA, accumulate_when="rank"), "FFALoRA does not accumulate by itself: .* needs acc"),
        (
            partial(make, cls=RoLoRA, accumulate_when="rank", accumulate_every=4),
            "RoLoRA cannot have accumulate_when='r",
        ),
        (lambda: make(accumulate_when="loss", inner=private()), "cannot be combined with accumulate_when='loss': when"),
        (lambda: FedAvg(NET, accumulate_when="loss"), "unexpected keyword argument 'accumulate_when'"),
    ],
)
def test_what_cannot_wait_for_a_plateau_is_refused_with_the_reason(wrong, told):
    with pytest.raises((ValueError, TypeError), match=told):
        wrong()


def test_under_differential_privacy_the_rank_may_decide():
    assert make(accumulate_when="rank", inner=private()).schedule.when == "rank"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"accumulate-when": "lose"}, "accumulate-when = 'lose' is not one of \"\", loss, rank; did you mean 'loss'"),
        ({"accumulate-when": "loss", "accumulate-at": "5"}, "accumulate-when and accumulate-at exclude each other"),
        (
            {"accumulate-when": "loss", "algorithm": "fedavg"},
            "accumulate-when = 'loss' means nothing to algorithm = 'f",
        ),
        (
            {"accumulate-when": "rank", "learning-rate-restart": True, "learning-rate-schedule": "cosine"},
            "learning-rate-restart = true does not go with accumulate-when = 'rank'",
        ),
    ],
)
def test_settings_that_make_no_sense_with_it_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        RunConfig.from_mapping(settings)


SMALL = {
    "num-clients": 4,
    "num-server-rounds": 6,
    "model": "mlp",
    "hidden": "32,32",
    "batch-size": 64,
    "local-epochs": 1,
}


def test_a_plan_takes_the_most_accumulations_there_can_be_and_says_so(tmp_path):
    settings = {**SMALL, "accumulate-when": "rank", "accumulate-every": 5}
    planned, often = plan(None, settings), plan(None, {**SMALL, "accumulate-every": 2})
    assert planned.methods[0].rounds == often.methods[0].rounds
    assert any("accumulate-when = 'rank' finds a plateau every 2 rounds" in line for line in planned.assumptions)
    found = launch.run(None, {**settings, "output-dir": str(tmp_path)}, engine="in-process")
    assert 1 <= RunDirectory.open(found["run_dir"]).read_rounds()[-1]["ledger_version"] <= 3
    assert found["total_bytes_up"] <= planned.methods[0].bytes_up
    assert found["total_bytes_down"] <= planned.methods[0].bytes_down


def test_an_accumulation_that_was_waited_for_leaves_the_function_as_it_is():
    before = make(accumulate_every=3, accumulate_when="loss")
    fixed = make(accumulate_every=3)
    assert run(before, 3, losses=[3, 2, 1]) == run(fixed, 3, losses=[3, 2, 1]) == [3]
    for one, other in zip(before.merged_state_dict().values(), fixed.merged_state_dict().values(), strict=True):
        assert torch.equal(one, other)
