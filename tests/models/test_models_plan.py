import copy
import math

import pytest
import torch
from torch import nn

from fedloru_flwr.lowrank import FactorisedLayer
from fedloru_flwr.models import AdapterPlan, NetworkFactory, PlanError, plan_adapter, plan_full
from fedloru_flwr.models.plan import as_names, canonical_names, exact_pattern, plain_state, plan_model

CNN = NetworkFactory("cnn", (1, 8, 8), 10)()
STAGES = [f"layer{stage}.{block}.{part}" for stage in (1, 2, 3, 4) for block in (0, 1) for part in ("conv1", "conv2")]


def names(plan: AdapterPlan) -> list[str]:
    return [layer.name for layer in plan.layers]


@pytest.mark.parametrize(
    ("factory", "rank", "expected"),
    [
        (NetworkFactory("cnn", (1, 8, 8), 10), 4, ["conv2", "conv3", "fc1"]),
        (NetworkFactory("cnn", (3, 32, 32), 10), 4, ["conv1", "conv2", "conv3", "fc1"]),
        (NetworkFactory("cnn", (1, 8, 8), 10), 16, ["conv3", "fc1"]),
        (NetworkFactory("mlp", (1, 8, 8), 10), 4, ["layers.0", "layers.1"]),
        (NetworkFactory("mlp", (400,), 62, hidden=(256, 256)), 16, ["layers.0", "layers.1"]),
        (
            NetworkFactory("resnet10", (3, 8, 8), 10, width=16),
            4,
            ["conv1", *[name for name in STAGES if ".1." not in name]],
        ),
        (NetworkFactory("resnet18", (3, 8, 8), 10, width=16), 4, ["conv1", *STAGES]),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_the_automatic_choice_on_the_built_in_networks(factory: NetworkFactory, rank: int, expected: list[str]) -> None:
    chosen = names(plan_adapter(factory(), rank, 8.0))
    assert [name for name in chosen if "shortcut" not in name] == expected
    if factory.name.startswith("resnet"):
        assert [name for name in chosen if "shortcut" in name] == [f"layer{n}.0.shortcut.0" for n in (2, 3, 4)]


def test_a_plan_sorts_every_parameter_and_says_what_stayed_dense_and_why() -> None:
    plan = plan_adapter(CNN, 4, 8.0)
    assert plan == AdapterPlan(
        layers=(
            FactorisedLayer("conv2", "conv2d", (32, 16, 3, 3), 4),
            FactorisedLayer("conv3", "conv2d", (64, 32, 3, 3), 4),
            FactorisedLayer("fc1", "linear", (128, 256), 4),
        ),
        dense_leaves=(
            "conv1.weight",
            "conv1.bias",
            "conv2.bias",
            "conv3.bias",
            "fc1.bias",
            "fc2.weight",
            "fc2.bias",
        ),
        statistics=(),
        base=("conv2.weight", "conv3.weight", "fc1.weight"),
        scale=2.0,
        notes=(
            "fc2: the output layer stays dense",
            "conv1: stays dense, factors of rank 4 would not halve its bytes",
        ),
    )
    assert plan.factor_keys == (
        "conv2.lora_A",
        "conv2.lora_B",
        "conv3.lora_A",
        "conv3.lora_B",
        "fc1.lora_A",
        "fc1.lora_B",
    )
    assert plan.trainable_keys == plan.factor_keys + plan.dense_leaves


def test_planning_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 40), nn.BatchNorm1d(40), torch.nn.utils.parametrizations.spectral_norm(nn.Linear(40, 3))
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan_adapter(model, 2, 2.0)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_factors_that_exactly_halve_a_layers_bytes_are_taken_and_larger_ones_not() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 15), nn.ReLU(), nn.Linear(15, 2))
    plan = plan_adapter(model, 4, 4.0)  # 2 * 4 * (16 + 16) = 16 * 16, but 2 * 4 * (16 + 15) > 16 * 15
    assert names(plan) == ["0"]
    assert "2: stays dense, factors of rank 4 would not halve its bytes" in plan.notes


def test_where_no_layers_bytes_can_be_halved_those_above_the_rank_are_taken() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5), nn.ReLU(), nn.Linear(5, 2))
    plan = plan_adapter(model, 5, 4.0)
    assert names(plan) == ["0"]
    assert plan.notes == (
        "4: the output layer stays dense",
        "2: stays dense, its dimensions (5 x 16) do not exceed the rank 5",
    )


def test_by_name_a_layer_is_factorised_even_where_it_does_not_pay() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    assert names(plan_adapter(model, 9, 4.0, "0,2")) == ["0", "2"]


def test_a_layer_whose_smaller_side_is_the_rank_stays_dense_even_by_name() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))
    plan = plan_adapter(model, 10, 4.0, "0,2")
    assert names(plan) == ["0"]
    assert plan.notes == ("2: stays dense, its dimensions (10 x 16) do not exceed the rank 10",)


