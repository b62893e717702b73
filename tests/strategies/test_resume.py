"""A run that was interrupted and continued is the run that was not: the same rows, the same model, byte for byte."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedMedian,
    FedYogi,
)
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from toy_federation import (
    ConvNet,
    Mlp,
    Watch,
    WatchedGrid,
    client_app,
    federate,
    own_instances,
    own_machines,
    seeded,
    timeless,
    usual,
)

from fedloru_flwr import wire
from fedloru_flwr.clients import session
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FedAvg, FedLoRA, FedLoRU, PFedLoRU, ResumeError
from fedloru_flwr.strategies.inner import InnerStrategy

ROUNDS = 7
NET = seeded(ConvNet)
MLP = seeded(Mlp)


class Killed(Exception):
    pass


def make(run_dir, resume=None, cls=FedLoRU, net=NET, **more):
    own = {FedAvg: {}, FedLoRA: {"rank": 2}, FedLoRU: {"rank": 2, "accumulate_every": 2}}[cls]
    common = usual(fraction_train=0.5, fraction_evaluate=0.5, min_evaluate_nodes=1, enrol=True, checkpoint_every=3)
    return cls(net, run_dir=run_dir, resume=resume, **{**own, **common, **more})


def run(directory, *, resume=None, kill_at=0, kill_in="observer", rounds=ROUNDS, source=NET, evaluates=True, **more):
    """One life of a run: new processes on both sides, the clients' disks as they were."""
    session._hosted.clear()
    strategy = make(directory / "run", resume, **more)

    def at_end(row):
        if kill_in == "observer" and row["round"] == kill_at:
            raise Killed

    def evaluate(server_round, model):
        if kill_in == "evaluation" and server_round == kill_at:
            raise Killed
        return {"accuracy": model.head.bias.sum().item(), "other": 2}

    app = client_app(source, query=True, evaluates=evaluates)
    grid = WatchedGrid(app, 4, watch=Watch(at_end=at_end))
    evaluate_fn = strategy.central_evaluation(evaluate)
    return strategy, federate(strategy, grid, rounds, store=directory / "store", evaluate_fn=evaluate_fn)


def left_behind(directory):
    """What must be equal: the rows without their times, and the model's bytes."""
    return timeless(RunDirectory(directory / "run").read_rounds()), (directory / "run/model.safetensors").read_bytes()


