"""A SuperLink with TLS and SuperNodes known by their keys: who is let in, what comes out, and what if parts die."""

import time
from collections.abc import Callable

import demo
import psutil
import pytest
from credentials import write_certificates, write_node_key
from fleet import Fleet

from fedloru_flwr import client_app, server_app
from fedloru_flwr.engines.app_dir import flower_app
from fedloru_flwr.engines.in_process import run_in_process
from fedloru_flwr.runs import RunDirectory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PATIENCE = 600


def await_(what: str, condition: Callable[[], object], fleet: Fleet, seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{what}: not after {seconds:g} s\n{fleet.logs()}"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """Three SuperNodes of a SuperLink, all that the tests of this module share but the demo's."""
    directory = tmp_path_factory.mktemp("fleet")
    with Fleet(directory, restart_seconds=5) as fleet, flower_app() as app:
        demo.start(fleet, demo.write_digits(directory / "data"))
        yield fleet, app


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """The demo's run in this process."""
    directory = tmp_path_factory.mktemp("in-process")
    run_in_process(
        server_app.app,
        client_app.app,
        num_supernodes=len(demo.CLIENTS),
        run_config=demo.settings(directory, "run"),
        node_configs=list(demo.write_digits(directory / "data").values()),
    )
    return directory / "run"


def rounds_when_there(run):
    return RunDirectory(run).read_rounds() if run.exists() else []


def test_the_demo_equals_a_run_in_process_and_leaves_nothing_behind(tmp_path, in_process, rows_of, capfd):
    summary = demo.run(tmp_path / "fleet", tmp_path / "runs")
    assert rows_of(tmp_path / "runs/latest") == rows_of(in_process)
    assert summary["final_accuracy"] > 0.85
    assert "round 4/4" in capfd.readouterr().out
    assert (tmp_path / "fleet/north/key").stat().st_mode & 0o777 == 0o600
    homes = []
    for process in psutil.process_iter():
        try:
            homes.append(process.environ().get("FLWR_HOME", ""))
        except psutil.Error:
            continue
    assert not [home for home in homes if home.startswith(str(tmp_path))]


def test_strangers_are_refused(scene):
    fleet, _ = scene
    write_node_key(fleet.key("unregistered"))
    fleet.register("misled")
    write_certificates(fleet.directory / "another-tls", ["127.0.0.1"])
    other = fleet.directory / "another-tls" / "ca.crt"
    reasons = {
        fleet.start_supernode("unregistered", {"client-id": "u"}): "[code: 2004] Failed to activate SuperNode",
        fleet.start_supernode("misled", {"client-id": "m"}, root_certificates=other): "CERTIFICATE_VERIFY_FAILED",
        fleet.start_supernode("plain", {"client-id": "p"}, in_the_clear=True, max_retries=1): "Server disconnected",
    }
    for service, reason in reasons.items():
        await_(f"refusal of {service.log}", lambda service=service: "ended with status 1" in service.said(), fleet, 120)
        service.ask_to_end()
        service.await_end()
        assert reason in service.said()
        assert "SuperNode ID" not in service.said()
    assert "No SuperNode found with the given public key" in fleet.superlink.said()
    states = [node["status"] for node in fleet.nodes()]
    assert sorted(states) == ["online"] * 3 + ["registered"]  # who was misled has never been in touch


def test_a_run_whose_superlink_is_killed_goes_on_as_if_nothing_had_happened(scene, in_process, rows_of, tmp_path):
    fleet, app = scene
    settings = demo.settings(tmp_path, "run")
    first = fleet.submit(app, settings)
    await_("two rounds", lambda: len(rounds_when_there(tmp_path / "run")) >= 2, fleet)
    fleet.superlink.kill()
    await_("restart", lambda: "ended with status -9" in fleet.superlink.said(), fleet)
    fleet.await_superlink()
    assert fleet.await_run(first, PATIENCE) == "finished:failed"
    assert len(rounds_when_there(tmp_path / "run")) < 4
    second = fleet.submit(app, settings | {"resume": str(tmp_path / "run")})
    assert fleet.await_run(second, PATIENCE) == "finished:completed", fleet.logs()
    rows = rows_of(tmp_path / "run")
    assert [row["round"] for row in rows] == [1, 2, 3, 4]
    assert rows == rows_of(in_process)
    assert RunDirectory(tmp_path / "run").read_summary()["status"] == "finished"


def test_a_killed_supernode_misses_its_round_and_comes_back(scene, tmp_path):
    fleet, app = scene
    west = fleet.supernodes["west"]
    before = west.said().count("Receiving: train message")
    run_id = fleet.submit(app, demo.settings(tmp_path, "run", rounds=5))
    await_("round 2", lambda: west.said().count("Receiving: train message") == before + 2, fleet)
    west.kill()
    assert fleet.await_run(run_id, PATIENCE) == "finished:completed", fleet.logs()
    assert "[code: 2004] Failed to activate SuperNode" in west.said()  # until the SuperLink had noticed its death
    rows = RunDirectory(tmp_path / "run").read_rounds()
    assert [row["round"] for row in rows] == [1, 2, 3, 4, 5]
    assert [sorted(row["failures"]) for row in rows] == [[], ["west"], [], [], []]
    assert (rows[0]["clients_ok"], rows[1]["clients_ok"], rows[-1]["clients_ok"]) == (3, 2, 3)
    assert rows[-1]["clients_evaluated"] == 3
    assert rows[-1]["accuracy"] > 0.85
