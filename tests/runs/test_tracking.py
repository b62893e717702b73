"""What trackers are told of a run: all of its numbers, every round once, and never a reason to stop."""

import importlib.util
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import fedloru_flwr
from fedloru_flwr.config import TRACKERS, ConfigError, RunConfig
from fedloru_flwr.runs import (
    Known,
    RunDirectory,
    TensorBoardTracker,
    TrackerError,
    Tracking,
    make_trackers,
    scalars_of,
    tracking,
)

SMALL = {
    "num-clients": 4,
    "num-server-rounds": 3,
    "local-epochs": 1,
    "model": "mlp",
    "hidden": "16",
    "accumulate-every": 2,
    "fraction-evaluate": 1.0,
    "checkpoint-every": 2,
}
SUMMARY = {"status": "finished", "rounds": 3, "final_accuracy": 0.5}

pytestmark = pytest.mark.usefixtures("quick_books")


def row(server_round, **more):
    return {"round": server_round, "bytes_up": 10, "bytes_down": 20, **more}


class Kept:
    """A tracker that keeps what it is told, and raises where it is told to."""

    name = "kept"

    def __init__(self, down=(), start_down=0, known=None):
        self.down, self.start_down, self.known = set(down), start_down, known
        self.started, self.rounds, self.finished, self.tried = [], [], [], []

    def start(self, run, known):
        self.started.append((run, known))
        if len(self.started) <= self.start_down:
            raise ConnectionError("no network")
        return self.known or known._replace(id="its own")

    def round(self, server_round, scalars):
        self.tried.append(server_round)
        if len(self.tried) in self.down:
            raise ConnectionError("no network")
        self.rounds.append((server_round, dict(scalars)))

    def finish(self, summary):
        self.finished.append(dict(summary))

    @property
    def told(self):
        return [server_round for server_round, _ in self.rounds]


class Books:
    """A run's rows and trackers, as the books of a strategy keep them."""

    def __init__(self, directory, *trackers, last_round=-1, **config):
        self.directory, self.tracking = directory, Tracking(trackers)
        directory.truncate_rounds(last_round)
        self.tracking.begin(directory, config)

    def rows(self, *rounds):
        for server_round in rounds:
            one = row(server_round, accuracy=server_round / 10)
            self.directory.append_round(one)
            self.tracking.round(one)


@pytest.fixture
def directory(tmp_path):
    return RunDirectory.create(tmp_path, "a")


@pytest.fixture
def warnings(monkeypatch):
    told = []
    monkeypatch.setattr(tracking, "log", lambda level, text, *values: told.append(text % values))
    return told


def test_every_number_of_a_row_has_one_name_and_bytes_are_summed_up():
    first = row(0, accuracy=None, loss=2, bytes_by_purpose={}, failures={})
    second = row(
        1,
        accuracy=0.25,
        loss=math.nan,
        bytes_by_purpose={"entries": {"up": 0, "down": 7}},
        failures={"3": "TimeoutError"},
        states_lost=["4"],
        clients={"loss": {"mean": 1.5}},
        aggregation_error={"fc1": 0.125},
        metrics={"f1": 0.5, "by-class": [1.0, 2.0]},
    )
    assert list(scalars_of([first, second])) == [
        (0, {"bytes_up": 10, "bytes_down": 20, "loss": 2, "total_bytes_up": 10, "total_bytes_down": 20}),
        (
            1,
            {
                "bytes_up": 10,
                "bytes_down": 20,
                "accuracy": 0.25,
                "bytes_by_purpose/entries/up": 0,
                "bytes_by_purpose/entries/down": 7,
                "clients/loss/mean": 1.5,
                "aggregation_error/fc1": 0.125,
                "metrics/f1": 0.5,
                "metrics/by-class/0": 1.0,
                "metrics/by-class/1": 2.0,
                "total_bytes_up": 20,
                "total_bytes_down": 40,
            },
        ),
    ]


def test_a_tracker_is_told_of_the_settings_each_round_and_the_end(directory):
    kept = Kept()
    books = Books(directory, kept, rank=4, layers=["fc1", "fc2"], nothing=None, scaffold=False)
    books.rows(0, 1, 2)
    books.tracking.finish(SUMMARY)
    ((run, known),) = kept.started
    assert known == Known("", -1)
    assert (run.name, run.path, run.last_round) == ("a", directory.path, -1)
    assert run.config == {"rank": 4, "layers/0": "fc1", "layers/1": "fc2", "nothing": "None", "scaffold": False}
    assert kept.rounds == list(scalars_of(directory.read_rounds()))
    assert kept.rounds[2][1]["total_bytes_down"] == 60
    assert kept.finished == [SUMMARY]