def as_numbers(result):
    return [
        {server_round: dict(metrics) for server_round, metrics in of.items()}
        for of in (
            result.train_metrics_clientapp,
            result.evaluate_metrics_clientapp,
            result.evaluate_metrics_serverapp,
        )
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What runs that nobody interrupted leave behind, by their arguments."""
    known = {}

    def of(**more):
        key = repr(sorted(more.items(), key=str))
        if key not in known:
            directory = tmp_path_factory.mktemp("whole")
            _, result = run(directory, **more)
            known[key] = (left_behind(directory), as_numbers(result))
        return known[key]

    return of


@pytest.mark.parametrize("kill_in", ["observer", "evaluation"])
@pytest.mark.parametrize("kill_at", range(7))
def test_a_run_killed_after_any_round_continues_as_if_nothing_had_happened(tmp_path, whole, kill_at, kill_in):
    with pytest.raises(Killed):
        run(tmp_path, kill_at=kill_at, kill_in=kill_in)
    if kill_at > 2:
        assert RunDirectory(tmp_path / "run").latest_checkpoint()[0] in (kill_at - 1, kill_at - 2)
    _, result = run(tmp_path, resume="auto", kill_at=-1)
    left, numbers = whole(kill_at=-1)
    assert left_behind(tmp_path) == left
    assert as_numbers(result) == numbers
    assert len(left[0]) == ROUNDS + 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"cls": FedAvg},
        {"cls": FedLoRA},
        {"accumulate_into": "stack"},
        {"reinit": "keep"},
        {"inner": "median"},
        {"evaluates": False},
        {"enrol": False},
        {"uplink_codec": "topk:0.3+int4", "downlink_codec": "int8, 4: int4+zstd"},
        {"cls": FedAvg, "uplink_codec": "int8"},
        {"cls": FedAvg, "uplink_codec": "topk:0.1+int4", "downlink_codec": "topk:0.1+int4"},
        {"downlink_codec": "topk:0.1+int4"},
    ],
    ids=str,
)
def test_every_kind_of_run_continues_as_if_nothing_had_happened(tmp_path, arguments):
    arguments = {**arguments, "kill_at": -1}
    inner = (lambda: {"inner": FedMedian()}) if arguments.pop("inner", None) else dict
    run(tmp_path / "whole", **arguments, **inner())
    with pytest.raises(Killed):
        run(tmp_path / "killed", **{**arguments, "kill_at": 5}, **inner())
    run(tmp_path / "killed", resume="auto", **arguments, **inner())
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")


def test_a_run_killed_again_and_again_continues_as_if_nothing_had_happened(tmp_path, whole):
    for kill_at in (1, 3, 4, 4, 6):
        with pytest.raises(Killed):
            run(tmp_path, resume="auto", kill_at=kill_at)
    run(tmp_path, resume="auto", kill_at=-1)
    assert left_behind(tmp_path) == whole(kill_at=-1)[0]


def test_instances_whose_machines_live_on_are_sent_no_base_again(tmp_path):
    source = own_instances(ConvNet, 4)
    run(tmp_path / "whole", source=source, kill_at=-1)
    source = own_instances(ConvNet, 4)
    with pytest.raises(Killed):
        run(tmp_path / "killed", source=source, kill_at=5)
    run(tmp_path / "killed", resume="auto", source=source, kill_at=-1)
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")


def test_clients_that_lost_their_disks_meanwhile_cost_bytes_and_nothing_else(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, kill_at=5)
    shutil.rmtree(tmp_path / "store")
    run(tmp_path, resume="auto", kill_at=-1)
    (rows, model), (expected, same_model) = left_behind(tmp_path), whole(kill_at=-1)[0]
    assert model == same_model
    costs = {"bytes_up", "bytes_down", "bytes_by_purpose"}
    assert [{k: v for k, v in r.items() if k not in costs} for r in rows] == [
        {k: v for k, v in r.items() if k not in costs} for r in expected
    ]
    assert any("repeats" in row["bytes_by_purpose"] for row in rows)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(tmp_path, kill_at=-1)
    before = left_behind(tmp_path)
    strategy, result = run(tmp_path, resume="auto", kill_at=-1)
    assert left_behind(tmp_path) == before
    assert torch.equal(result.arrays.to_torch_state_dict()["head.bias"], strategy.state.trainables["head.bias"])


def test_a_run_can_be_given_more_rounds(tmp_path, whole):
    run(tmp_path, kill_at=-1, rounds=4)
    run(tmp_path, kill_at=-1, resume=tmp_path / "run")
    assert left_behind(tmp_path) == whole(kill_at=-1)[0]


def test_a_damaged_checkpoint_costs_a_few_rounds_and_nothing_else(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, kill_at=5)
    newest = sorted((tmp_path / "run/checkpoints").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.warns(UserWarning, match="cannot be read"):
        run(tmp_path, resume="auto", kill_at=-1)
    assert left_behind(tmp_path) == whole(kill_at=-1)[0]


def test_a_run_that_failed_in_its_first_round_starts_over(tmp_path, whole):
    class Fails(FlowerFedAvg):
        def aggregate_train(self, server_round, replies):
            raise RuntimeError("no memory on the server")

    with pytest.raises(RuntimeError, match="no memory on the server"):
        run(tmp_path, kill_at=-1, inner=Fails())
    assert RunDirectory(tmp_path / "run").read_summary()["status"] == "failed"
    run(tmp_path, resume="auto", kill_at=-1)
    assert left_behind(tmp_path) == whole(kill_at=-1)[0]


def test_an_error_on_the_server_leaves_the_state_after_the_last_round(tmp_path):
    class FailsLater(FlowerFedAvg):
        def aggregate_train(self, server_round, replies):
            if server_round == 6:
                raise RuntimeError("no memory on the server")
            return super().aggregate_train(server_round, replies)

    with pytest.raises(RuntimeError, match="no memory on the server"):
        run(tmp_path, kill_at=-1, inner=FailsLater())
    directory = RunDirectory(tmp_path / "run")
    assert directory.latest_checkpoint()[0] == 5
    assert directory.read_rounds()[-1]["round"] == 5
    assert (directory.read_summary()["status"], directory.read_summary()["rounds"]) == ("failed", 5)


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A run that was killed after round 3."""
    directory = tmp_path_factory.mktemp("killed")
    with pytest.raises(Killed):
        run(directory, kill_at=3, target_modules=["stem", "hidden"])
    return directory


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": 3}, "rank was 2, is 3"),
        ({"alpha": 9.0}, r"alpha was 4\.0, is 9\.0"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"accumulate_every": 3}, "accumulate_every was 2, is 3"),
        ({"accumulate_at": [4]}, r"accumulate_every was 2, is 0; accumulate_at was \[\], is \[4\]"),
        ({"reinit": "keep"}, "reinit was 'reset', is 'keep'"),
        ({"accumulate_into": "stack"}, "accumulate_into was 'merge', is 'stack'"),
        ({"target_modules": "hidden"}, r"layers was \[.*'hidden'\], is \['hidden'\]"),
        ({"dense_leaves": "head"}, "dense_leaves was"),
        ({"fraction_train": 0.75}, r"fraction_train was 0\.5, is 0\.75"),
        ({"min_train_nodes": 3}, "min_train_nodes was 1, is 3"),
        ({"weighted_by_key": "trust"}, "weighted_by was 'num-examples', is 'trust'"),
        ({"inner": FedMedian()}, r"inner was \['FedAvg'\], is \['FedMedian'\]"),
    ],
)
def test_a_run_cannot_be_continued_with_changed_settings_which_are_named(tmp_path, killed, changes, told):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    changed = {"target_modules": ["stem", "hidden"], **changes}
    with pytest.raises(ResumeError, match=f"settings that change the result differ from the run's: {told}"):
        run(tmp_path, resume="auto", kill_at=-1, **changed)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_run_cannot_be_continued_by_another_algorithm_or_from_another_model(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill_at=3)
    with pytest.raises(ResumeError, match="strategy was 'FedLoRU', is 'FedAvg'"):
        run(tmp_path, resume="auto", cls=FedAvg, kill_at=-1)
    other = FedLoRU(seeded(ConvNet, 9), rank=2, accumulate_every=2, run_dir=tmp_path / "run", resume="auto")
    same_but_weights = make(tmp_path / "run", "auto")
    same_but_weights.state, same_but_weights._root_base = other.state, other._root_base
    with pytest.raises(ResumeError, match="initial weights are not those the run was started with"):
        federate(same_but_weights, WatchedGrid(client_app(NET, query=True), 4), ROUNDS)


