import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from small_apps import a_tag, tagged, write_app

from fedloru_flwr.engines import flower
from fedloru_flwr.engines.flower import FlowerError, FlowerOutcome, run_on_flower

CONFIG = """
mode = "exchange"
phrase = ""
rate = 0.0
flag = false
count = 0
"""

APP = """
import json, os, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

server = ServerApp()
client = ClientApp()

@client.train()
def train(message, context):
    return Message(RecordDict({"seen": ConfigRecord({"pid": os.getpid(), **context.node_config})}), reply_to=message)

@server.main()
def main(grid, context):
    print("temporary", os.environ["RAY_TMPDIR"])
    print("directory", os.getcwd())
    print("config", json.dumps(dict(context.run_config)))
    if context.run_config["mode"] == "raise":
        raise ValueError("the server said 'no'")
    while len(list(grid.get_node_ids())) < context.run_config["count"]:
        time.sleep(0.05)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    seen = [reply.content["seen"] for reply in grid.send_and_receive(messages)]
    print("partitions", sorted(int(record["partition-id"]) for record in seen))
    print("workers", len({record["pid"] for record in seen}))
    while context.run_config["mode"] == "wait":
        time.sleep(0.1)
"""

DRIVER = """
import json, sys, time
from pathlib import Path
from fedloru_flwr.engines.flower import run_on_flower

arguments = json.loads(sys.argv[2])
def say(**what):
    print(json.dumps(what), flush=True)
outcome = run_on_flower(Path(sys.argv[1]), on_line=lambda line: say(line=line, at=time.monotonic()), **arguments)
say(outcome=vars(outcome))
"""


@pytest.fixture
def app(tmp_path):
    return write_app(tmp_path / "app", APP, CONFIG)


@pytest.fixture
def tag():
    with a_tag() as value:
        yield value


def is_used(path):
    return path.exists() or any(
        str(path) in " ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"])
    )


def eventually(condition, seconds=15.0):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)
    return condition()


def value_of(lines, name):
    return next(line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} "))


def start_driver(app, home, **arguments):
    home.mkdir()
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(app), json.dumps(arguments)],
        env={**os.environ, "HOME": str(home)},
        cwd=home,
        stdout=subprocess.PIPE,
        text=True,
        # A shell's background job, such as a test run may be, ignores SIGINT and hands that on.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_a_run_is_what_was_asked_for_and_leaves_nothing_behind(app, tag, tmp_path):
    config = {
        "phrase": 'it\'s "two words" = \\ \n é 😀 #no comment',
        "rate": 1e-05,
        "flag": True,
        "count": 7,
        "mode": "exchange",
    }
    home = tmp_path / "home"
    before = (app / "pyproject.toml").read_bytes()
    driver = start_driver(app, home, run_config=config, num_supernodes=7, ray_num_cpus=3, environment=tag)
    output, _ = driver.communicate(timeout=120)
    *said, last = map(json.loads, output.splitlines())
    # Ray hands a worker's own warnings through, whose lines begin "(ClientAppActor pid=...)".
    lines = [entry["line"] for entry in said if not entry["line"].startswith("(")]

    assert driver.returncode == 0
    assert last["outcome"]["completed"]
    assert last["outcome"]["status"] == "finished:completed"
    assert last["outcome"]["details"] == ""
    assert last["outcome"]["run_id"] > 0
    assert [line.split()[0] for line in lines] == ["temporary", "directory", "config", "partitions", "workers"]
    assert json.loads(value_of(lines, "config")) == config
    assert json.loads(value_of(lines, "partitions")) == list(range(7))
    assert value_of(lines, "workers") == "3"
    assert Path(value_of(lines, "directory")).samefile(home)
    assert said[-1]["at"] - said[0]["at"] > 0.5, "the lines came all at once"
    assert not tagged(tag)
    assert not is_used(Path(value_of(lines, "temporary")))
    assert not (home / ".flwr").exists()
    assert (app / "pyproject.toml").read_bytes() == before


def test_a_run_that_takes_too_long_is_ended(app, tag):
    outcome = run_on_flower(
        app, {"mode": "wait"}, num_supernodes=1, ray_num_cpus=1, environment=tag, timeout=0.5, on_line=str
    )
    assert not outcome.completed
    assert outcome.status == "timeout"
    assert "0.5 seconds" in outcome.details
    assert not tagged(tag)


def test_a_key_that_the_app_does_not_have_is_named(app, tag):
    with pytest.raises(FlowerError, match="'learning-rat'"):
        run_on_flower(app, {"learning-rat": 0.1}, num_supernodes=1, environment=tag)


