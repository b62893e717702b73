"""What an adapted layer computes, and what an accumulation changes: the first two invariants, layer by layer."""

import copy
from collections.abc import Callable

import pytest
import torch
from adapting import assert_same, entries_of, evaluating, load, random_factors, with_folded_weights
from torch import Tensor, nn

from fedloru_flwr.lowrank import Entry, initial_factors, product
from fedloru_flwr.models import AdapterPlan, NetworkFactory, plan_adapter
from fedloru_flwr.models.adapters import AdaptedModel


def series() -> Tensor:
    return torch.randn(3, 6, 11)


def image() -> Tensor:
    return torch.randn(3, 6, 9, 8)


def vector() -> Tensor:
    return torch.randn(3, 6)


def tokens() -> Tensor:
    return torch.randint(0, 9, (3, 5))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 7), vector),
    "linear without bias": (lambda: nn.Linear(6, 7, bias=False), vector),
    "linear over a sequence": (lambda: nn.Linear(6, 7), lambda: torch.randn(2, 4, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 7, 3), series),
    "conv1d everything": (
        lambda: nn.Conv1d(6, 7, 3, stride=2, padding=4, dilation=2, padding_mode="circular"),
        series,
    ),
    "conv1d same": (lambda: nn.Conv1d(6, 7, 4, padding="same", dilation=2), series),
    "conv1d same, reflected": (lambda: nn.Conv1d(6, 7, 4, padding="same", padding_mode="reflect"), series),
    "conv2d": (lambda: nn.Conv2d(6, 7, 3), image),
    "conv2d without bias": (lambda: nn.Conv2d(6, 7, 3, bias=False), image),
    "conv2d 1x1": (lambda: nn.Conv2d(6, 7, 1, stride=2), image),
    "conv2d 1x3": (lambda: nn.Conv2d(6, 7, (1, 3), padding=(0, 1)), image),
    "conv2d strided": (lambda: nn.Conv2d(6, 7, 3, stride=(2, 1), padding=1), image),
    "conv2d dilated": (lambda: nn.Conv2d(6, 7, 3, padding=(2, 1), dilation=(2, 1)), image),
    "conv2d circular": (lambda: nn.Conv2d(6, 7, 3, padding=(1, 2), padding_mode="circular"), image),
    "conv2d replicate": (lambda: nn.Conv2d(6, 7, 3, padding=2, padding_mode="replicate"), image),
    "conv2d valid": (lambda: nn.Conv2d(6, 7, 3, padding="valid"), image),
    "conv2d same": (lambda: nn.Conv2d(6, 7, (3, 4), padding="same", dilation=2), image),
    "conv2d same, circular": (lambda: nn.Conv2d(6, 7, 4, padding="same", padding_mode="circular", dilation=2), image),
    "embedding": (lambda: nn.Embedding(9, 7), tokens),
    "embedding with padding": (lambda: nn.Embedding(9, 7, padding_idx=0), tokens),
}
each_layer = pytest.mark.parametrize("kind", LAYERS)


def single(kind: str) -> tuple[nn.Module, AdapterPlan, AdaptedModel, Tensor]:
    """A plain model of one layer, its plan, an adapted copy, and an input."""
    torch.manual_seed(0)
    layer, batch = LAYERS[kind]
    plain = nn.Sequential(layer())
    plan = plan_adapter(plain, 2, 3.0, ["0"])
    return plain, plan, AdaptedModel(copy.deepcopy(plain), plan), batch()


@each_layer
def test_an_adapted_layer_computes_what_a_plain_one_with_folded_weights_does(kind: str) -> None:
    plain, plan, adapted, batch = single(kind)
    factors = random_factors(plan)
    load(adapted, factors)
    with evaluating(adapted.module, plain):
        output = adapted.module(batch)
        assert_same(output, with_folded_weights(plain, plan, factors)(batch))
        assert (output - plain(batch)).abs().max() > 0.01


def accumulate(adapted: AdaptedModel, factors: dict[str, Tensor], into: str) -> None:
    """One accumulation with reset, as a client does it."""
    entry = Entry.after("root", factors, adapted.plan.scale)
    if into == "merge":
        adapted.fold(entry)
    else:
        adapted.stack([entry])
    load(adapted, initial_factors(adapted.plan.layers, seed=0, version=1))


@pytest.mark.parametrize("into", ["merge", "stack"])
@each_layer
def test_an_accumulation_with_reset_leaves_a_layers_outputs_unchanged(kind: str, into: str) -> None:
    _, plan, adapted, batch = single(kind)
    factors = random_factors(plan)
    load(adapted, factors)
    before = adapted.module(batch)
    accumulate(adapted, factors, into)
    assert_same(adapted.module(batch), before)
    fresh = initial_factors(plan.layers, seed=0, version=1)
    assert all(torch.equal(fresh[key], value) for key, value in adapted.read_trainables().items() if key in fresh)


