"""A job killed without warning at any moment, and continued, is the job that nobody killed, byte for byte."""

import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mortal_server
import pytest
from mortal_jobs import PHASES

import fedloru_flwr
from fedloru_flwr.engines import app_dir
from fedloru_flwr.runs import RunDirectory

TRIALS = 90
SMALL = {
    "num-clients": 6,
    "num-server-rounds": 6,
    "local-epochs": 1,
    "batch-size": 32,
    "model": "mlp",
    "hidden": "16",
    "accumulate-every": 3,
    "checkpoint-every": 2,
    "fraction-evaluate": 0.5,
    "learning-rate": 0.1,
}
JOBS = {
    "fedloru": {},
    "pfedloru": {"algorithm": "pfedloru", "local-epochs": 3},
    "fedavg, SCAFFOLD": {"algorithm": "fedavg", "accumulate-every": 0, "scaffold": True},
    "fedloru, SCAFFOLD": {"scaffold": True, "batched": False},
    "fedloru, stack": {"accumulate-into": "stack"},
    "fedloru, FedAdam": {"server-optimizer": "fedadam", "server-learning-rate": 0.01},
    "lowrank-ef": {"algorithm": "lowrank-ef", "accumulate-every": 0},
}


@dataclass(frozen=True)
class Kill:
    """A moment: ``where`` in [0, 1) chooses one of the doors of ``phase``; see `mortal_jobs.live` for the delay."""

    phase: str
    where: float
    delay: float | None


@dataclass(frozen=True)
class Trial:
    job: str
    kills: tuple[Kill, ...]


def drawn_trial(index):
    """Of any 35 in a row, each job meets each phase once; every fifth trial is killed twice."""
    rng = random.Random(f"trial {index}")
    jobs = list(JOBS)
    job = jobs[index % len(jobs)]
    phases = [PHASES[index % len(PHASES)], rng.choice(PHASES)][: 2 if index // 2 % 5 == 0 else 1]
    if not {"accumulate-every": 3, **JOBS[job]}["accumulate-every"]:
        phases = ["aggregating" if phase == "accumulating" else phase for phase in phases]
    # One in three at the very door, where nothing else can happen before the kill.
    kills = [
        Kill(phase, rng.random(), None if index % 3 == 0 else rng.choice([0.0005, 0.002, 0.01]) * rng.random())
        for phase in phases
    ]
    return Trial(job, tuple(kills))


class Lives:
    """Runs lives of jobs through a process of `mortal_jobs`."""

    def __init__(self, server, directory):
        self._server, self._directory = server, directory
        self._whole = {}

    def live(self, **what):
        self._server.stdin.write(json.dumps(what) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def whole(self, job):
        """What a job that nobody kills leaves behind, and how many doors it passes."""
        if job not in self._whole:
            directory = self._directory / f"whole {len(self._whole)}"
            directory.mkdir()
            life = self.live(directory=str(directory), settings={**SMALL, **JOBS[job]})
            assert life["status"] == 0, (directory / "log.txt").read_text()
            self._whole[job] = left_behind(directory), life["doors"]
        return self._whole[job]


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    with serving(tmp_path_factory.mktemp("lives")) as server:
        yield server


@contextmanager
def serving(directory):
    environment = {
        **os.environ,
        "FLWR_LOG_LEVEL": "WARNING",
        "MPLCONFIGDIR": str(directory / "matplotlib"),
        "PYTHONPATH": str(Path(fedloru_flwr.__file__).parent.parent),  # the package that is tested here
    }
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("mortal_jobs.py")), str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(directory / "server.txt").open("w"),
        text=True,
        env=environment,
    ) as server:
        server.stdin.write(json.dumps(SMALL) + "\n")
        yield Lives(server, directory)
        server.stdin.close()


def left_behind(directory):
    """What must be equal: the rows without their times, and the model's bytes."""
    lines = (directory / "run/metrics.jsonl").read_text().splitlines()
    rows = [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]
    return [json.dumps(row) for row in rows], (directory / "run/model.safetensors").read_bytes()


def due_checkpoint(rounds, settings):
    """The round of the last checkpoint that must be there once round ``rounds + 1`` has begun."""
    every = [settings["checkpoint-every"], settings["accumulate-every"]]
    return max((done for done in range(1, rounds + 1) if any(one and done % one == 0 for one in every)), default=0)


def assert_little_is_lost(directory, settings):
    """A kill costs the rounds since the last checkpoint that was due, and no more."""
    run = RunDirectory(directory / "run")
    rows = run.read_rounds()
    found = run.latest_checkpoint()
    known = 0 if found is None else found.server_round
    # The row is written before the checkpoint, so that of the last row may be missing still.
    assert known >= due_checkpoint(rows[-1]["round"] - 1 if rows else 0, settings)