def test_a_run_that_goes_on_is_the_same_for_its_tracker_which_is_told_of_later_rounds_alone(directory):
    Books(directory, Kept()).rows(0, 1, 2, 3)
    again = Kept()
    books = Books(directory, again, last_round=2)  # the checkpoint's: round 3 is computed anew
    books.rows(3, 4)
    ((run, known),) = again.started
    assert (run.last_round, known) == (2, Known("its own", 3))
    assert again.told == [4]
    assert again.rounds[0][1]["total_bytes_up"] == 50
    replacing = Kept(known=Known("its own", 1))  # one that has only rounds 0 and 1, or wants the others anew
    Books(directory, replacing, last_round=3).rows(4)
    assert replacing.told == [2, 3, 4]


def test_a_tracker_that_is_added_later_gets_the_earlier_rounds(directory):
    Books(directory).rows(0, 1, 2)
    late = Kept()
    Books(directory, late, last_round=2).rows(3)
    assert late.rounds == list(scalars_of(directory.read_rounds()))


def test_a_tracker_that_raises_is_warned_of_once_and_later_told_of_all_it_has_missed(directory, warnings):
    broken, whole = Kept(down={2, 3}), Kept()
    broken.name = "broken"
    books = Books(directory, broken, whole)
    books.rows(0, 1, 2, 3)
    assert broken.tried == [0, 1, 1]  # then it is left alone for a round
    books.rows(4, 5)
    assert broken.told == whole.told == [0, 1, 2, 3, 4, 5]
    assert broken.rounds == whole.rounds
    assert len(warnings) == 1
    assert "tracking by broken has failed" in warnings[0]
    assert "ConnectionError: no network" in warnings[0]


def test_a_tracker_that_does_not_come_up_until_the_end_is_told_of_everything_then(directory, warnings):
    kept = Kept(start_down=3)
    books = Books(directory, kept)
    books.rows(0, 1, 2)
    assert len(kept.started) == 3  # at the beginning, in round 0 and in round 2
    books.tracking.finish(SUMMARY)
    assert kept.told == [0, 1, 2]
    assert kept.finished == [SUMMARY]
    assert len(warnings) == 1


def test_a_run_does_not_wait_for_a_tracker_that_hangs_which_catches_up_once_it_answers(
    directory, warnings, monkeypatch
):
    monkeypatch.setattr(tracking, "_PATIENCE", 0.05)
    answers = threading.Event()

    class Hanging(Kept):
        def round(self, server_round, scalars):
            """Answers when it may."""
            assert answers.wait(30)
            super().round(server_round, scalars)

    hanging, whole = Hanging(), Kept()
    hanging.name = "hanging"
    books = Books(directory, hanging, whole)
    books.rows(0, 1, 2)
    assert whole.told == [0, 1, 2]
    assert hanging.told == []
    assert len(warnings) == 1
    assert "tracking by hanging takes more than 0.05 seconds" in warnings[0]
    answers.set()
    books.tracking.finish(SUMMARY)
    assert hanging.told == [0, 1, 2]
    assert hanging.finished == [SUMMARY]
    assert hanging.rounds == whole.rounds


def test_a_damaged_note_of_how_far_trackers_are_does_not_stop_a_run(directory, warnings):
    (directory.path / "tracking.json").write_text('{"kept": 3}')
    kept = Kept()
    Books(directory, kept).rows(0)
    assert kept.told == [0]
    assert "trackers begin anew" in warnings[0]


def test_two_trackers_of_one_name_and_trackers_without_a_directory_are_refused():
    from fedloru_flwr.strategies import FedLoRU

    with pytest.raises(ValueError, match="two are called 'kept'"):
        Tracking([Kept(), Kept()])
    with pytest.raises(ValueError, match="trackers need a run_dir"):
        FedLoRU(lambda: nn.Sequential(nn.Linear(20, 20)), rank=2, target_modules="0", trackers=[Kept()])


def test_a_misspelt_tracker_is_refused_with_a_hint():
    assert tuple(tracking._KINDS) == TRACKERS
    assert RunConfig.from_mapping({"track": " wandb, tensorboard,wandb,"}).trackers == ("wandb", "tensorboard")
    with pytest.raises(ConfigError) as refusal:
        RunConfig.from_mapping({"track": "tensorboard,wandbb"})
    assert str(refusal.value) == (
        "track = 'tensorboard,wandbb': 'wandbb' is not one of tensorboard, wandb, mlflow; did you mean 'wandb'?"
    )
    with pytest.raises(ConfigError, match="track-project is empty"):
        RunConfig.from_mapping({"track-project": " "})


