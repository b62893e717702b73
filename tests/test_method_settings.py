"""Settings that only some methods take, and a continued run's clients."""

import json
from pathlib import Path

import pytest

from fedloru_flwr import launch
from fedloru_flwr.config import ConfigError, RunConfig


def rows(run_dir):
    return [json.loads(line) for line in (Path(run_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"algorithm": "fedloru", "personal-rank": 8}, "personal-rank = 8 means nothing to algorithm = 'fedloru'"),
        ({"algorithm": "fedavg", "accumulate-every": 2}, "accumulate-every = 2 means nothing to algorithm = 'fedavg'"),
        ({"algorithm": "fedlora", "nested-scale": 3.0}, "only to mfedloru"),
        ({"accumulate-every": 2, "accumulate-at": "3"}, "exclude each other"),
        ({"algorithm": "pfedloru", "local-epochs": 2}, "raise local-epochs"),
        ({"algorithm": "pfedloru", "local-epochs": 5, "personal-epochs": 5}, "give 0 and 5"),
    ],
)
def test_settings_that_would_be_ignored_or_make_no_sense_are_refused(settings, told):
    with pytest.raises(ConfigError, match=told):
        RunConfig.from_mapping(settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"algorithm": "pfedloru"},
        pytest.param({"algorithm": "fedavg", "scaffold": True}, marks=pytest.mark.slow),
        pytest.param({"algorithm": "lowrank-ef"}, marks=pytest.mark.slow),
    ],
)
def test_a_finished_run_that_goes_on_has_its_clients_own_state(settings, tmp_path):
    def run(name, rounds):
        common = {"num-clients": 3, "fraction-train": 0.7, "local-epochs": 3, "model": "mlp", "hidden": "32,32"}
        more = {"rank": 2, "num-server-rounds": rounds, "run-name": name, "output-dir": str(tmp_path)}
        return launch.run(None, {**common, **more, **settings}, engine="in-process", resume="auto")["run_dir"]

    whole = run("whole", 4)
    run("cut", 2)
    cut = run("cut", 4)
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert models[0] == models[1]
    assert [row["accuracy"] for row in rows(whole)] == [row["accuracy"] for row in rows(cut)]


def test_the_accumulated_rank_counts_what_the_entries_can_hold(tmp_path):
    common = {"num-clients": 3, "fraction-train": 1.0, "local-epochs": 1, "model": "mlp", "hidden": "64,64", "rank": 2}
    common |= {"num-server-rounds": 2, "output-dir": str(tmp_path)}
    for algorithm, more, ranks in (
        ("flora", {}, [0, 6, 12]),
        ("fedpara", {"accumulate-every": 1}, [0, 4, 8]),
        ("fedloru", {"accumulate-every": 1}, [0, 2, 4]),
    ):
        run = launch.run(None, {**common, **more, "algorithm": algorithm, "run-name": algorithm}, engine="in-process")
        assert [row["accumulated_rank"] for row in rows(run["run_dir"])] == ranks, algorithm