def test_the_output_layer_is_factorised_where_it_is_more_than_a_quarter_of_the_model() -> None:
    assert names(plan_adapter(nn.Sequential(nn.Linear(90, 60), nn.Linear(60, 30)), 2, 2.0)) == ["0"]
    assert names(plan_adapter(nn.Sequential(nn.Linear(90, 60), nn.Linear(60, 33)), 2, 2.0)) == ["0", "1"]
    assert names(plan_adapter(nn.Sequential(nn.Linear(60, 60)), 2, 2.0)) == ["0"]


def test_a_linear_layer_that_is_not_the_last_layer_is_no_output_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 90, 4))
    assert names(plan_adapter(model, 2, 2.0)) == ["0", "2"]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("fc1", ["fc1"]),
        (["fc1", "conv2"], ["conv2", "fc1"]),
        (" fc1 , conv2,", ["conv2", "fc1"]),
        ("Linear", ["fc1", "fc2"]),
        ("Conv2d", ["conv2", "conv3"]),
        ("Conv2d,fc1", ["conv2", "conv3", "fc1"]),
        (("Linear", "Conv2d"), ["conv2", "conv3", "fc1", "fc2"]),
        (None, ["conv2", "conv3", "fc1"]),
        ("auto", ["conv2", "conv3", "fc1"]),
        ("", ["conv2", "conv3", "fc1"]),
        ([], ["conv2", "conv3", "fc1"]),
    ],
    ids=str,
)
def test_targets_are_names_types_or_both(targets: str | list[str] | None, expected: list[str]) -> None:
    # At rank 9 the first convolution, 16 x 9 as a matrix, is too small even for "Conv2d".
    rank = 4 if not as_names(targets) else 9
    assert names(plan_adapter(CNN, rank, 8.0, targets)) == expected


def test_targets_can_be_whole_names_or_dotted_suffixes_but_not_parts_of_words() -> None:
    model = NetworkFactory("resnet10", (3, 8, 8), 10, width=8)()
    assert names(plan_adapter(model, 2, 2.0, "layer1.0.conv1")) == ["layer1.0.conv1"]
    assert names(plan_adapter(model, 2, 2.0, "0.conv1")) == [f"layer{n}.0.conv1" for n in (1, 2, 3, 4)]
    assert names(plan_adapter(model, 2, 2.0, "conv1")) == ["conv1", *(f"layer{n}.0.conv1" for n in (1, 2, 3, 4))]
    with pytest.raises(PlanError, match="'onv1' matches no"):
        plan_adapter(model, 2, 2.0, "onv1")


def test_every_type_can_be_named() -> None:
    model = nn.ModuleDict({"e": nn.Embedding(9, 9), "c1": nn.Conv1d(9, 9, 3), "c2": nn.Conv2d(9, 9, 3)})
    for target, name, kind in (("Embedding", "e", "embedding"), ("Conv1d", "c1", "conv1d"), ("Conv2d", "c2", "conv2d")):
        (layer,) = plan_adapter(model, 2, 2.0, target).layers
        assert (layer.name, layer.kind, layer.transposed) == (name, kind, kind == "embedding")


@pytest.mark.parametrize(
    ("dense_leaves", "expected"),
    [
        ("all", ["0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]),
        ("none", []),
        ("1", ["1.weight", "1.bias"]),
        (" 3 , 0.bias ", ["0.bias", "3.weight", "3.bias"]),
        (["3.bias"], ["3.bias"]),
        ([], []),
    ],
    ids=str,
)
def test_dense_leaves_are_all_none_or_chosen_by_prefix_in_the_models_order(
    dense_leaves: str | list[str], expected: list[str]
) -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.LayerNorm(40), nn.ReLU(), nn.Linear(40, 3))
    plan = plan_adapter(model, 2, 2.0, None, dense_leaves)
    assert list(plan.dense_leaves) == expected
    everything = [name for name, _ in model.named_parameters()]
    assert sorted([*plan.base, *plan.dense_leaves]) == sorted(everything)
    assert "0.weight" in plan.base


def test_a_dense_prefix_is_no_part_of_a_word() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(40, 40), "fc1": nn.Linear(40, 40), "out": nn.Linear(40, 3)})
    assert plan_adapter(model, 2, 2.0, "out", "fc").dense_leaves == ("fc.weight", "fc.bias")


def test_running_statistics_are_listed_and_counters_and_unsaved_buffers_are_not() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.BatchNorm1d(40), nn.BatchNorm1d(40, track_running_stats=False))
    model.register_buffer("positions", torch.arange(4))
    model.register_buffer("scratch", torch.ones(4), persistent=False)
    assert plan_adapter(model, 2, 2.0).statistics == ("1.running_mean", "1.running_var")
    assert plan_full(model).statistics == ("1.running_mean", "1.running_var")