@pytest.mark.parametrize("there", [None, "a directory"])
@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_library_is_refused_before_anything_starts_with_what_to_install(name, there, tmp_path, monkeypatch):
    nothing = importlib.util.spec_from_loader(name, None) if there else None  # as wandb leaves one where it is used
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda one, *more: nothing if one == name else find_spec(one))
    told = rf"the library {name} is not installed: pip install 'fedloru-flwr\[{name}\]'"
    with pytest.raises(TrackerError, match=told):
        make_trackers([name])
    with pytest.raises(TrackerError, match=told):
        fedloru_flwr.run(config={**SMALL, "track": name, "output-dir": str(tmp_path / "runs")}, engine="in-process")
    assert not (tmp_path / "runs").exists()


def test_no_library_is_imported_unless_it_is_used():
    code = (
        "import sys, fedloru_flwr.job, fedloru_flwr.runs as runs; runs.make_trackers(['tensorboard'])\n"
        "print([name for name in ('tensorboard', 'wandb', 'mlflow') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def run(tmp_path, name, **more):
    settings = {**SMALL, "output-dir": str(tmp_path / "runs"), "run-name": name, **more}
    return Path(fedloru_flwr.run(config=settings, engine="in-process")["run_dir"])


def interrupted_and_continued(tmp_path, name, monkeypatch, **more):
    """A run that is interrupted after round 3, goes on from its checkpoint after round 2, and ends with round 5."""
    from fedloru_flwr.runs import RoundProgress

    end_round = RoundProgress.end_round

    def dying(self, one):
        end_round(self, one)
        if one["round"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RoundProgress, "end_round", dying)
        # What a kill would leave: the last checkpoint is not one of the interrupt's own.
        patch.setattr("fedloru_flwr.strategies.federated.FederatedStrategy._close_run", lambda *a: None)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, name, **{**more, "num-server-rounds": 5})
    (at,) = (tmp_path / "runs" / name).glob("checkpoints/round-000002.safetensors")
    assert at.exists()
    assert len((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()) == 4
    return run(tmp_path, name, resume="auto", **{**more, "num-server-rounds": 5})


def killed_and_continued(tmp_path, name, **more):
    """A run whose process is killed after round 3, and which goes on from its checkpoint after round 2 to round 5."""
    settings = {**SMALL, "output-dir": str(tmp_path / "runs"), "run-name": name, **more, "num-server-rounds": 5}
    code = (
        "import os, torch, fedloru_flwr\n"
        "from fedloru_flwr.runs import RoundProgress\n"
        "torch.set_num_threads(1)\n"
        "RoundProgress.end_round = lambda self, row: row['round'] == 3 and os.kill(os.getpid(), 9)\n"
        f"fedloru_flwr.run(config={settings!r}, engine='in-process')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    assert len((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()) == 4
    return run(tmp_path, name, resume="auto", **more, **{"num-server-rounds": 5})


def expected(path):
    """What a tracker holds of a run: by name, the value of every round."""
    series = {}
    for server_round, scalars in scalars_of(RunDirectory(path).read_rounds()):
        for name, value in scalars.items():
            series.setdefault(name, {})[server_round] = value
    return series


def events_of(path):
    """What TensorBoard shows of a run: by name, the steps and values in their order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}).Reload()
    return events, {name: [(one.step, one.value) for one in events.Scalars(name)] for name in events.Tags()["scalars"]}


def assert_tensorboard_shows(path):
    _, series = events_of(path)
    single = {
        name: [(at, float(np.float32(one))) for at, one in rounds.items()] for name, rounds in expected(path).items()
    }
    assert series == single
    return series


def test_tensorboard_shows_every_round_of_a_run_once_and_the_run_is_the_same(tmp_path, fresh_process, rows_of):
    plain, tracked = run(tmp_path, "plain"), run(tmp_path, "tracked", track="tensorboard")
    series = assert_tensorboard_shows(tracked)
    assert [step for step, _ in series["accuracy"]] == [0, 1, 2, 3]
    assert {"train_loss", "clients_failed", "clients/loss/worst_decile", "seconds"} <= set(series)
    assert {"aggregation_error/layers.0", "bytes_by_purpose/trainables/up", "total_bytes_down"} <= set(series)
    assert rows_of(plain) == rows_of(tracked)
    assert (plain / "model.safetensors").read_bytes() == (tracked / "model.safetensors").read_bytes()
    assert not (plain / "tracking.json").exists()
    events, _ = events_of(tracked)
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    data = HParamsPluginData.FromString(events.PluginTagToContent("hparams")["_hparams_/session_start_info"])
    assert data.session_start_info.hparams["learning-rate"].number_value == RunConfig().learning_rate
    assert data.session_start_info.hparams["track"].string_value == "tensorboard"
    (text,) = events.Tensors("summary/text_summary")
    assert json.loads(text.tensor_proto.string_val[0]) == json.loads((tracked / "summary.json").read_text())


def test_tensorboard_shows_an_interrupted_run_that_was_continued_as_one(tmp_path, fresh_process, monkeypatch):
    path = interrupted_and_continued(tmp_path, "cut", monkeypatch, track="tensorboard")
    series = assert_tensorboard_shows(path)
    assert [step for step, _ in series["loss"]] == [0, 1, 2, 3, 4, 5]
    assert len(list((path / "tensorboard").iterdir())) == 2


def test_tracking_is_switched_on_and_off_when_a_run_is_continued(tmp_path, fresh_process):
    path = run(tmp_path, "a", **{"num-server-rounds": 1})
    run(tmp_path, "a", resume="auto", track="tensorboard", **{"num-server-rounds": 2})
    assert [step for step, _ in assert_tensorboard_shows(path)["loss"]] == [0, 1, 2]
    run(tmp_path, "a", resume="auto", track="", **{"num-server-rounds": 3})
    run(tmp_path, "a", resume="auto", track="tensorboard", **{"num-server-rounds": 4, "track-project": "other"})
    assert [step for step, _ in assert_tensorboard_shows(path)["loss"]] == [0, 1, 2, 3, 4]


def test_event_files_that_were_removed_are_written_anew(directory):
    Books(directory, TensorBoardTracker()).rows(0, 1)
    for file in (directory.path / "tensorboard").iterdir():
        file.unlink()
    Books(directory, TensorBoardTracker(), last_round=1).rows(2)
    assert [step for step, _ in assert_tensorboard_shows(directory.path)["accuracy"]] == [0, 1, 2]


@pytest.fixture
def quiet_wandb(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "SILENT": "true", "CACHE_DIR": "cache", "CONFIG_DIR": "config"}.items():
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / value) if name.endswith("DIR") else value)
    monkeypatch.delenv("WANDB_DIR", raising=False)


def records_of(file):
    """The records of a log in LevelDB's format, behind W&B's own seven bytes."""
    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield record
            record = b""


def wandb_records(path):
    """What the files of a run say that `wandb sync` would send: the steps, the ids and the settings."""
    from wandb.proto.wandb_internal_pb2 import Record

    series, ids, config = {}, [], {}
    for file in sorted(path.glob("wandb/offline-run-*/*.wandb"), key=lambda one: one.stat().st_mtime):
        for data in records_of(file):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.append((record.run.project, record.run.run_id, record.run.display_name))
                config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                series.setdefault(name, []).append((record.history.step.num, json.loads(item.value_json)))
    return {name: values for name, values in series.items() if not name.startswith("_")}, ids, config


def test_wandb_gets_every_round_of_a_killed_run_once_under_one_id(tmp_path, fresh_process, quiet_wandb):
    path = killed_and_continued(tmp_path, "cut", track="wandb", **{"track-project": "mine"})
    series, ids, config = wandb_records(path)
    assert series == {name: list(rounds.items()) for name, rounds in expected(path).items()}
    assert [step for step, _ in series["loss"]] == [0, 1, 2, 3, 4, 5]
    known = json.loads((path / "tracking.json").read_text())["wandb"]
    assert known["last_round"] == 5
    project, run_id = known["id"].split("/")
    assert set(ids) == {(project, run_id, "cut")} == {("mine", run_id, "cut")}
    assert config["learning-rate"] == RunConfig().learning_rate


@pytest.fixture
def mlflow_at(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")


def test_mlflow_gets_every_round_of_a_killed_run_once_in_one_run(tmp_path, fresh_process, mlflow_at):
    from mlflow import MlflowClient

    path = killed_and_continued(tmp_path, "cut", track="mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("fedloru-flwr")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_name, found.info.status) == ("cut", "FINISHED")
    assert found.data.params["learning-rate"] == str(RunConfig().learning_rate)
    assert found.data.tags["summary/status"] == "finished"
    assert found.data.metrics["summary/rounds"] == 5
    rows = expected(path)
    del rows["seconds"]  # that of round 3 is as it was computed first
    for name, rounds in rows.items():
        history = client.get_metric_history(found.info.run_id, name)
        assert sorted((one.step, one.value) for one in history) == list(rounds.items()), name
    again = run(tmp_path, "cut", resume="auto", track="mlflow", **{"num-server-rounds": 6})
    assert len(client.search_runs([experiment.experiment_id])) == 1
    history = client.get_metric_history(found.info.run_id, "accuracy")
    assert sorted((one.step, one.value) for one in history) == list(expected(again)["accuracy"].items())


def test_names_that_mlflow_would_refuse_are_mended():
    assert tracking._key("aggregation_error/conv1.weight") == "aggregation_error/conv1.weight"
    assert tracking._key("metrics/F1 (macro): ä/../x//y") == "metrics/F1 _macro__ ä/_/x/_/y"
    assert len(tracking._key("x" * 999)) == 250
