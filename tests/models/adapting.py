"""What the tests of adapted models share."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedloru_flwr.lowrank import Entry, fold
from fedloru_flwr.models import AdapterPlan
from fedloru_flwr.models.adapters import AdaptedModel


def random_factors(plan: AdapterPlan, seed: int = 0, size: float = 0.3) -> dict[str, Tensor]:
    """Factors of which neither is zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        key: shape for one in plan.layers for key, shape in ((one.a_key, one.a_shape()), (one.b_key, one.b_shape()))
    }
    return {key: size * torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def load(adapted: AdaptedModel, factors: Mapping[str, Tensor]) -> None:
    """Replace the factors and keep the dense leaves."""
    adapted.write_trainables({**adapted.read_trainables(), **factors})


def entries_of(plan: AdapterPlan, count: int) -> list[Entry]:
    """A chain of accumulated adapters."""
    chain: list[Entry] = []
    for number in range(count):
        previous = chain[-1].digest if chain else "root"
        chain.append(Entry.after(previous, random_factors(plan, 100 + number), plan.scale))
    return chain


def with_folded_weights(plain: nn.Module, plan: AdapterPlan, *adapters: Mapping[str, Tensor]) -> nn.Module:
    """A plain copy of a plain model whose weights are ``W + s sum_i B_i A_i``."""
    model = copy.deepcopy(plain)
    state = model.state_dict()
    for adapter in adapters:
        state = fold(state, adapter, plan.layers, plan.scale)
    model.load_state_dict(state)
    return model


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """The models in evaluation mode and without gradients."""
    for model in models:
        model.eval()
    with torch.no_grad():
        yield


def assert_same(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)