class Wanders(FlowerFedAvg):
    """A user's own, with a state of its own."""


class OwnAdam(FedAdam):
    """What a user makes of a known one is not known."""


@pytest.mark.parametrize(
    ("inner", "name"),
    [
        (Wanders, "Wanders"),
        (OwnAdam, "OwnAdam"),
        (lambda: DifferentialPrivacyServerSideFixedClipping(Wanders(), 1.0, 1.0, 2), "Wanders"),
    ],
)
def test_an_inner_strategy_with_a_state_of_its_own_cannot_be_continued_and_is_named(tmp_path, inner, name):
    with pytest.raises(Killed):
        run(tmp_path, kill_at=3, inner=inner(), net=MLP, source=MLP)
    with pytest.raises(ResumeError, match=f"inner strategy {name}.* carries state from round to round"):
        run(tmp_path, resume="auto", kill_at=-1, inner=inner(), net=MLP, source=MLP)


@pytest.mark.parametrize("inner", [FedAdam, FedYogi, FedAdagrad, partial(FedAvgM, server_momentum=0.5)], ids=str)
def test_a_server_optimiser_is_continued_with_its_moments(tmp_path, inner):
    """Accumulations, at which moments of factors become zero, before and after the kill."""
    run(tmp_path / "whole", kill_at=-1, inner=inner())
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=5, inner=inner())
    assert RunDirectory(tmp_path / "killed/run").latest_checkpoint()[0] == 4
    run(tmp_path / "killed", resume="auto", kill_at=-1, inner=inner())
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda: DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 0.0, 0.1, 2),
        lambda: DifferentialPrivacyServerSideFixedClipping(FedAdam(), 0.0, 0.1, 2),
        lambda: DifferentialPrivacyServerSideAdaptiveClipping(
            FlowerFedAvg(), 0.0, 2, initial_clipping_norm=1.0, clipped_count_stddev=0.0
        ),
    ],
    ids=["fixed", "fixed around FedAdam", "adaptive"],
)
def test_differential_privacy_is_continued_with_its_clipping_norm(tmp_path, wrapped):
    """Without noise, which comes from no seed of the run."""
    uninterrupted = wrapped()
    run(tmp_path / "whole", kill_at=-1, inner=uninterrupted, net=MLP, source=MLP)
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at=5, inner=wrapped(), net=MLP, source=MLP)
    resumed = wrapped()
    run(tmp_path / "killed", resume="auto", kill_at=-1, inner=resumed, net=MLP, source=MLP)
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")
    assert resumed.clipping_norm == uninterrupted.clipping_norm
    if isinstance(resumed, DifferentialPrivacyServerSideAdaptiveClipping):
        assert resumed.clipping_norm != 1.0


