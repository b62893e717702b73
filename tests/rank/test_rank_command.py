"""The command from a CONF to tables, continued, on a federation that takes seconds."""

import io
import tomllib
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fedloru_flwr.config import ConfigError
from fedloru_flwr.rank import command
from fedloru_flwr.rank.advice import Evidence
from fedloru_flwr.rank.command import _factorised, _pilot, rank
from fedloru_flwr.rank.spec import parse_rank_spec, read_rank_spec
from fedloru_flwr.rank.unit import UnitFiles, carry_out

SETTINGS = """
num-clients = 6
num-server-rounds = 2
local-epochs = 1
model = "mlp"
hidden = "12"
rank = 2
"""
ANALYSIS = f"""
title = "Tiny"
[measure]
rounds = [0, 2]
points = [10, 40]
clients = 3
ranks = [1, 2]
tolerance = 0.2
[settings]
{SETTINGS}
[trainings.central]
algorithm = "fedavg"
num-clients = 1
[trainings.fedloru]
label = "FedLoRU"
accumulate-every = 1
"""


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.mark.slow
def test_an_analysis_measures_everything_and_goes_on_where_it_was(tmp_path):
    conf = tmp_path / "tiny.toml"
    conf.write_text(ANALYSIS)
    found = rank(conf, tmp_path / "out", jobs=1, console=quiet())
    assert found.failures == ()
    kinds = {(row["label"], row["kind"], row.get("of"), row.get("space")) for row in found.rows}
    for label in ("central", "FedLoRU"):
        assert {
            (label, "hessian", "sample", "full"),
            (label, "hessian", "client", "full"),
            (label, "similarity", "gradients", None),
            (label, "similarity", "updates", None),
            (label, "weights", None, None),
        } <= kinds
    assert ("FedLoRU", "hessian", "sample", "adapter") in kinds
    entries = [row for row in found.rows if row["kind"] == "ledger"]
    assert {(row["label"], row["entry"], row["round"]) for row in entries} == {("FedLoRU", 1, 1), ("FedLoRU", 2, 2)}
    assert all(row["aggregation_error"] > 0 for row in entries)
    assert all(row["stable_rank"] >= 1 - 1e-6 for row in found.rows if row.get("space") == "full")
    table = (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "charts" / "stable-rank-fedloru-adapter.svg").exists()

    fresh = {(row["label"], row["round"]): row["after_restart"] for row in found.rows if row["kind"] == "weights"}
    assert fresh == {("central", 0): False, ("central", 2): False, ("FedLoRU", 0): True, ("FedLoRU", 2): True}

    # What is lost is measured anew from what was kept, without training; the rest is taken as it is.
    (unit,) = (tmp_path / "out" / "units").glob("fedloru-*")
    lines = (unit / "measures.jsonl").read_bytes().splitlines(keepends=True)
    measure = read_rank_spec(conf).measure
    assert len(lines) == measure.steps == 2 * ((2 + 3) * 2 + 3) + 1
    assert UnitFiles(unit).progress() == 2 + measure.steps
    (unit / "measures.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:-9])  # killed as it wrote the eighth
    before = (unit / "run" / "summary.json").stat().st_mtime_ns
    again = rank(conf, tmp_path / "out", jobs=1, console=quiet())
    assert (unit / "run" / "summary.json").stat().st_mtime_ns == before
    assert (unit / "measures.jsonl").read_bytes() == b"".join(lines)
    assert again.rows == found.rows
    assert (tmp_path / "out" / "table.md").read_text() == table

    # A run by itself: its ledger.
    alone = rank(unit / "run", tmp_path / "alone", console=quiet())
    assert [row["new"] for row in alone.rows] == [row["new"] for row in entries]


def test_advice_comes_from_a_pilot(tmp_path):
    conf = tmp_path / "flat.toml"
    conf.write_text(SETTINGS.replace("12", "32,32"))
    found = rank(conf, tmp_path / "out", advise=True, jobs=1, console=quiet())
    assert found.advice is not None
    text = (tmp_path / "out" / "advice.md").read_text()
    assert f"rank = {found.advice.rank}" in text
    assert "pilot of 2 rounds" in text


def test_after_a_central_training_advice_is_still_for_the_federation(tmp_path, monkeypatch):
    conf = tmp_path / "central-first.toml"
    full = '[trainings.full]\nalgorithm = "fedavg"\nlearning-rate = 0.03\n[trainings.fedloru]'
    conf.write_text(
        ANALYSIS.replace("num-clients = 1", "num-clients = 1\nfraction-train = 1.0\nlearning-rate = 0.2").replace(
            "[trainings.fedloru]", full
        )
    )
    evidence = [Evidence("fc", (64, 64), 1.0, {(2, 1): 0.9}, {})]
    monkeypatch.setattr(command, "_carry_out", lambda *_: ())
    threads = []

    def looked_at(*arguments):
        threads.append(torch.get_num_threads())
        arguments[-1]("layer [fc]")
        return evidence

    monkeypatch.setattr(command, "pilot_evidence", looked_at)
    before = torch.get_num_threads()
    found = rank(conf, tmp_path / "out", advise=True, jobs=1, console=quiet())
    assert found.advice.cost == pytest.approx(2 * (2 + 1 / 0.5) * 128)
    assert threads == [1], "the threads to measure with, and no more"
    assert torch.get_num_threads() == before
    text = (tmp_path / "out" / "advice.md").read_text()
    assert "pilot of 2 rounds of full-rank FedAvg, learning rate 0.03, seed 0 (settings: those of 'full')" in text
    assert "for C = 0.5 of the clients in a round and alpha / rank = 4 (settings: those of 'FedLoRU')" in text


@pytest.mark.parametrize("name", ["digits", "glyphs"])
def test_the_shipped_analyses_are_advised_on_for_their_federation(name):
    spec = read_rank_spec(Path(__file__).parents[2] / "conf" / f"rank-{name}.toml")
    asked, whose = _factorised(spec)
    assert (asked.fraction_train, asked.alpha / asked.rank, whose) == (0.5, 2.0, "those of 'FedLoRU'")
    pilot, whose = _pilot(spec)
    assert whose == "those of 'FedAvg'"
    resolved = pilot.resolved(pilot.trainings[0], 0)
    assert (resolved["num-clients"], resolved["fraction-train"]) == (50, 0.5)
    assert resolved["learning-rate"] == {"digits": 0.03, "glyphs": 0.1}[name]


def test_without_a_training_of_factors_or_of_full_rank_the_common_settings_are_taken():
    without = parse_rank_spec(
        tomllib.loads(ANALYSIS.split("[trainings.fedloru]")[0].replace("rank = 2", "alpha = 6.0\nrank = 2")),
        "tiny",
        "tiny.toml",
    )
    asked, whose = _factorised(without)
    assert (asked.fraction_train, asked.alpha / asked.rank, whose) == (0.5, 3.0, "the common ones")
    pilot, whose = _pilot(without)
    assert (pilot.settings["num-clients"], whose) == (6, "the common ones")


def test_what_cannot_be_done_is_told_before_anything_runs(tmp_path):
    conf = tmp_path / "tiny.toml"
    conf.write_text(ANALYSIS)
    with pytest.raises(ConfigError, match="jobs must be at least 1"):
        rank(conf, tmp_path / "out", jobs=0)
    with pytest.raises(ConfigError, match="there is no configuration file"):
        rank(tmp_path / "nowhere.toml")
    with pytest.raises(ConfigError, match="advice needs a CONF"):
        rank(tmp_path, advise=True)
    spec = parse_rank_spec(tomllib.loads(ANALYSIS.replace("40]", "4000]")), "tiny", "tiny.toml")
    with pytest.raises(ConfigError, match=r"the clients have \d+ training samples in all; ask for fewer"):
        carry_out(spec.resolved(spec.trainings[0], 0), spec.clients(0), spec.measure, tmp_path / "unit")
    assert not (tmp_path / "unit").exists()