NETWORKS = {
    "cnn": NetworkFactory("cnn", (3, 8, 8), 10, width=8),
    "mlp": NetworkFactory("mlp", (3, 8, 8), 10, hidden=(32, 32)),
    "resnet10": NetworkFactory("resnet10", (3, 8, 8), 10, width=8),
    "resnet10 with batch norm": NetworkFactory("resnet10", (3, 8, 8), 10, width=8, norm="batch"),
    "resnet18": NetworkFactory("resnet18", (3, 8, 8), 10, width=8),
    "resnet18 with batch norm": NetworkFactory("resnet18", (3, 8, 8), 10, width=8, norm="batch"),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("into", ["merge", "stack"])
@pytest.mark.parametrize("name", NETWORKS)
def test_an_accumulation_with_reset_leaves_a_networks_outputs_unchanged(name: str, into: str, training: bool) -> None:
    plain = NETWORKS[name]()
    plan = plan_adapter(plain, 2, 4.0)
    adapted = AdaptedModel(copy.deepcopy(plain), plan)
    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    factors = random_factors(plan, size=0.1)
    load(adapted, factors)
    adapted.module.train(training)
    before = adapted.module(batch)
    accumulate(adapted, factors, into)
    assert_same(adapted.module(batch), before)
    assert (before - plain.train(training)(batch)).abs().max() > 0.01


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["linear", "conv1d everything", "conv2d same, circular", "embedding"])
def test_accumulations_add_up_and_merging_and_stacking_agree_beyond_the_layers_rank_too(kind: str, count: int) -> None:
    plain, plan, merging, batch = single(kind)
    stacking = AdaptedModel(copy.deepcopy(plain), plan)
    (layer,) = plan.layers
    entries = entries_of(plan, count)
    for entry in entries:
        merging.fold(entry)
    for held in range(1, count + 1):
        stacking.stack(entries[:held])
    weight = plain.state_dict()[layer.weight_key]
    expected = weight.double() + sum(
        1.5 * product(layer, {key: value.double() for key, value in entry.adapter.items()}) for entry in entries
    )
    assert_same(merging.read_base()[layer.weight_key].double(), expected)
    assert torch.equal(stacking.read_base()[layer.weight_key], weight)
    # On top of what was accumulated, the factors in training count once, at their own scale.
    factors = random_factors(plan, 7)
    load(merging, factors)
    load(stacking, factors)
    whole = with_folded_weights(plain, plan, *[entry.adapter for entry in entries], factors)
    with evaluating(merging.module, stacking.module, whole):
        assert_same(merging.module(batch), whole(batch), atol=3e-5)
        assert_same(stacking.module(batch), whole(batch), atol=3e-5)


def test_stacked_entries_can_be_replaced_by_fewer_and_removed() -> None:
    plain, plan, adapted, batch = single("conv2d strided")
    entries = entries_of(plan, 3)
    factors = random_factors(plan)
    load(adapted, factors)
    with evaluating(adapted.module, plain):
        for held in (3, 1, 2, 0, 0, 1):
            adapted.stack(entries[:held])
            past = [entry.adapter for entry in entries[:held]]
            assert_same(adapted.module(batch), with_folded_weights(plain, plan, *past, factors)(batch))
        adapted.stack([])
        assert not any("ledger" in name for name, _ in adapted.module.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_base_is_folded_in_float32_and_its_factors_are_float32(dtype: torch.dtype) -> None:
    # largest + 1 has no representation in the dtype: formed there, the sums below would be 0.
    largest = 2048.0 if dtype == torch.float16 else 256.0
    plain = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 3)).to(dtype)
    plain[0].weight.data.fill_(-largest)
    plan = plan_adapter(plain, 2, 2.0, ["0"])
    adapted = AdaptedModel(plain, plan)
    factors = {"0.lora_A": torch.tensor([[largest] * 4, [1.0] * 4]), "0.lora_B": torch.ones(4, 2)}
    adapted.fold(Entry.after("root", factors, 1.0))
    base = adapted.read_base()["0.weight"]
    assert base.dtype == dtype
    assert base.tolist() == [[1.0] * 4] * 4
    load(adapted, factors)
    adapted.stack([Entry.after("root", factors, 1.0)])
    own = {name: value.dtype for name, value in adapted.module.named_parameters() if "lora_" in name}
    assert len(own) == 4
    assert set(own.values()) == {torch.float32}
    assert adapted.module(torch.ones(1, 4, dtype=dtype)).dtype == dtype


def test_a_float64_model_stays_in_float64() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 2)).double()
    plan = plan_adapter(plain, 2, 3.0, ["0"])
    adapted = AdaptedModel(copy.deepcopy(plain), plan)
    factors = {key: value.double() for key, value in random_factors(plan).items()}
    load(adapted, factors)
    batch = torch.randn(3, 6, dtype=torch.float64)
    assert {value.dtype for value in adapted.read_trainables().values()} == {torch.float64}
    before = adapted.module(batch)
    torch.testing.assert_close(before, with_folded_weights(plain, plan, factors)(batch), rtol=0, atol=1e-12)
    for into in ("merge", "stack"):
        adapted = AdaptedModel(copy.deepcopy(plain), plan)
        accumulate(adapted, factors, into)
        torch.testing.assert_close(adapted.module(batch), before, rtol=0, atol=1e-12)


def test_dropout_in_the_model_goes_on_as_it_was() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 7), nn.Dropout(0.5), nn.Linear(7, 7))
    plan = plan_adapter(plain, 2, 3.0, "1,3")
    adapted = AdaptedModel(copy.deepcopy(plain), plan)
    factors = random_factors(plan)
    load(adapted, factors)
    merged, batch = with_folded_weights(plain, plan, factors), torch.randn(5, 6)
    outputs = []
    for model in (adapted.module.train(), merged.train()):
        torch.manual_seed(1)
        outputs.append(model(batch))
    assert_same(outputs[0], outputs[1])
    assert torch.count_nonzero(outputs[0] - merged.eval()(batch)) > 0
