import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_apps import a_tag, tagged, write_app

from fedloru_flwr.engines import ray_ahead as module
from fedloru_flwr.engines.flower import run_on_flower
from fedloru_flwr.engines.ray_ahead import join, ray_ahead
from fedloru_flwr.launch import run

APP = """
import os, sys, time
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    seen = {"pid": os.getpid(), "preloaded": "colorsys" in sys.modules, "tag": os.environ["SMALL_APP_TAG"]}
    time.sleep(0.2)
    return Message(RecordDict({"seen": ConfigRecord(seen)}), reply_to=message)

@server.main()
def main(grid, context):
    while len(list(grid.get_node_ids())) < 6:
        time.sleep(0.05)
    messages = [Message(RecordDict(), dst_node_id=node, message_type="train") for node in grid.get_node_ids()]
    seen = [reply.content["seen"] for reply in grid.send_and_receive(messages)]
    print("workers", len({record["pid"] for record in seen}))
    print("preloaded", all(record["preloaded"] for record in seen))
    print("tags", *{record["tag"] for record in seen})
"""


@pytest.fixture
def tag():
    with a_tag() as value:
        yield value


@pytest.mark.slow
def test_the_simulation_joins_the_ray_that_was_started_and_uses_its_workers(monkeypatch, tmp_path, tag):
    app = write_app(tmp_path / "app", APP)
    monkeypatch.syspath_prepend(str(app))
    lines: list[str] = []
    with ray_ahead(2, ["colorsys"], tag) as joining:
        outcome = run_on_flower(
            app, {}, num_supernodes=6, ray_num_cpus=2, environment=joining | tag, on_line=lines.append
        )
    assert outcome.completed, outcome
    assert [line for line in lines if not line.startswith("(")] == [
        "workers 2",
        "preloaded True",
        f"tags {tag['SMALL_APP_TAG']}",
    ]
    assert not tagged(tag)
    assert not Path(joining["FEDLORU_RAY"]).parent.exists()


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_RUNTIME_ENV_HOOK"])
def test_a_cluster_or_a_hook_of_the_users_is_left_alone(monkeypatch, tag, variable):
    monkeypatch.setenv(variable, "theirs")
    with ray_ahead(1, [], tag) as joining:
        assert joining == {}
        assert not tagged(tag)


def test_uv_is_kept_from_setting_a_hook_of_its_own(tag):
    with ray_ahead(1, [], tag) as joining:
        assert joining["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"


def test_settings_that_make_no_sense_end_the_ray_that_was_starting(monkeypatch, tmp_path, tag):
    monkeypatch.setenv("SMALL_APP_TAG", tag["SMALL_APP_TAG"])
    begun = time.monotonic()
    with pytest.raises(ValueError, match="num-clients"):
        run(config={"num-clients": 1000, "output-dir": str(tmp_path / "runs")})
    assert time.monotonic() - begun < 30
    monkeypatch.delenv("SMALL_APP_TAG")
    assert not tagged(tag)
    assert not (tmp_path / "runs").exists()


def test_the_hook_says_where_ray_is_and_leaves_out_the_module_path_alone(monkeypatch, tmp_path):
    ready = tmp_path / "ray.json"
    ready.write_text(json.dumps({"address": "127.0.0.1:1"}))
    monkeypatch.setenv("FEDLORU_RAY", str(ready))
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert join({"env_vars": {"PYTHONPATH": "somewhere"}}) is None
    assert os.environ["RAY_ADDRESS"] == "127.0.0.1:1"
    assert join({"env_vars": {"PYTHONPATH": "somewhere", "A": "b"}, "pip": ["c"]}) == {
        "env_vars": {"A": "b"},
        "pip": ["c"],
    }
    assert join(None) is None


def test_the_hook_tells_why_ray_did_not_start(monkeypatch, tmp_path):
    ready = tmp_path / "ray.json"
    monkeypatch.setenv("FEDLORU_RAY", str(ready))
    monkeypatch.setenv("FEDLORU_RAY_PID", str(os.getpid()))
    monkeypatch.setattr(module, "_START_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match=r"did not start in 0\.1 seconds"):
        join(None)
    monkeypatch.setattr(module, "_START_SECONDS", 60)
    holder = subprocess.Popen([sys.executable, "-c", "pass"])  # and is not waited for: it stays as a zombie
    monkeypatch.setenv("FEDLORU_RAY_PID", str(holder.pid))
    (tmp_path / "ray.log").write_text("no such library")
    with pytest.raises(RuntimeError, match="before its process ended:\nno such library"):
        join(None)
    holder.wait()
    ready.write_text(json.dumps({"error": "no room"}))
    with pytest.raises(RuntimeError, match="did not start: no room"):
        join(None)
