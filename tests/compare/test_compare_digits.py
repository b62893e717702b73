"""Real runs on real workers."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedloru_flwr.compare import compare

SMALL = """
seeds = [0, 1]
target-accuracy = 0.5
[settings]
model = "mlp"
hidden = "16"
num-server-rounds = 3
num-clients = 6
local-epochs = 1
fraction-evaluate = 0.5
checkpoint-every = 4
[methods.fedloru]
accumulate-every = 2
[methods.fedloru.grid]
rank = [2, 4]
[methods.fedavg]
algorithm = "fedavg"
[methods.diverging]
algorithm = "fedavg"
max-grad-norm = 0.0
learning-rate = 1e30
[tuning]
seeds = [9]
widen = false
settings = { num-server-rounds = 2 }
"""


@pytest.mark.slow
def test_digits_from_configuration_to_report(tmp_path):
    conf = tmp_path / "conf.toml"
    conf.write_text(SMALL)
    outcome = compare(conf, tmp_path / "out", jobs=1)
    assert [line.split(", more than")[0] for line in outcome.failures] == [
        "diverging, seed 0, 1: round 1: 3 of 3 clients failed"
    ]
    by_method = {row.method: row for row in outcome.results.rows}
    assert [len(by_method[name].finished) for name in ("fedloru", "fedavg", "diverging")] == [2, 2, 0]
    run = by_method["fedavg"].runs[0]
    assert run.rounds == [0, 1, 2, 3]
    assert run.accuracy[-1] > run.accuracy[0]
    assert run.up[0] == 0 < run.up[1] < run.up[3]
    assert by_method["fedloru"].choice["rank"] in (2, 4)
    assert [len(entry["counts"]) for entry in outcome.results.partitions] == [6]
    assert sum(sum(client) for client in outcome.results.partitions[0]["counts"]) == 1437
    kinds = {name: {row["kind"] for row in by_method[name].runs[0].ranks} for name in ("fedloru", "fedavg")}
    assert kinds == {"fedloru": {"ledger", "learned"}, "fedavg": {"learned"}}
    assert len(list((tmp_path / "out").glob("runs/**/rank.csv"))) == 4, "of the runs that are judged, none of tuning"
    logs = list((tmp_path / "out" / "logs").glob("fedavg-seed-0-*.log"))
    assert "round 3/3" in logs[0].read_text()
    assert (tmp_path / "out" / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_digits_interrupted_twice_give_the_same_tables(tmp_path):
    conf = tmp_path / "conf.toml"
    conf.write_text(SMALL.replace("num-server-rounds = 3", "num-server-rounds = 25"))
    compare(conf, tmp_path / "whole", jobs=2)
    cut = tmp_path / "cut"

    def start():
        script = f"import sys; from fedloru_flwr import cli; sys.argv = {['fedloru', 'compare', str(conf)]!r}\n"
        script += f"sys.argv += {['--output-dir', str(cut), '--jobs', '2']!r}; cli.main()"
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def wait_for_rounds(more):
        def count():
            # Not glob: it minds directories that vanish.
            found = [Path(where) / "metrics.jsonl" for where, _, names in os.walk(cut) if "metrics.jsonl" in names]
            return sum(path.read_bytes().count(b"\n") for path in found)

        before, deadline = count(), time.monotonic() + 120
        while count() < before + more:
            assert time.monotonic() < deadline
            time.sleep(0.05)

    interrupted = start()
    wait_for_rounds(30)
    interrupted.send_signal(signal.SIGINT)
    interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130
    killed = start()
    wait_for_rounds(20)
    workers = psutil.Process(killed.pid).children()
    os.kill(workers[0].pid, signal.SIGKILL)
    wait_for_rounds(10)
    left = psutil.Process(killed.pid).children()
    killed.kill()
    killed.communicate()
    assert psutil.wait_procs(left, timeout=20)[1] == []
    compare(conf, cut, jobs=2)
    for name in ("table.md", "table.csv"):
        assert (cut / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
