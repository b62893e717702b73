"""What a run counts, against what the kernel counts: each SuperNode in a network namespace of its own."""

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fleet import Fleet

from fedloru_flwr.engines.app_dir import flower_app
from fedloru_flwr.runs import RunDirectory

CLIENTS = ("north", "south")
NETWORK = f"198.18.{os.getpid() % 256}"  # of the addresses set aside for measurements
HERE = f"{NETWORK}.1"
REMOVE = 'cat; for name; do ip link del "$name"; ip netns del "$name"; done'
IDLE_SECONDS = 30.0
SETTINGS = {
    "algorithm": "fedloru",
    "num-clients": len(CLIENTS),
    "num-server-rounds": 3,
    "fraction-train": 1.0,
    "fraction-evaluate": 1.0,
    "evaluate-every": 3,
    "accumulate-every": 2,
    "dataset": "digits",
    "model": "mlp",
    "hidden": "2048,2816",  # B has 5.8 MB, which Flower sends in two pieces; A has 4.2 MB, a bias 11 kB
    "rank": 512,
    "timeout": 200.0,
}


@contextlib.contextmanager
def namespaces() -> Iterator[dict[str, str]]:
    """Give each client a namespace, joined to `HERE` by a wire of its name; all go with this process, even killed."""
    if shutil.which("ip") is None:
        pytest.skip("network namespaces are made by the command ip, which is missing")
    names = {client: f"fl{os.getpid()}{client[0]}" for client in CLIENTS}
    remover = ["sh", "-c", REMOVE, "sh", *names.values()]  # when its input is closed
    quiet = subprocess.DEVNULL
    with subprocess.Popen(remover, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True):
        for place, name in enumerate(names.values(), 2):
            there = f"{NETWORK}.{place}"
            for step in (
                f"ip netns add {name}",
                f"ip link add {name} type veth peer name wire netns {name}",
                f"ip address add {HERE} peer {there} dev {name}",
                f"ip link set {name} up",
                f"ip -netns {name} address add {there} peer {HERE} dev wire",
                f"ip -netns {name} link set wire up",
                f"ip -netns {name} link set lo up",
            ):
                done = subprocess.run(step.split(), capture_output=True, text=True)
                if done.returncode:
                    pytest.skip(f"network namespaces cannot be made here: {step}: {done.stderr.strip()}")
        yield names


def counted(name: str) -> dict[str, int]:
    """The kernel's bytes on a client's wire, headers included; up to 64 kB go over it as one frame."""
    statistics = Path(f"/sys/class/net/{name}/statistics")
    return {way: int((statistics / f"{file}_bytes").read_text()) for way, file in (("up", "rx"), ("down", "tx"))}


def grown(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {way: after[way] - before[way] for way in before}


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_kernel_counts_the_bytes_that_a_run_counts(tmp_path):
    settings = {**SETTINGS, "output-dir": str(tmp_path / "runs"), "run-name": "counted"}
    with namespaces() as names, Fleet(tmp_path / "fleet", host=HERE) as fleet, flower_app() as app:
        fleet.start_superlink()
        for place, (client, name) in enumerate(names.items()):
            fleet.register(client)
            config = {"partition-id": place, "num-partitions": len(names)}
            fleet.start_supernode(client, config, within=["ip", "netns", "exec", name])
        end = time.monotonic() + 120
        while [node["status"] for node in fleet.nodes()] != ["online"] * len(names):
            assert time.monotonic() < end, fleet.logs()
            time.sleep(1)
        start = {client: counted(name) for client, name in names.items()}
        begun = time.monotonic()
        assert fleet.await_run(fleet.submit(app, settings), 600) == "finished:completed", fleet.logs()
        seconds = time.monotonic() - begun
        middle = {client: counted(name) for client, name in names.items()}
        pause = min(seconds, IDLE_SECONDS)
        time.sleep(pause)
        busy = {client: grown(start[client], middle[client]) for client in names}
        beats = {client: grown(middle[client], counted(name)) for client, name in names.items()}
        idle = {client: {way: count * seconds / pause for way, count in of.items()} for client, of in beats.items()}
    run = RunDirectory(tmp_path / "runs/counted")
    rows, summary = run.read_rounds(), run.read_summary()
    assert not any(row["clients_failed"] for row in rows)
    purposes = {purpose for row in rows for purpose in row["bytes_by_purpose"]}
    assert purposes == {"trainables", "entries", "evaluation", "enrolment"}
    for way in ("up", "down"):
        share = summary[f"total_bytes_{way}"] / len(names)  # all are asked for the same, under names of one length
        for client in names:
            kernel = busy[client][way] - idle[client][way]
            print(f"{client} {way}: counted {share:,.0f}, kernel's {kernel:,.0f}, idle {idle[client][way]:,.0f}")
            assert kernel == pytest.approx(share, rel=0.03)
        assert share * len(names) > 50e6