def test_a_privacy_accountant_cannot_be_continued():
    def accounted():
        wrapper = DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 0.0, 0.1, 2)
        wrapper.accountant = object()
        return InnerStrategy(wrapper)

    assert accounted().keeps_unknown_state() == "DifferentialPrivacyServerSideFixedClipping with its accountant"


NAMES = ("south", "east", "west", "north")


def drop_in(directory, *, resume=None, kill_at=0, fraction=1.0, moved=0, strategy_class=PFedLoRU, **more):
    """A life of a run of a user's own app, which answers no queries; its clients have names that are no positions."""
    session._hosted.clear()
    common = usual(fraction_train=fraction, checkpoint_every=3, enrol=False)
    strategy = strategy_class(
        MLP, rank=2, accumulate_every=2, run_dir=directory / "run", resume=resume, **{**common, **more}
    )

    def at_end(row):
        if row["round"] == kill_at:
            raise Killed

    configs = [{**config, "client-id": name} for config, name in zip(own_machines(directory, 4), NAMES, strict=True)]
    grid = WatchedGrid(client_app(MLP), 4, node_configs=configs, watch=Watch(at_end=at_end))
    grid._contexts = {node_id + moved: context for node_id, context in grid._contexts.items()}
    federate(strategy, grid, ROUNDS)
    return strategy


@pytest.mark.parametrize("fraction", [0.5, 1.0])
@pytest.mark.parametrize("strategy_class", [FedLoRU, PFedLoRU], ids=lambda one: one.__name__)
@pytest.mark.parametrize("kill_at", [1, 4])
def test_an_app_that_answers_no_queries_continues_as_if_nothing_had_happened(
    tmp_path, strategy_class, fraction, kill_at
):
    more = {"strategy_class": strategy_class, "fraction": fraction}
    drop_in(tmp_path / "whole", **more)
    with pytest.raises(Killed):
        drop_in(tmp_path / "killed", kill_at=kill_at, **more)
    drop_in(tmp_path / "killed", resume="auto", **more)
    assert left_behind(tmp_path / "killed") == left_behind(tmp_path / "whole")


