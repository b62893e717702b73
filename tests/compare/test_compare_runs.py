"""Carrying out a comparison: what is there is kept, what is interrupted goes on, what fails is told."""

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from fedloru_flwr.compare import command, compare, places, pool, report
from fedloru_flwr.compare.page import html
from fedloru_flwr.compare.table import NONE
from fedloru_flwr.config import ConfigError

STUB = (sys.executable, str(Path(__file__).parent / "stub_worker.py"))
CONF = """
seeds = [0, 1]
target-accuracy = [0.5, 0.9]
[settings]
num-server-rounds = 11
[vary]
num-clients = [5, 10]
[methods.fedloru.grid]
learning-rate = [0.1, 0.2]
[methods.fedavg]
algorithm = "fedavg"
"""


@pytest.fixture
def stub_workers(monkeypatch):
    monkeypatch.setattr(pool, "COMMAND", STUB)
    monkeypatch.setattr(command, "html", lambda comparison: "")  # drawing takes seconds


@pytest.fixture
def conf(tmp_path):
    path = tmp_path / "conf.toml"
    path.write_text(CONF)
    return path


def table(directory):
    return [(directory / name).read_bytes() for name in ("table.md", "table.csv")]


def rows(directory):
    return sorted(directory.glob("runs/**/metrics.jsonl"))


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def workers_of(directory):
    """Workers, which keep the comparison's lock open."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if STUB[1] in process.cmdline() and any(str(directory) in file.path for file in process.open_files()):
                found.append(process)
    return found


def start(conf, directory):
    script = (
        "import sys; from fedloru_flwr.compare import pool; from fedloru_flwr import cli\n"
        f"pool.COMMAND = {STUB!r}\n"
        f"sys.argv = ['fedloru', 'compare', {str(conf)!r}, '--output-dir', {str(directory)!r}, '--jobs', '2']\n"
        "cli.main()\n"
    )
    return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.usefixtures("stub_workers")
def test_interrupted_twice_the_tables_are_those_of_an_uninterrupted_comparison(conf, tmp_path):
    whole = compare(conf, tmp_path / "whole", jobs=2)
    assert whole.failures == ()
    assert "| fedavg, fc | 1.5 ± 0 |" in (tmp_path / "whole" / "table.md").read_text()
    cut = tmp_path / "cut"

    interrupted = start(conf, cut)
    wait_for(lambda: len(rows(cut)) >= 3 and rows(cut)[0].read_bytes().count(b"\n") > 4)
    assert len(workers_of(cut)) == 2
    interrupted.send_signal(signal.SIGINT)
    _, told = interrupted.communicate(timeout=30)
    assert interrupted.returncode == 130
    assert "interrupted; what is finished is in" in told
    assert workers_of(cut) == []
    assert not (cut / "table.md").exists()
    partial = json.loads((cut / "results.json").read_text())
    assert partial["complete"] is False

    done = len(list(cut.glob("runs/**/summary.json")))
    killed = start(conf, cut)
    wait_for(lambda: len(list(cut.glob("runs/**/summary.json"))) > done)
    killed.kill()
    killed.communicate()
    wait_for(lambda: workers_of(cut) == [], seconds=5)
    assert len(list(cut.glob("runs/**/summary.json"))) < len(list((tmp_path / "whole").glob("runs/**/summary.json")))

    compare(conf, cut, jobs=2)
    assert table(cut) == table(tmp_path / "whole")
    assert workers_of(cut) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)])
def test_however_a_comparison_is_ended_its_workers_do_not_outlive_it(conf, tmp_path, number, status):
    conf.write_text(CONF.replace("num-server-rounds = 11", "num-server-rounds = 5000"))
    ended = start(conf, tmp_path / "out")
    wait_for(lambda: len(rows(tmp_path / "out")) >= 1)
    ended.send_signal(number)
    began = time.monotonic()
    ended.communicate(timeout=30)
    assert ended.returncode == status
    wait_for(lambda: workers_of(tmp_path / "out") == [], seconds=5)
    assert time.monotonic() - began < 10


@pytest.mark.usefixtures("stub_workers")
def test_a_run_whose_worker_is_killed_goes_on_in_another(conf, tmp_path):
    conf.write_text("[settings]\nnum-server-rounds = 40\n[methods.fedavg]\n")
    whole = compare(conf, tmp_path / "whole", jobs=1)
    out, killed = tmp_path / "out", []

    def kill_one():
        wait_for(lambda: any(path.read_bytes().count(b"\n") > 5 for path in rows(out)))
        (worker,) = workers_of(out)
        killed.append(worker.pid)
        worker.kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    outcome = compare(conf, out, jobs=1)
    killer.join()
    assert killed
    assert outcome.failures == ()
    assert table(out) == table(Path(whole.output_dir))


@pytest.mark.usefixtures("stub_workers")
def test_a_failed_run_is_told_and_the_rest_goes_on(conf, tmp_path):
    bad = '[methods.bad]\nlearning-rate = 13.0\nlabel = "Bad one"\n[methods.dying]\nlearning-rate = 14.0\n'
    conf.write_text(CONF.replace("[5, 10]", "[5]").replace("[0, 1]", "[0]") + bad)
    outcome = compare(conf, tmp_path / "out")
    assert outcome.failures == (
        "Bad one, num-clients = 5, seed 0: RuntimeError: out of chalk in round 2",
        "dying, num-clients = 5, seed 0: its worker process ended with status 9, 3 times",
    )
    text = (tmp_path / "out" / "table.md").read_text().replace(NONE, "-")
    assert "- Bad one, num-clients = 5, seed 0: RuntimeError: out of chalk in round 2" in text
    assert "| num-clients = 5 | Bad one | - | - |" in text
    assert outcome.results.rows[0].finished
    log = next((tmp_path / "out" / "logs").glob("bad-seed-0-*.log")).read_text()
    assert "and of sponges" in log
    # What failed is tried again, what has finished is not.
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/fed*/**/metrics.jsonl")}
    assert compare(conf, tmp_path / "out").failures == outcome.failures
    assert finished == {path: path.stat().st_mtime_ns for path in finished}


@pytest.mark.usefixtures("stub_workers")
def test_what_could_not_run_is_refused_before_anything_runs(conf, tmp_path):
    conf.write_text(CONF + "[methods.large]\nrank = 99\n")
    with pytest.raises(ConfigError, match=r"conf\.toml: \[methods\.large\].*rank = 99 is too much for this stub"):
        compare(conf, tmp_path / "out")
    assert rows(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.usefixtures("stub_workers")
def test_a_changed_configuration_runs_exactly_what_has_changed(conf, tmp_path, monkeypatch):
    out = tmp_path / "out"
    first = compare(conf, out)
    before = {path: path.stat().st_mtime_ns for path in rows(out)}
    # Another name and label, one more seed and another method: the runs of the old ones are taken as they are.
    conf.write_text(
        CONF.replace("[methods.fedavg]", '[methods.plain]\nlabel = "Plain"').replace("[0, 1]", "[0, 1, 2]")
        + "[methods.more]\nrank = 8\n"
    )
    second = compare(conf, out)
    after = {path: path.stat().st_mtime_ns for path in rows(out)}
    assert {path: after[path] for path in before} == before
    new = {(path.parents[2].name, path.parent.name.split("-")[1]) for path in set(after) - set(before)}
    assert new == {("fedloru", "2"), ("plain", "2"), ("more", "0"), ("more", "1"), ("more", "2")}
    plain = [row.runs[0].accuracy for row in second.results.rows if row.method == "plain"]
    assert plain == [row.runs[0].accuracy for row in first.results.rows if row.method == "fedavg"]
    # Nothing to do: no worker is started at all.
    monkeypatch.setattr(pool, "COMMAND", ("/nowhere/python",))
    kept = table(out)
    compare(conf, out)
    assert table(out) == kept


@pytest.mark.usefixtures("stub_workers")
def test_two_comparisons_do_not_share_a_directory(conf, tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_LOCK_SECONDS", 0.1)
    with (
        places.only_one(tmp_path / "out"),
        pytest.raises(ConfigError, match="another comparison is at work in"),
    ):
        compare(conf, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.usefixtures("stub_workers")
def test_a_report_is_made_anew_from_the_results(conf, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "html", html)
    out = tmp_path / "out"
    compare(conf, out)
    names = ("table.md", "table.csv", "timing.csv", "report.html", "results.json")
    before = {name: (out / name).read_bytes() for name in names}
    for name in names[:-1]:
        (out / name).unlink()
    report([out])
    assert {name: (out / name).read_bytes() for name in names} == before
    partitions = json.loads(before["results.json"])["partitions"]
    assert [entry["counts"] for entry in partitions] == [[[3, 0, 1]] * 5, [[3, 0, 1]] * 10]


def test_impossible_arguments_are_refused(conf, tmp_path):
    with pytest.raises(ConfigError, match="engine = 'spark' is not one of"):
        compare(conf, tmp_path / "out", engine="spark")
    with pytest.raises(ConfigError, match="jobs must be at least 1, got 0"):
        compare(conf, tmp_path / "out", jobs=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        compare(conf, tmp_path / "file" / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_ends_with_the_status_that_says_how_it_went(conf, tmp_path, stub_workers):
    from typer.testing import CliRunner

    from fedloru_flwr.cli import app

    def status(*arguments):
        outcome = CliRunner().invoke(app, list(map(str, arguments)))
        assert "Traceback" not in outcome.output
        return outcome.exit_code, outcome.output

    conf.write_text("[settings]\nnum-server-rounds = 1\n[methods.fedavg]\n")
    code, told = status("compare", conf, "--output-dir", tmp_path / "out")
    assert (code, f"{tmp_path}/out/report.html" in told) == (0, True)
    assert status("report", tmp_path / "out")[0] == 0
    conf.write_text("[settings]\nnum-server-rounds = 3\n[methods.bad]\nlearning-rate = 13.0\n")
    code, told = status("compare", conf, "--output-dir", tmp_path / "out")
    assert (code, "1 failed, the rest is done" in told) == (1, True)
    code, told = status("compare", conf, "--engine", "spark")
    assert (code, "engine = 'spark'" in told) == (2, True)
    code, told = status("report", tmp_path / "nothing")
    assert (code, "there is no run at" in told) == (2, True)