def test_a_superlink_that_does_not_start_shows_its_log(app, tag):
    with pytest.raises(FlowerError, match=r"(?s)did not start \(exit status 1\).*Python"):
        run_on_flower(app, {}, num_supernodes=1, environment={**tag, "PYTHONHOME": "/nowhere"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_supernodes": 0}, "num_supernodes >= 1"),
        ({"num_supernodes": 1, "client_num_cpus": 0}, "client_num_cpus >= 1"),
        ({"num_supernodes": 1, "client_num_cpus": 2, "ray_num_cpus": 1}, r"ray_num_cpus >= client_num_cpus \(2\)"),
    ],
)
def test_an_impossible_size_is_refused(app, arguments, message):
    with pytest.raises(ValueError, match=message):
        run_on_flower(app, {}, **arguments)


def test_the_callers_settings_win_over_the_defaults_but_not_over_the_privacy_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setenv("FLWR_HOME", "/elsewhere")
    monkeypatch.setenv("no_proxy", "example.org")
    env = flower._environment("mark", tmp_path, tmp_path, {"FLWR_LOG_LEVEL": "INFO"})
    assert env["RAY_ADDRESS"] == "head:6379"
    assert env["FLWR_LOG_LEVEL"] == "INFO"
    assert env["FLWR_HOME"] == str(tmp_path)
    assert env["no_proxy"] == "example.org,127.0.0.1,localhost"
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env["FLWR_TELEMETRY_ENABLED"] == env["RAY_USAGE_STATS_ENABLED"] == "0"


@pytest.mark.slow
def test_two_runs_at_a_time_do_not_meet_and_an_error_is_reported_in_full(app, tag):
    outcomes: dict[str, FlowerOutcome] = {}
    lines: dict[str, list[str]] = {"raise": [], "exchange": []}

    def run(mode, count):
        outcomes[mode] = run_on_flower(
            app,
            {"mode": mode, "count": count},
            num_supernodes=count,
            ray_num_cpus=1,
            environment=tag,
            on_line=lines[mode].append,
        )

    threads = [threading.Thread(target=run, args=arguments) for arguments in (("raise", 2), ("exchange", 4))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert outcomes["exchange"].completed
    assert value_of(lines["exchange"], "partitions") == "[0, 1, 2, 3]"
    assert not outcomes["raise"].completed
    assert outcomes["raise"].status == "finished:failed"
    assert "the server said 'no'" in outcomes["raise"].details
    assert any(line.startswith("Traceback") for line in lines["raise"])
    assert "ValueError: the server said 'no'" in lines["raise"]
    assert not any("Traceback" in line for line in lines["exchange"])
    for mode in lines:
        assert not is_used(Path(value_of(lines[mode], "temporary")))
    assert not tagged(tag)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_caller_that_is_interrupted_leaves_nothing_behind(app, tag, tmp_path, number):
    home = tmp_path / "home"
    driver = start_driver(app, home, run_config={"mode": "wait"}, num_supernodes=2, ray_num_cpus=2, environment=tag)
    assert driver.stdout is not None
    lines = []
    while not lines or not lines[-1].startswith("workers"):
        lines.append(json.loads(driver.stdout.readline())["line"])
    temporary = Path(value_of(lines, "temporary"))
    assert eventually(lambda: len(tagged(tag)) > 4)  # the workers are there a moment later
    driver.send_signal(number)
    try:
        driver.communicate(timeout=90)
    finally:
        driver.kill()

    assert driver.returncode == {signal.SIGTERM: 143}.get(number, -number)
    if number == signal.SIGKILL:  # its guard takes over, a moment later
        assert eventually(lambda: not tagged(tag) and not is_used(temporary))
    assert not tagged(tag)
    assert not is_used(temporary)
    assert not (home / ".flwr").exists()


@pytest.mark.slow
def test_a_port_that_was_taken_meanwhile_is_replaced(app, tag, monkeypatch):
    taken = socket.create_server(("127.0.0.1", 0))
    free = socket.create_server(("127.0.0.1", 0))
    ports = [taken.getsockname(), free.getsockname()]
    free.close()

    class Probe:
        def __enter__(self):
            return self

        def __exit__(self, *exception):
            return None

        def bind(self, address):
            return None

        def getsockname(self):
            return ports.pop(0)

    monkeypatch.setattr(flower.socket, "socket", Probe)
    with taken:
        outcome = run_on_flower(app, {}, num_supernodes=1, environment=tag, timeout=0.1, on_line=str)
    assert outcome.status == "timeout"
    assert not ports
