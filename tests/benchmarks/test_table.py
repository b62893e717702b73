import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import aggregation
from benchmarks.measuring import Harness, Rival
from benchmarks.rivals.report import Task
from benchmarks.table import Figure, Results, ratio

ROOT = Path(__file__).parents[2]
MACHINE = {"processor": "p", "cores": "2", "torch": "t", "commit": "c"}


def test_a_ratio_is_formed_within_repetitions_and_its_median_is_judged():
    slow, fast = Figure("digits", "slow", "s", [10.0, 30.0, 21.0]), Figure("digits", "fast", "s", [1.0, 2.0, 3.0])
    row = ratio(slow, fast, ">= 10")
    assert row.values == [10.0, 15.0, 7.0]
    assert row.median == 10.0
    assert row.met is True
    assert ratio(fast, slow, "<= 0.05").met is False
    assert ratio(fast, slow).met is None


def test_what_was_not_measured_is_in_the_table_with_its_reason(tmp_path):
    absent = Figure("digits", "ours, 2 processes", "s", [], note="fedloru_flwr.run has no processes")
    there = Figure("digits", "plain", "s", [1.5, 1.4])
    path = Results("bench", [ratio(there, absent, ">= 10")], [absent, there], MACHINE).write(tmp_path)
    assert "| digits | plain / ours, 2 processes | - | fedloru_flwr.run has no processes | 1 x 1 / 1 x 1 | >= 10 |" in (
        path.read_text()
    )
    assert json.loads((tmp_path / "bench.json").read_text())["ratios"][0]["median"] is None


def test_rivals_run_in_turn(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(Harness, "run", lambda self, rival, task: ran.append(rival.key) or report(1.0))
    harness = Harness(tmp_path, repeats=2, say=lambda line: None)
    found = harness.side_by_side([Rival("a", "a", "m"), Rival("b", "b", "m")], "w", rounds=1, warm_up=0)
    assert ran == ["a", "b", "a", "b"]
    assert [one.figures() for one in found] == [[1.0, 1.0], [1.0, 1.0]]


def report(seconds):
    from benchmarks.rivals.report import Report

    return Report([seconds], 1, 1, 1, 1, 1, 1)


def test_a_rivals_failure_names_its_log(tmp_path):
    from benchmarks.measuring import RivalFailedError

    with pytest.raises(RivalFailedError, match=r"status 1; the whole log: .*w-odd\.log\): .*No module"):
        Harness(tmp_path, 1, print).run(Rival("odd", "odd", "benchmarks.none_such"), Task("w.pt", 1, 0))


def test_aggregation_gives_the_weighted_mean_and_the_sum():
    replies = aggregation.Replies(3, 1)
    mean, total = aggregation.aggregate(replies), aggregation.add(replies)
    source = replies.source["layer3.lora_A"]
    factors = [1.0, 1 + 1 / 3, 1 + 2 / 3]
    weighted = sum(f * w for f, w in zip(factors, (1, 2, 3), strict=True)) / 6
    torch.testing.assert_close(mean["layer3.lora_A"], source * weighted)
    torch.testing.assert_close(total["layer3.lora_A"], source * sum(factors))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_quick_run_writes_the_table(tmp_path):
    command = [sys.executable, "-m", "benchmarks.bench", "--quick", "--no-pfl", "--out", str(tmp_path)]
    command += ["--only", "digits", "--only", "language-model", "--only", "server", "--only", "clients"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["ratios"]
    measured = {(row["of"], row["over"]) for row in rows if row["median"] is not None}
    assert ("plain Flower + PEFT app", "ours, in-process") in measured
    assert ("plain Flower + PEFT app", "ours, SuperNode per client") in measured
    assert ("bare torch loop, 1 core", "drop-in session, in-process") in measured
    assert "| Workload | Ratio |" in (tmp_path / "bench.md").read_text()
