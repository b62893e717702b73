"""A SuperLink and SuperNodes as separate processes, each client with data of its own and no partition id."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from fedloru_flwr.config import RunConfig
from fedloru_flwr.engines.app_dir import flower_app

BIN = Path(sys.executable).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def process(command, log: Path, environment):
    with log.open("w") as out:
        started = subprocess.Popen(
            [str(part) for part in command],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            yield started
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(10)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(started.pid, signal.SIGKILL)
            started.wait()


def environment(home: Path) -> dict[str, str]:
    home.mkdir()
    settings = {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "PATH": f"{BIN}:{os.environ['PATH']}",
    }
    given = {key: value for key, value in os.environ.items() if key != "FEDLORU_STORE"}
    return {**given, **settings}


def write_clients_file(path: Path, seed: int) -> None:
    draw = random.Random(seed)
    rows = ["a,b,c,label"]
    for _ in range(60):
        label = draw.randrange(3)
        values = [draw.gauss(3.0 if axis == label else 0.0, 1.0) for axis in range(3)]
        rows.append(",".join(f"{value:.4f}" for value in values) + f",{label}")
    path.write_text("\n".join(rows) + "\n")


def wait_for_port(port: int, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)
    raise TimeoutError(f"nothing listens on port {port}")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_clients_with_their_own_data_train_on_supernodes(tmp_path):
    port = free_port()
    settings = {
        "num-clients": 2,
        "num-server-rounds": 3,
        "fraction-train": 1.0,
        "fraction-evaluate": 1.0,
        "accumulate-every": 1,
        "dataset": "local",
        "data-path": str(tmp_path / "server.csv"),
        "num-classes": 3,
        "model": "mlp",
        "hidden": "16,16",
        "rank": 2,
        "output-dir": str(tmp_path / "runs"),
        "run-name": "deployed",
        "timeout": 200.0,
    }
    RunConfig.from_mapping(settings)
    for seed, name in enumerate(("server", "north", "south")):
        write_clients_file(tmp_path / f"{name}.csv", seed)
    server = environment(tmp_path / "server")
    connection = {"superlink": {"default": "here", "here": {"address": f"127.0.0.1:{port}", "insecure": True}}}
    (tmp_path / "server" / "config.toml").write_text(tomli_w.dumps(connection))
    (tmp_path / "run.toml").write_text(tomli_w.dumps(settings))
    with contextlib.ExitStack() as running:
        superlink = [BIN / "flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", port]
        running.enter_context(process(superlink, tmp_path / "superlink.log", server))
        wait_for_port(port)
        for name in ("north", "south"):
            node = f'client-id="{name}" data-path="{tmp_path / name}.csv"'
            supernode = [BIN / "flower-supernode", "--insecure", "--superlink", f"127.0.0.1:{port}"]
            supernode += ["--port", free_port(), "--node-config", node]
            running.enter_context(process(supernode, tmp_path / f"{name}.log", environment(tmp_path / name)))
        app_dir = running.enter_context(flower_app())
        done = subprocess.run(
            [BIN / "flwr", "run", app_dir, "here", "--stream", "--run-config", tmp_path / "run.toml"],
            env=server,
            capture_output=True,
            text=True,
            timeout=400,
        )
        logs = "\n".join(path.read_text() for path in tmp_path.glob("*.log"))
        assert (tmp_path / "runs/deployed/summary.json").exists(), done.stdout + done.stderr + logs
    rows = [json.loads(line) for line in (tmp_path / "runs/deployed/metrics.jsonl").read_text().splitlines()]
    assert [(row["clients_ok"], row["clients_failed"]) for row in rows[1:]] == [(2, 0)] * 3
    assert rows[-1]["ledger_version"] == 3
    assert all("repeats" not in row["bytes_by_purpose"] for row in rows)
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]
    for name in ("north", "south"):
        assert len(list((tmp_path / name / "fedloru" / "entries").glob("*.safetensors"))) == 3