def carry_out(lives, trial, directory):
    """Kill a job, once or more often, let it end, and compare; return where the kills met it."""
    settings = {**SMALL, **JOBS[trial.job]}
    expected, doors = lives.whole(trial.job)
    met = []
    for kill in trial.kills:
        door = 1 + int(kill.where * doors[kill.phase])
        life = lives.live(directory=str(directory), settings=settings, phase=kill.phase, door=door, delay=kill.delay)
        assert life["status"] >= 0, (directory / "log.txt").read_text()
        if life["status"] == signal.SIGKILL:
            met.append((kill.phase, kill.phase in life["inside"]))
            assert_little_is_lost(directory, settings)
    life = lives.live(directory=str(directory), settings=settings)
    assert life["status"] == 0, (directory / "log.txt").read_text()
    rows, model = left_behind(directory)
    assert rows == expected[0]
    assert model == expected[1]
    summary = RunDirectory(directory / "run").read_summary()
    assert (summary["status"], summary["rounds"]) == ("finished", SMALL["num-server-rounds"])
    assert [*(directory / "run").glob(".*"), *(directory / "run/checkpoints").glob(".*")] == []
    return met


def spread(met):
    """How many kills each phase met, and how many of them before it was over."""
    return Counter(phase for phase, _ in met), Counter(phase for phase, inside in met if inside)


A_FEW = range(0, TRIALS, 18)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("index", A_FEW)
def test_a_killed_job_continues_as_if_nothing_had_happened(lives, tmp_path, index):
    carry_out(lives, drawn_trial(index), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_ninety_killed_jobs_of_ninety_continue_as_if_nothing_had_happened(lives, tmp_path):
    met, wrong = [], {}
    for index in range(TRIALS):
        directory = tmp_path / str(index)
        directory.mkdir()
        try:
            met += carry_out(lives, drawn_trial(index), directory)
        except AssertionError as error:
            wrong[index] = str(error)[:500]
    assert not wrong
    killed, inside = spread(met)
    assert sum(killed.values()) >= TRIALS, "nearly every life was cut short"
    assert all(killed[phase] >= 10 for phase in PHASES), killed
    assert all(inside[phase] >= 3 for phase in PHASES), inside


ON_RAY = (
    ("fedloru", {}),
    ("pfedloru", JOBS["pfedloru"]),
    ("fedavg, SCAFFOLD", {**JOBS["fedavg, SCAFFOLD"], "accumulate-every": 0}),
)


def drawn_on_ray(index):
    """Each phase twice: at the very door, and a while after it."""
    rng = random.Random(f"on Ray {index}")
    name, more = ON_RAY[index % len(ON_RAY)]
    phase = ("asking", *PHASES[1:])[index % len(PHASES)]
    if phase == "accumulating" and more.get("accumulate-every") == 0:
        name, more = ON_RAY[0]
    return name, more, Kill(phase, rng.random(), 0.0 if index < len(PHASES) else 0.05 * rng.random())


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_jobs_killed_on_ray_of_ten_continue_as_if_nothing_had_happened(lives, tmp_path, monkeypatch):
    table = app_dir.app_table()
    monkeypatch.setattr(
        app_dir,
        "app_table",
        lambda: {**table, "components": {**table["components"], "serverapp": "mortal_server:app"}},
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    expected = {}
    for index in range(10):
        name, more, kill = drawn_on_ray(index)
        settings = {**SMALL, **more, "batched": False}
        if name not in expected:
            whole = tmp_path / f"whole {len(expected)}"
            whole.mkdir()
            life = lives.live(directory=str(whole), settings=settings)
            expected[name] = left_behind(whole), life["doors"]
        left, doors = expected[name]
        settings |= {"output-dir": str(tmp_path / str(index)), "run-name": "run"}
        with monkeypatch.context() as patch:
            patch.setenv(mortal_server.PHASE, kill.phase)
            patch.setenv(mortal_server.DOOR, str(1 + int(kill.where * doors[kill.phase])))
            patch.setenv(mortal_server.DELAY, str(kill.delay))
            with pytest.raises(fedloru_flwr.RunFailedError, match="lost"):
                fedloru_flwr.run(config=settings, engine="flower", num_actors=2, on_line=lambda line: None)
        fedloru_flwr.run(config=settings, engine="flower", resume="auto", num_actors=2, on_line=lambda line: None)
        assert left_behind(tmp_path / str(index)) == left, (index, name, kill)
