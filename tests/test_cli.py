"""The command, as a person uses it: exit status, messages, what is left on disk."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from fedloru_flwr.config import RunConfig
from fedloru_flwr.models import NetworkFactory

COMMAND = str(Path(sys.executable).parent / "fedloru")
SMALL = "num-clients=6 num-server-rounds=2 local-epochs=1 model=mlp hidden=32 accumulate-every=1"


def fedloru(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    home = cwd / "home"
    home.mkdir(exist_ok=True)
    return subprocess.run(
        [COMMAND, *arguments],
        cwd=cwd,
        env={**os.environ, "HOME": str(home), "COLUMNS": "160", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_an_in_process_run_leaves_the_run_directory_of_the_contract_and_nothing_else(tmp_path):
    done = fedloru("run", "--engine", "in-process", "-c", f"{SMALL} run-name=first fraction-evaluate=0.5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "first"
    assert {path.name for path in run.iterdir()} == {
        "manifest.json",
        "metrics.jsonl",
        "summary.json",
        "model.safetensors",
        "checkpoints",
        "curves.png",
    }
    assert (tmp_path / "runs" / "latest").resolve() == run
    assert list((tmp_path / "home").rglob("*")) == []

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert [row["ledger_version"] for row in rows] == [0, 1, 2]
    assert [row["accumulated_rank"] for row in rows] == [0, 4, 8]
    assert rows[1]["clients_ok"] == 3
    assert rows[1]["clients_evaluated"] == 3
    assert rows[1]["bytes_down"] == sum(way["down"] for way in rows[1]["bytes_by_purpose"].values())
    assert rows[1]["bytes_up"] == sum(way["up"] for way in rows[1]["bytes_by_purpose"].values())
    assert set(rows[1]["bytes_by_purpose"]) == {"trainables", "entries", "evaluation", "enrolment"}

    summary = json.loads((run / "summary.json").read_text())
    assert summary["algorithm"] == "fedloru"
    assert summary["status"] == "finished"
    assert summary["rounds"] == 2
    assert summary["total_bytes_up"] == sum(row["bytes_up"] for row in rows)
    assert summary["final_accuracy"] == rows[-1]["accuracy"]
    plain = NetworkFactory("mlp", (1, 8, 8), 10, hidden=(32,))()
    merged = load_file(run / "model.safetensors")
    assert {name: value.shape for name, value in merged.items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    assert summary["model_parameters"] == sum(p.numel() for p in plain.parameters())

    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["config"]["model"] == "mlp"
    assert manifest["versions"]["flwr"] is not None
    # what a person sees
    assert "round 2/2" in done.stdout
    assert "full-rank FedAvg" in done.stdout
    assert str(run) in done.stdout


@pytest.mark.slow
def test_a_given_run_name_is_never_overwritten(tmp_path):
    (tmp_path / "runs" / "first").mkdir(parents=True)
    (tmp_path / "runs" / "first" / "keep.txt").write_text("mine")
    refused = fedloru("run", "--engine", "in-process", "-c", f"{SMALL} run-name=first", cwd=tmp_path)
    assert refused.returncode == 2
    assert "run-name = 'first'" in refused.stderr
    assert "exists already" in refused.stderr
    assert [path.name for path in (tmp_path / "runs" / "first").iterdir()] == ["keep.txt"]


BAD_INPUT = {
    "unknown key": ("rnk=4", "unknown setting 'rnk'; did you mean 'rank'?"),
    "unknown algorithm": ("algorithm=fedlru", "did you mean 'fedloru'?"),
    "rank 0": ("rank=0", "rank = 0 must be at least 1"),
    "rank above every layer": ("rank=500", "no layer is left to factorise at rank 500"),
    "tau below 0": ("accumulate-every=-1", "accumulate-every = -1 must be at least 0"),
    "nobody trains": ("fraction-train=0", "fraction-train = 0.0 must be above 0"),
    "fraction above 1": ("fraction-evaluate=2", "fraction-evaluate = 2.0"),
    "more clients than samples": ("num-clients=1500", "num-clients = 1500"),
    "data path that is not there": ("dataset=local data-path=no/such/file.csv", "no/such/file.csv"),
    "local data without a path": ("dataset=local", "data-path"),
    "unknown dataset": ("dataset=digit", "dataset = 'digit'"),
    "target that matches nothing": ("target-modules=attention", "'attention' matches no"),
    "dense leaves that match nothing": ("dense-leaves=head", "'head' matches no parameter"),
    "unknown partitioner": ("partitioner=dirichle", "partitioner = 'dirichle'"),
    "partition column of digits": ("partitioner=column:writer", "writer"),
    "a network that cannot take the data": ("model=resnet10 dataset=local data-path={table}", "model = 'resnet10'"),
    "output directory that is a file": ("output-dir={table}", "output-dir"),
    "nothing to resume": ("resume={table}.d", "there is no run at"),
    "bad run name": ("run-name=../x", "run-name = '../x'"),
    "a device that is not there": ("device=mps", "device = 'mps' is not available"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_with_one_clear_message_before_anything_starts(case, tmp_path, capsys, monkeypatch):
    from typer.testing import CliRunner

    from fedloru_flwr.cli import app

    monkeypatch.chdir(tmp_path)
    table = tmp_path / "table.csv"
    table.write_text("a,b,label\n" + "".join(f"{i},{i * 2},{i % 2}\n" for i in range(400)))
    settings, message = BAD_INPUT[case]
    outcome = CliRunner().invoke(app, ["run", "-c", settings.format(table=table)])
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert outcome.output.count("fedloru: ") == 1
    assert "Traceback" not in outcome.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["table.csv"]


def test_bad_files_and_engines_are_refused(tmp_path):
    from typer.testing import CliRunner

    from fedloru_flwr.cli import app

    conf = tmp_path / "conf.toml"
    conf.write_text("rank = 'four'\n")
    for arguments, message in [
        (["run", str(conf)], "rank = 'four' must be a whole number"),
        (["run", str(tmp_path / "none.toml")], "there is no configuration file"),
        (["run", "--engine", "spark"], "engine = 'spark' is not one of flower, in-process"),
        (["run", "--num-actors", "0"], "num-actors must be at least 1"),
        (["run", "-c", "rank"], "expected key=value"),
    ]:
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code == 2
        assert message in outcome.output


@pytest.mark.slow
def test_a_layer_too_small_for_the_rank_stays_dense_and_is_named(tmp_path):
    done = fedloru("run", "--engine", "in-process", "-c", f"{SMALL} hidden=12,48,64 rank=14", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "layers.0: stays dense, its dimensions (12 x 64) do not exceed the rank 14" in done.stdout


@pytest.mark.slow
def test_a_run_whose_clients_all_fail_stops_with_status_1_and_its_state_saved(tmp_path):
    # A held-out test set with 10 classes, but clients that are told of 3: every client refuses its labels.
    settings = f"{SMALL} run-name=failing batched=false"
    script = (
        "import fedloru_flwr.clients.training as c, fedloru_flwr.cli as cli\n"
        "def broken(*a, **k): raise OSError('no disk')\n"
        "c.train_locally = broken\n"
        f"import sys; sys.argv = ['fedloru', 'run', '--engine', 'in-process', '-c', {settings!r}]\n"
        "cli.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "3 of 3 clients failed" in done.stderr
    assert "OSError: no disk" in done.stderr
    run = tmp_path / "runs" / "failing"
    assert json.loads((run / "summary.json").read_text())["status"] == "failed"
    assert list((run / "checkpoints").glob("*.safetensors"))


@pytest.mark.slow
def test_an_interrupted_run_is_continued_to_the_same_end(tmp_path):
    settings = f"{SMALL} num-server-rounds=8 checkpoint-every=3 accumulate-every=1"
    whole = fedloru("run", "--engine", "in-process", "-c", f"{settings} run-name=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    script = (
        "import os, fedloru_flwr.runs.console as console, fedloru_flwr.cli as cli\n"
        "end_round = console.RoundProgress.end_round\n"
        "def dying(self, row):\n"
        "    end_round(self, row)\n"
        "    if row['round'] == 6: os.kill(os.getpid(), 9)\n"
        "console.RoundProgress.end_round = dying\n"
        f"import sys; sys.argv = ['fedloru', 'run', '--engine', 'in-process', '-c', {settings + ' run-name=cut'!r}]\n"
        "cli.main()\n"
    )
    killed = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, timeout=120)
    assert killed.returncode == -9
    continued = fedloru(
        "run", "--engine", "in-process", "--resume", "runs/cut", "-c", f"{settings} run-name=cut", cwd=tmp_path
    )
    assert continued.returncode == 0, continued.stderr
    assert "continuing after round 5" in continued.stdout

    def rows(name):
        lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [{**json.loads(line), "seconds": 0} for line in lines]

    assert rows("cut") == rows("whole")
    assert (tmp_path / "runs/cut/model.safetensors").read_bytes() == (
        tmp_path / "runs/whole/model.safetensors"
    ).read_bytes()


def test_the_python_function_does_what_the_command_does(tmp_path, monkeypatch):
    import fedloru_flwr

    monkeypatch.chdir(tmp_path)
    conf = tmp_path / "conf.toml"
    conf.write_text("num-clients = 6\nnum-server-rounds = 1\nlocal-epochs = 1\nalgorithm = 'fedavg'\n")
    summary = fedloru_flwr.run(conf, {"run-name": "by-hand", "num-clients": 4}, engine="in-process")
    assert summary["algorithm"] == "fedavg"
    assert summary["run_dir"] == str(tmp_path / "runs" / "by-hand")
    manifest = json.loads((tmp_path / "runs" / "by-hand" / "manifest.json").read_text())
    assert manifest["config"]["num-clients"] == 4
    assert RunConfig.from_mapping(manifest["config"]).algorithm == "fedavg"


def test_a_continued_run_keeps_its_settings_and_other_ones_are_refused(tmp_path, monkeypatch):
    import fedloru_flwr
    from fedloru_flwr.config import ConfigError

    monkeypatch.chdir(tmp_path)
    begun = {"num-clients": 4, "num-server-rounds": 2, "local-epochs": 1, "learning-rate": 0.05, "run-name": "a"}
    fedloru_flwr.run(config=begun, engine="in-process")
    manifest = (tmp_path / "runs/a/manifest.json").read_text()
    with pytest.raises(ConfigError, match=r"learning-rate was 0\.05, is 0\.5; .*partitioner was 'iid', is 'shards'"):
        fedloru_flwr.run(config={"learning-rate": 0.5, "partitioner": "shards"}, engine="in-process", resume="runs/a")
    changed = {"learning-rate-schedule": "cosine", "num-server-rounds": 3}
    with pytest.raises(ConfigError, match=r"num-server-rounds was 2, is 3"):
        fedloru_flwr.run(config=changed, engine="in-process", resume="runs/a")
    assert (tmp_path / "runs/a/manifest.json").read_text() == manifest
    more = fedloru_flwr.run(config={"num-server-rounds": 3}, engine="in-process", resume="runs/a")
    assert more["rounds"] == 3
    whole = fedloru_flwr.run(config={**begun, "num-server-rounds": 3, "run-name": "b"}, engine="in-process")
    assert whole["final_accuracy"] == more["final_accuracy"]
    continued = json.loads((tmp_path / "runs/a/manifest.json").read_text())
    assert continued["config"]["learning-rate"] == 0.05
    assert continued["config"]["num-server-rounds"] == 3
    assert set(continued["digests"]) == {"root", "lineage", "model"}


def test_resume_auto_continues_the_newest_run_unless_it_has_finished(tmp_path, monkeypatch):
    import fedloru_flwr

    monkeypatch.chdir(tmp_path)
    settings = {"num-clients": 4, "num-server-rounds": 1, "local-epochs": 1}
    first = fedloru_flwr.run(config=settings, engine="in-process", resume="auto")
    second = fedloru_flwr.run(config=settings, engine="in-process", resume="auto")
    assert first["run_dir"] != second["run_dir"]
    assert first["status"] == second["status"] == "finished"
    assert len({row["run_dir"] for row in (first, second)}) == 2


@pytest.mark.slow
def test_an_evaluation_that_fails_leaves_the_state_of_the_last_whole_round(tmp_path, monkeypatch):
    import fedloru_flwr
    from fedloru_flwr.clients import training

    monkeypatch.chdir(tmp_path)
    settings = {"num-clients": 4, "num-server-rounds": 4, "local-epochs": 1, "accumulate-every": 2}
    whole = fedloru_flwr.run(config={**settings, "run-name": "whole"}, engine="in-process")
    real, calls = training.evaluate, []

    def failing(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise ValueError("out of chalk")
        return real(*arguments)

    monkeypatch.setattr(training, "evaluate", failing)
    with pytest.raises(fedloru_flwr.RunFailedError, match=r"out of chalk"):
        fedloru_flwr.run(config={**settings, "run-name": "cut"}, engine="in-process")
    cut = tmp_path / "runs" / "cut"
    assert json.loads((cut / "summary.json").read_text())["status"] == "failed"
    assert json.loads((cut / "summary.json").read_text())["rounds"] == 2
    monkeypatch.setattr(training, "evaluate", real)
    fedloru_flwr.run(engine="in-process", resume="runs/cut")

    def rows(path):
        return [{**json.loads(line), "seconds": 0} for line in (path / "metrics.jsonl").read_text().splitlines()]

    assert rows(cut) == rows(Path(whole["run_dir"]))
    assert (cut / "model.safetensors").read_bytes() == (tmp_path / "runs/whole/model.safetensors").read_bytes()


@pytest.mark.slow
def test_runs_started_together_get_directories_of_their_own(tmp_path):
    running = [
        subprocess.Popen(
            [COMMAND, "run", "--engine", "in-process", "-c", f"{SMALL} num-server-rounds=1 seed={seed}"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
        )
        for seed in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    assert len(list((tmp_path / "runs").glob("*/summary.json"))) == 4  # and latest