def test_layers_that_are_frozen_in_the_model_are_left_alone_unless_named() -> None:
    model = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 3))
    model[0].requires_grad_(False)
    plan = plan_adapter(model, 2, 2.0)
    assert names(plan) == ["1"]
    assert plan.notes[0] == "0: frozen in the model, left so; name it in target-modules to train it"
    assert plan.base == ("0.weight", "0.bias", "1.weight")
    named = plan_adapter(model, 2, 2.0, "0")
    assert names(named) == ["0"]
    assert named.base == ("0.weight", "0.bias")


def test_the_full_plan_trains_everything_that_is_trainable() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[0].requires_grad_(False)
    assert plan_full(model) == AdapterPlan(
        layers=(),
        dense_leaves=("1.weight", "1.bias", "2.weight", "2.bias"),
        statistics=("1.running_mean", "1.running_var"),
        base=("0.weight", "0.bias"),
        scale=1.0,
        form="full",
    )


def test_a_full_plan_without_anything_to_train_is_refused() -> None:
    with pytest.raises(PlanError, match="no trainable parameter"):
        plan_full(nn.Linear(4, 4).requires_grad_(False))


@pytest.mark.parametrize("rank", [0, -3])
def test_a_rank_below_one_is_refused(rank: int) -> None:
    with pytest.raises(PlanError, match=f"rank must be at least 1, got {rank}"):
        plan_adapter(CNN, rank, 8.0)


@pytest.mark.parametrize("alpha", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_that_is_not_a_positive_number_is_refused(alpha: float) -> None:
    with pytest.raises(PlanError, match=f"alpha must be a positive number, got {alpha}"):
        plan_adapter(CNN, 4, alpha)


def test_an_unknown_target_is_refused_with_what_there_is() -> None:
    with pytest.raises(PlanError, match=r"'fc9' matches no .* the model has: conv1, conv2, conv3, fc1, fc2\. Name one"):
        plan_adapter(CNN, 4, 8.0, "fc1,fc9")


def test_an_unknown_dense_leaf_is_refused() -> None:
    with pytest.raises(PlanError, match="dense-leaves: 'head' matches no parameter; use 'all', 'none'"):
        plan_adapter(CNN, 4, 8.0, None, "head")


def test_a_model_that_leaves_nothing_to_factorise_is_refused_with_the_reason_for_each_layer_and_the_remedy() -> None:
    with pytest.raises(PlanError) as refusal:
        plan_adapter(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), 4, 8.0)
    assert str(refusal.value) == (
        "no layer is left to factorise at rank 4: 1: the output layer stays dense; "
        "0: stays dense, its dimensions (4 x 4) do not exceed the rank 4. Lower the rank or name target-modules"
    )
    with pytest.raises(PlanError, match="the model has no linear, convolutional or embedding layer"):
        plan_adapter(nn.Sequential(nn.LayerNorm(4)), 1, 1.0)
    with pytest.raises(PlanError, match="0: frozen in the model, left so; name it in target-modules"):
        plan_adapter(nn.Sequential(nn.Linear(40, 40)).requires_grad_(False), 1, 1.0)


def test_lazy_parameters_are_refused_by_name() -> None:
    model = nn.Sequential(nn.LazyLinear(40), nn.Linear(40, 3))
    for plan in (lambda: plan_adapter(model, 2, 2.0), lambda: plan_full(model)):
        with pytest.raises(PlanError, match=r"'0.weight' is not initialised yet: let the factory run one batch"):
            plan()


def test_the_pattern_matches_exactly_these_names() -> None:
    import re

    pattern = exact_pattern(["a.b", "c"])
    assert [name for name in ("a.b", "c", "axb", "a", "x.c", "a.b.c") if re.fullmatch(pattern, name)] == ["a.b", "c"]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 20)
        self.body = nn.Linear(20, 20)
        self.out = nn.Linear(20, 50, bias=False)
        self.out.weight = self.tokens.weight


def test_tied_parameters_have_one_canonical_name_and_a_plain_state_is_a_copy() -> None:
    model = Tied()
    assert canonical_names(model) == {
        "tokens.weight": "tokens.weight",
        "body.weight": "body.weight",
        "body.bias": "body.bias",
        "out.weight": "tokens.weight",
    }
    state = plain_state(model)
    assert list(state) == ["tokens.weight", "body.weight", "body.bias", "out.weight"]
    state["tokens.weight"].zero_()
    assert torch.count_nonzero(model.tokens.weight) > 0
    assert torch.equal(state["out.weight"], model.out.weight)
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize("form", ["factors", "hadamard", "one-sided", "one-sided-orthonormal"])
@pytest.mark.parametrize("rank", [None, 2])
def test_fresh_factors_of_a_model_in_double_precision_are_the_same_numbers_in_it(form: str, rank: int | None) -> None:
    single, double = (plan_model(model, form, 4, 8.0, "auto", "all") for model in (CNN, copy.deepcopy(CNN).double()))
    found, expected = double.fresh(3, 1, rank), single.fresh(3, 1, rank)
    assert list(found) == list(expected) == list(double.factor_keys)
    for key, value in expected.items():
        assert (value.dtype, found[key].dtype) == (torch.float32, torch.float64)
        assert torch.equal(found[key], value.double())
