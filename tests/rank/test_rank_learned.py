"""The rank of what a run has learned, from its files: in rank.csv and in its report."""

import io

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fedloru_flwr import atomic
from fedloru_flwr.compare import report
from fedloru_flwr.config import RunConfig
from fedloru_flwr.export import ExportError
from fedloru_flwr.job import build_strategy
from fedloru_flwr.models.plan import build_seeded
from fedloru_flwr.rank.learned import LEADING, write_ranks
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies.state import Outcome, state_to_checkpoint, step
from fedloru_flwr.workload import network_factory, server_data

pytestmark = pytest.mark.usefixtures("fresh_process", "quick_books")
ROUNDS = 5
# A method, and of its ledger's entries the round that each ends with; the last may be the factors in training.
METHODS = {
    "fedavg": [],
    "fedlora": [5],
    "fedloru": [2, 4, 5],
    "fedloru-seeded": [2, 4, 5],
    "fedpara": [5],
    "fedhm": [],
    "flexlora": [5],
    "lowrank-ef": [],
    "rolora": [5],
}


def leave_run(path, algorithm, still=(), **settings):
    """A finished run whose clients did as they were told at random; the trainables that are ``still`` never moved."""
    config = RunConfig.from_mapping(
        {"algorithm": algorithm, "model": "mlp", "hidden": "24,20", "num-clients": 4, **settings}
    )
    strategy = build_strategy(config, network_factory(config, server_data(config)[1]))
    generator, state, rows = torch.Generator().manual_seed(5), strategy.state, []
    for server_round in range(ROUNDS + 1):
        if server_round:
            moved = {
                key: value if key in still else value + 0.1 * torch.randn(value.shape, generator=generator)
                for key, value in state.trainables.items()
            }
            outcome = Outcome(moved, applied={})
            due = strategy.schedule.due(server_round)
            how = {"plan": strategy.plan, "accumulate_now": due, "reinit": strategy.reinit, "seed": strategy.seed}
            state = step(state, server_round, outcome, {}, **how)
        errors = {layer.name: 0.1 * server_round for layer in strategy.plan.layers} if server_round else {}
        row = {"round": server_round, "accuracy": 0.5, "bytes_up": 1, "bytes_down": 1, "seconds": 1.0}
        rows.append({**row, "ledger_version": state.ledger.version, "aggregation_error": errors})
    strategy.state = state
    tensors, saved, entries = state_to_checkpoint(state)
    path.mkdir(parents=True)
    run = RunDirectory(path)
    run.write_checkpoint(ROUNDS, tensors, {"settings": strategy._fingerprint(), **saved}, entries)
    run.write_model(strategy.merged_state_dict())
    atomic.write_json(path / "manifest.json", {"config": config.as_mapping()})
    atomic.write_json(path / "summary.json", {"status": "finished", "rounds": ROUNDS})
    atomic.write_lines(path / "metrics.jsonl", rows)
    return config


@pytest.mark.parametrize(("algorithm", "ends"), METHODS.items())
def test_every_method_tells_the_rank_of_what_it_has_learned(tmp_path, algorithm, ends):
    accumulates = {"accumulate-every": 2} if len(ends) > 1 else {}
    config = leave_run(tmp_path / "run", algorithm, **accumulates)
    write_ranks(tmp_path / "run")
    rows = RunDirectory(tmp_path / "run").read_ranks()
    before = build_seeded(network_factory(config, server_data(config)[1]), config.seed).state_dict()
    after = load_file(tmp_path / "run" / "model.safetensors")
    learned = {row["layer"]: row for row in rows if row["kind"] == "learned"}
    assert set(learned) == {name for name, value in after.items() if value.dim() >= 2}
    for name, row in learned.items():
        values = np.linalg.svd((after[name].double() - before[name].double()).numpy(), compute_uv=False)
        assert row["total_stable_rank"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6)
        leading = [row[f"s{index}"] for index in range(1, min(len(values), LEADING) + 1)]
        assert leading == pytest.approx(values[:LEADING], rel=1e-6, abs=1e-7)
        assert f"s{LEADING + 1}" not in row
        entries = [one for one in rows if one["kind"] == "ledger" and one["layer"] == name]
        if entries:
            assert [one["round"] for one in entries] == ends
            assert entries[-1]["total_stable_rank"] == pytest.approx(row["total_stable_rank"], rel=1e-4)
            assert entries[-1]["s1"] == pytest.approx(row["s1"], rel=1e-4)
            assert entries[0]["new"] == pytest.approx(1)
            since = [0, *ends]
            assert [one["aggregation_error"] for one in entries] == [
                pytest.approx(0.1 * np.mean(range(a + 1, b + 1))) for a, b in zip(since, ends, strict=False)
            ]
    assert bool(ends) == any(row["kind"] == "ledger" for row in rows)


def test_right_after_an_accumulation_the_fresh_factors_are_no_entry_and_what_never_moved_no_row(tmp_path):
    leave_run(tmp_path / "run", "fedloru", still=("layers.2.weight",), **{"accumulate-every": 5})
    write_ranks(tmp_path / "run")
    rows = RunDirectory(tmp_path / "run").read_ranks()
    assert {row["round"] for row in rows if row["kind"] == "ledger"} == {5.0}
    assert "layers.2.weight" not in {row["layer"] for row in rows}


def test_the_report_of_runs_shows_it_and_leaves_it_beside_each(tmp_path):
    for seed in (0, 1):
        leave_run(tmp_path / f"run-{seed}", "fedloru", seed=seed, **{"accumulate-every": 2})
    leave_run(tmp_path / "plain", "fedavg")
    leave_run(tmp_path / "lost", "fedlora")
    for file in (tmp_path / "lost" / "checkpoints").glob("*.safetensors"):
        file.unlink()
    told = io.StringIO()
    runs = [tmp_path / name for name in ("run-0", "run-1", "plain", "lost")]
    outcome = report(runs, console=Console(file=told, width=300))
    assert "no rank of what was learned: " in told.getvalue()
    assert "lost has no checkpoint" in told.getvalue()
    assert not (tmp_path / "lost" / "rank.csv").exists()
    first, second = (RunDirectory(run).read_ranks() for run in runs[:2])
    (layer,) = {row["layer"] for row in first if row["kind"] == "ledger"} & {"layers.1.weight"}
    stable = [
        row["total_stable_rank"]
        for rows in (first, second)
        for row in rows
        if (row["kind"], row["layer"]) == ("learned", layer)
    ]
    table = (outcome.output_dir / "table.md").read_text().split("## Rank of what was learned")[1]
    line = next(line for line in table.splitlines() if line.startswith(f"| fedloru, {layer}"))
    assert f"| {np.mean(stable):.3g} ± {np.std(stable, ddof=1):.2g} |" in line
    assert "| 3 ± 0 |" in line, "entries"
    fedavg = next(line for line in table.splitlines() if line.startswith(f"| fedavg, {layer}"))
    assert fedavg.endswith("| \u2013 | \u2013 | \u2013 | \u2013 |"), "no entries, none that is new"
    page = (outcome.output_dir / "report.html").read_text()
    assert "Rank of what was learned" in page
    again = report([outcome.output_dir], tmp_path / "again", console=Console(file=io.StringIO()))
    assert line in (again.output_dir / "table.md").read_text()


def test_a_run_without_a_checkpoint_has_no_rank(tmp_path):
    leave_run(tmp_path / "run", "fedlora")
    for file in (tmp_path / "run" / "checkpoints").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ExportError, match="no checkpoint"):
        write_ranks(tmp_path / "run")
    assert RunDirectory(tmp_path / "run").read_ranks() == []
