"""A process that writes a run without pause is killed again and again; what it leaves must always be whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import load_file

from fedloru_flwr.runs import SUMMARY_KEYS, RunDirectory

LIVES = 30
LONGEST_SECONDS = 8  # on a slow disk, fewer lives
FILLER = 200_000

# One life of the writer for each line on standard input: a fork, so that torch is imported once.
WRITER = """
import os, sys
import torch
from fedloru_flwr.runs import RunDirectory, SUMMARY_KEYS

def write_for_ever(path, filler):
    run = RunDirectory.open(path)
    checkpoint = run.latest_checkpoint()
    server_round = checkpoint[0] if checkpoint else 0
    run.truncate_rounds(server_round)
    while True:
        server_round += 1
        run.append_round({"round": server_round, "failures": {"1": "x" * (filler // 10)}})
        run.write_manifest({"round": server_round, "text": str(server_round % 10) * filler})
        if server_round % 2 == 0:
            tensors = {"w": torch.full((filler,), float(server_round)), "b": torch.tensor(server_round)}
            run.write_checkpoint(server_round, tensors, {"round": server_round})
            run.write_summary({key: server_round for key in SUMMARY_KEYS})
            run.write_model(tensors)

for line in sys.stdin:
    process_id = os.fork()
    if process_id == 0:
        write_for_ever(sys.argv[1], int(sys.argv[2]))
    print(process_id, flush=True)
    os.waitpid(process_id, 0)
    print("dead", flush=True)
"""


def seconds_until_saved(run):
    began = time.monotonic()
    while run.latest_checkpoint() is None:
        assert time.monotonic() < began + 60, "the writer does not write"
        time.sleep(0.002)
    return time.monotonic() - began


def assert_everything_is_whole(run, known_round):
    """Read each file as a resume or a report would; return the round of the newest checkpoint."""
    rows = run.read_rounds()
    assert [row["round"] for row in rows] == list(range(1, len(rows) + 1))
    assert all(len(row["failures"]["1"]) == FILLER // 10 for row in rows)

    for name in ("manifest.json", "summary.json"):
        if (run.path / name).exists():
            json.loads((run.path / name).read_text())
    if (run.path / "manifest.json").exists():
        manifest = run.read_manifest()
        assert manifest["text"] == str(manifest["round"] % 10) * FILLER
    if (run.path / "model.safetensors").exists():
        model = load_file(run.path / "model.safetensors")
        assert model["w"].eq(float(model["b"])).all()

    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        assert known_round == 0
        return 0
    server_round, tensors, state, _ = checkpoint
    assert server_round >= known_round
    assert state == {"round": server_round}
    assert tensors["b"] == server_round
    assert tensors["w"].shape == (FILLER,)
    assert tensors["w"].eq(float(server_round)).all()
    assert server_round <= len(rows)  # a resume finds the rows up to its checkpoint
    return server_round


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_no_kill_leaves_half_a_file(tmp_path):
    moments = random.Random(0)
    run = RunDirectory.create(tmp_path, "run")
    saved_round = 0
    give_up = time.monotonic() + LONGEST_SECONDS
    command = [sys.executable, "-c", WRITER, str(run.path), str(FILLER)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as driver:
        for life in range(LIVES):
            driver.stdin.write("live\n")
            driver.stdin.flush()
            process_id = int(driver.stdout.readline())
            if life == 0:
                longest = 2 * seconds_until_saved(run)  # what a life needs depends on the disk
            else:
                time.sleep(moments.uniform(0, longest))
            os.kill(process_id, signal.SIGKILL)
            assert driver.stdout.readline() == "dead\n"
            saved_round = assert_everything_is_whole(run, saved_round)
            if time.monotonic() > give_up:
                break
        driver.stdin.close()

    assert saved_round > 0
    last_round = saved_round + 2
    run.truncate_rounds(saved_round)
    run.append_round({"round": saved_round + 1})
    run.write_manifest({})
    run.write_summary(dict.fromkeys(SUMMARY_KEYS))
    run.write_model({})
    run.write_checkpoint(last_round, {}, {})
    assert [path.name for path in run.path.rglob(".*")] == []