def test_clients_that_come_back_under_new_nodes_go_on_from_their_own_states(tmp_path):
    drop_in(tmp_path / "whole")
    with pytest.raises(Killed):
        drop_in(tmp_path / "killed", kill_at=4)
    drop_in(tmp_path / "killed", resume="auto", moved=500)
    (rows, model), (expected, whole_model) = left_behind(tmp_path / "killed"), left_behind(tmp_path / "whole")
    assert model == whole_model
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in expected]
    # They are asked twice where they have gone by another's name.
    assert "repeats" in rows[3]["bytes_by_purpose"]
    assert all("repeats" not in row["bytes_by_purpose"] for row in rows[4:])


def test_a_client_that_has_lost_its_state_is_named(tmp_path):
    with pytest.raises(Killed):
        drop_in(tmp_path, kill_at=5)
    shutil.rmtree(tmp_path / "2")  # of client "west"
    drop_in(tmp_path, resume="auto")
    rows = RunDirectory(tmp_path / "run").read_rounds()
    assert [row.get("states_lost") for row in rows] == [None] * 4 + [["west"]] + [None] * 2


def test_the_learning_rate_of_a_users_app_cannot_change_unnoticed(tmp_path):
    def life(rate, **more):
        grid = WatchedGrid(client_app(MLP), 4)
        federate(make(tmp_path / "run", net=MLP, **more), grid, 3, train_config=ConfigRecord({"lr": rate}))

    life(0.1, enrol=False)
    with pytest.raises(ResumeError, match=r"train_config was \{'lr': '0\.1'\}, is \{'lr': '0\.5'\}"):
        life(0.5, enrol=False, resume="auto")


def test_the_bound_on_norms_may_change(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill_at=3)
    run(tmp_path, resume="auto", kill_at=-1, max_norm_ratio=0.0)


def test_a_run_that_goes_on_has_no_summary_of_an_earlier_end(tmp_path):
    run(tmp_path, rounds=3, kill_at=-1)
    assert RunDirectory(tmp_path / "run").read_summary()["status"] == "finished"
    seen = []

    class Looks(Watch):
        def end_round(self, row):
            super().end_round(row)
            seen.append(RunDirectory(tmp_path / "run").read_summary())

    session._hosted.clear()
    strategy = make(tmp_path / "run", "auto")
    federate(strategy, WatchedGrid(client_app(NET, query=True), 4, watch=Looks()), 5, store=tmp_path / "store")
    assert seen == [None, None]


def test_the_checkpoint_written_after_an_error_leaves_the_one_before_usable(tmp_path):
    """Clients keep what the older of the two checkpoints refers to, even if the newer one was written twice."""
    drop_in(tmp_path / "whole")
    with pytest.raises(Killed):
        drop_in(tmp_path / "killed", kill_at=5, checkpoint_every=2)  # after round 4, and once more at the error
    directory = tmp_path / "killed/run/checkpoints"
    (directory / "round-000004.safetensors").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match="taking the one before"):
        drop_in(tmp_path / "killed", resume="auto", checkpoint_every=2)
    rows, model = left_behind(tmp_path / "killed")
    assert model == left_behind(tmp_path / "whole")[1]
    assert all("states_lost" not in row for row in rows)


def test_a_changed_byte_in_the_words_of_a_checkpoint_is_noticed(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, kill_at=6)
    newest = RunDirectory(tmp_path / "run").latest_checkpoint()[0]
    path = tmp_path / f"run/checkpoints/round-{newest:06d}.safetensors"
    content = path.read_bytes()
    changed = content.replace(b'\\"draw\\": ', b'\\"drow\\": ', 1)
    assert changed != content
    path.write_bytes(changed)
    with pytest.warns(UserWarning, match="does not match its digest"):
        assert RunDirectory(tmp_path / "run").latest_checkpoint()[0] < newest


