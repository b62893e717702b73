"""A batch of clients and one client after the other: two ways to compute the same run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedloru_flwr
from fedloru_flwr import client_app, job
from fedloru_flwr.clients import cohort
from fedloru_flwr.registry import ALGORITHMS

SETTINGS = {
    "num-clients": 6,
    "fraction-train": 0.5,
    "fraction-evaluate": 0.0,
    "local-epochs": 2,
    "learning-rate": 0.01,  # small enough that rounding does not grow from round to round
    "model": "cnn",
    "model-width": 4,
    "held-out-fraction": 0.5,
}
OF = {
    "pfedloru": {"local-epochs": 3},
    "mfedloru": {"ranks": "2:0.5,4:0.5"},
    "hetlora": {"ranks": "2:0.5,4:0.5"},
    "flora": {"ranks": "2:0.5,4:0.5"},
    "flexlora": {"ranks": "2:0.5,4:0.5"},
}
MORE = {
    "fedloru, SCAFFOLD": {"scaffold": True},
    "fedloru, FedProx": {"proximal-mu": 0.1},
    "fedloru, clipping": {"max-grad-norm": 0.5},
    "fedloru, AdamW": {"optimizer": "adamw", "learning-rate": 0.003},
    "fedavg, SCAFFOLD": {"scaffold": True},
}
CASES = {**{name: OF.get(name, {}) for name in ALGORITHMS}, **MORE}


@dataclass(frozen=True)
class Double:
    """A factory's network in float64."""

    factory: Callable[[], nn.Module]

    def __call__(self) -> nn.Module:
        return self.factory().double()


def in_double(samples):
    return None if samples is None else replace(samples, inputs=samples.inputs.double())


@pytest.fixture
def double(monkeypatch):
    """Networks and samples in float64, for server and clients."""
    factory, data, central = client_app.network_factory, client_app.client_data, job.server_data

    def client_data(*arguments):
        found, spec = data(*arguments)
        return replace(found, train=in_double(found.train), held_out=in_double(found.held_out)), spec

    def server_data(config):
        samples, spec = central(config)
        return in_double(samples), spec

    for module in (client_app, job):
        monkeypatch.setattr(module, "network_factory", lambda config, spec: Double(factory(config, spec)))
    monkeypatch.setattr(client_app, "client_data", client_data)
    monkeypatch.setattr(job, "server_data", server_data)


def model_of(directory: Path, case: str, rounds: int, *, batched: bool) -> dict[str, torch.Tensor]:
    settings = {
        **SETTINGS,
        "algorithm": case.split(",")[0],
        **CASES[case],
        "num-server-rounds": rounds,
        "batched": batched,
        "output-dir": str(directory),
        "run-name": "batched" if batched else "alone",
    }
    return load_file(Path(fedloru_flwr.run(config=settings, engine="in-process")["run_dir"]) / "model.safetensors")


def difference(directory: Path, case: str, rounds: int) -> float:
    """The largest relative difference of a tensor between the two forms, in the Frobenius norm."""
    one, other = (model_of(directory, case, rounds, batched=batched) for batched in (True, False))
    assert list(one) == list(other)
    return max(float((one[key] - other[key]).norm() / other[key].norm().clamp(min=1e-12)) for key in one)


@pytest.fixture
def batches(monkeypatch):
    """How many clients each group trained as one has had."""
    sizes: list[int] = []
    train = cohort._Group.train

    def noted(self):
        sizes.append(len(self._tasks))
        return train(self)

    monkeypatch.setattr(cohort._Group, "train", noted)
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_round_of_batches_is_one_of_single_clients(case, tmp_path, batches):
    assert difference(tmp_path, case, 1) <= 1e-6
    assert sum(batches) >= 3, "the first run was of batches"


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ten_rounds_in_double_precision_are_the_same(case, tmp_path, batches, double):
    assert difference(tmp_path, case, 10) <= 1e-9
    assert sum(batches) >= 30