def test_an_entry_is_on_disk_before_a_message_carries_it(tmp_path):
    class Looks(WatchedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            for message in messages:
                for entry in wire.read_order(message).entries if message.metadata.message_type != "query" else ():
                    carried.append(entry.digest)
                    assert (tmp_path / f"run/checkpoints/parts/{entry.digest}.safetensors").exists()
            return super().send_and_receive(messages, timeout=timeout)

    carried = []
    federate(make(tmp_path / "run", checkpoint_every=100), Looks(client_app(NET, query=True), 4), 5)
    assert len(set(carried)) == 2


def test_where_there_is_nothing_to_continue(tmp_path):
    without_directory = FedLoRU(NET, rank=2, resume="auto", **usual())
    with pytest.raises(ResumeError, match="needs a run_dir"):
        federate(without_directory, WatchedGrid(client_app(NET), 4), 1)
    with pytest.raises(ResumeError, match="nowhere holds no run to continue"):
        run(tmp_path, resume=tmp_path / "nowhere", kill_at=-1)
    assert not (tmp_path / "nowhere").exists()
    run(tmp_path, resume="auto", kill_at=-1, rounds=1)
    assert [row["round"] for row in RunDirectory(tmp_path / "run").read_rounds()] == [0, 1]


def test_metrics_of_any_kind_survive_in_the_result(tmp_path):
    def run_once(resume, rounds):
        session._hosted.clear()
        strategy = make(
            tmp_path / "run",
            resume,
            train_metrics_aggr_fn=lambda contents, key: MetricRecord({"l": [1.5, float("nan")], "n": len(contents)}),
        )
        grid = WatchedGrid(client_app(NET, query=True), 4)
        return federate(strategy, grid, rounds, store=tmp_path / "store", train_config=ConfigRecord({"a": 1}))

    run_once(None, 3)
    again = run_once("auto", 4)
    assert sorted(again.train_metrics_clientapp) == [1, 2, 3, 4]
    assert repr(again.train_metrics_clientapp[1]) == repr(MetricRecord({"l": [1.5, float("nan")], "n": 2}))


# One life of a run for each line on standard input: a fork, so that torch is imported once. It kills itself at a given
# flush or rename: when a file has its new content under a temporary name, or its new name, or a line is written.
SERVANT = """
import os, signal, sys, traceback
sys.path.insert(0, sys.argv[1])
import torch
import peft
from pathlib import Path
from fedloru_flwr.runs import RunDirectory
import test_resume
torch.set_num_threads(1)
RunDirectory.draw_curves = lambda self: None

def life(directory, last):
    flushes = 0
    def fsync(descriptor):
        nonlocal flushes
        flushes += 1
        if flushes == last:
            os.kill(os.getpid(), signal.SIGKILL)
    os.fsync = fsync
    replace = Path.replace
    def renamed(path, target):
        fsync(None)
        return replace(path, target)
    Path.replace = renamed
    test_resume.run(directory, resume="auto", kill_at=-1)
    (directory / "flushes").write_text(str(flushes))

for line in sys.stdin:
    directory, last = line.split()
    process_id = os.fork()
    if process_id == 0:
        try:
            life(Path(directory), int(last))
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitpid(process_id, 0)[1], flush=True)
"""


def test_a_run_killed_without_warning_at_any_moment_continues_as_if_nothing_had_happened(tmp_path, whole):
    environment = {**os.environ, "FEDLORU_STORE": str(tmp_path / "unused")}
    with subprocess.Popen(
        [sys.executable, "-c", SERVANT, str(Path(__file__).parent)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as servant:

        def live(directory, last=0):
            """Run until the end, or until the given flush."""
            servant.stdin.write(f"{directory} {last}\n")
            servant.stdin.flush()
            assert int(servant.stdout.readline()) == (signal.SIGKILL if last else 0)

        live(tmp_path / "uninterrupted")
        expected = left_behind(tmp_path / "uninterrupted")
        assert json.dumps(expected[0]) == json.dumps(whole(kill_at=-1)[0][0]), "in another process, the same run"
        flushes = int((tmp_path / "uninterrupted/flushes").read_text())
        assert flushes > 50
        reached = set()
        for last in random.Random(7).sample(range(1, flushes + 1), 6):
            directory = tmp_path / str(last)
            live(directory, last)
            reached.add(len(RunDirectory(directory / "run").read_rounds()))
            live(directory)
            assert left_behind(directory) == expected
        servant.stdin.close()
    assert len(reached) > 2, "the kills came in different rounds"
