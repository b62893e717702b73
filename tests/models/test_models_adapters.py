import copy

import pytest
import torch
from adapting import assert_same, entries_of, load, random_factors
from torch import Tensor, nn

from fedloru_flwr.lowrank import initial_factors
from fedloru_flwr.models import NetworkFactory, plan_adapter, plan_full
from fedloru_flwr.models.adapters import AdaptedModel


class Net(nn.Module):
    """A layer of each kind, a norm with statistics, a frozen layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.fc = nn.Linear(8, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length)`` to ``(batch, 3)``."""
        y = torch.relu(self.norm(self.conv(self.tokens(x).transpose(1, 2)))).mean(2)
        return self.out(torch.relu(self.fc(self.frozen(y))))


KEYS = [
    "tokens.lora_A",
    "tokens.lora_B",
    "conv.lora_A",
    "conv.lora_B",
    "fc.lora_A",
    "fc.lora_B",
    "conv.bias",
    "norm.weight",
    "norm.bias",
    "fc.bias",
    "out.weight",
    "out.bias",
]
BATCH = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [0, 2, 4, 6]])
LABELS = torch.tensor([0, 1, 2])


def build() -> AdaptedModel:
    torch.manual_seed(0)
    net = Net()
    return AdaptedModel(net, plan_adapter(net, 2, 4.0, "tokens,conv,fc"))


def trainable(adapted: AdaptedModel) -> set[str]:
    """What has its gradient on, under PEFT's names."""
    return {name for name, parameter in adapted.module.named_parameters() if parameter.requires_grad}


TRAINABLE = {
    "tokens.lora_embedding_A.default",
    "tokens.lora_embedding_B.default",
    "conv.lora_A.default.weight",
    "conv.lora_B.default.weight",
    "conv.base_layer.bias",
    "fc.lora_A.default.weight",
    "fc.lora_B.default.weight",
    "fc.base_layer.bias",
    "norm.weight",
    "norm.bias",
    "out.weight",
    "out.bias",
}


def train(adapted: AdaptedModel, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(adapted.module.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    adapted.module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(adapted.module(BATCH), LABELS).backward()
        optimizer.step()


def test_the_module_stays_the_users_own_object_and_class() -> None:
    net = Net()
    adapted = AdaptedModel(net, plan_adapter(net, 2, 4.0))
    assert adapted.module is net
    assert type(net) is Net


def test_trainables_are_read_in_the_plans_order_as_copies() -> None:
    adapted = build()
    tensors = adapted.read_trainables()
    assert list(tensors) == KEYS == list(adapted.plan.trainable_keys)
    tensors["out.bias"].zero_()
    assert torch.count_nonzero(adapted.module.out.bias) > 0
    assert not any(value.requires_grad for value in tensors.values())


def test_what_is_written_is_read_back() -> None:
    adapted = build()
    sent = {
        key: torch.full_like(value, index + 0.5) for index, (key, value) in enumerate(adapted.read_trainables().items())
    }
    adapted.write_trainables(sent)
    received = adapted.read_trainables()
    assert all(torch.equal(sent[key], received[key]) for key in KEYS)
    assert adapted.module.fc.lora_B["default"].weight.unique().tolist() == [5.5]
    assert adapted.module.out.bias.tolist() == [11.5] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_travel_as_float32_and_come_back_as_they_were(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    adapted = AdaptedModel(net, plan_adapter(net, 2, 4.0, "fc"))
    sent = adapted.read_trainables()
    assert {value.dtype for value in sent.values()} == {torch.float32}
    adapted.write_trainables(sent)
    assert net.out.weight.dtype == dtype
    assert all(torch.equal(sent[key], value) for key, value in adapted.read_trainables().items())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda sent: sent.pop("fc.lora_A"),
            r"11 received, 12 expected; only on one side: fc.lora_A\)",
        ),
        (lambda sent: sent.update(more=torch.zeros(1)), "only on one side: more"),
        (lambda sent: sent.update({"out.bias": sent.pop("out.bias"), "x": sent.pop("out.weight")}), "out.weight, x"),
        (
            lambda sent: sent.update({"tokens.lora_A": sent.pop("tokens.lora_A")}),
            "the same names in another order",
        ),
        (
            lambda sent: sent.update({"out.bias": torch.zeros(1)}),
            r"'out.bias' has shape \(1,\), expected \(3,\)",
        ),
        (
            lambda sent: sent.update({"fc.lora_A": torch.zeros(8)}),
            r"'fc.lora_A' has shape \(8,\), expected \(2, 8\): server and client must build the same model",
        ),
    ],
    ids=["missing", "more", "renamed", "order", "broadcastable", "flat"],
)
def test_trainables_of_another_model_are_refused_and_nothing_is_written(change: object, match: str) -> None:
    adapted = build()
    sent = {key: value + 1 for key, value in adapted.read_trainables().items()}
    before = adapted.read_trainables()
    change(sent)  # type: ignore[operator]
    with pytest.raises(ValueError, match=match):
        adapted.write_trainables(sent)
    assert all(torch.equal(before[key], value) for key, value in adapted.read_trainables().items())


def test_statistics_are_read_and_written_without_their_counter() -> None:
    adapted = build()
    assert {key: value.tolist() for key, value in adapted.read_statistics().items()} == {
        "norm.running_mean": [0.0] * 8,
        "norm.running_var": [1.0] * 8,
    }
    adapted.write_statistics({"norm.running_mean": torch.full((8,), 2.0), "norm.running_var": torch.full((8,), 3.0)})
    assert adapted.module.norm.running_mean.tolist() == [2.0] * 8
    assert adapted.module.norm.running_var.tolist() == [3.0] * 8
    adapted.write_statistics({"norm.running_var": torch.full((8,), 5.0), "norm.running_mean": torch.full((8,), 2.0)})
    assert adapted.module.norm.running_var.tolist() == [5.0] * 8
    adapted.read_statistics()["norm.running_mean"].zero_()
    assert adapted.module.norm.running_mean.tolist() == [2.0] * 8
    with pytest.raises(ValueError, match="statistics tensors received are not this model's"):
        adapted.write_statistics({"norm.running_mean": torch.zeros(8)})


class Averaging(nn.BatchNorm1d):
    """Assigns to its buffer, as a module may."""

    def __init__(self) -> None:
        super().__init__(8, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 8)`` to the same."""
        assert self.running_mean is not None
        self.running_mean = 0.5 * (self.running_mean + x.mean(0).detach())
        return x


def test_statistics_are_the_modules_present_ones_after_assignment_and_after_a_move() -> None:
    net = nn.Sequential(Averaging(), nn.Linear(8, 8))
    adapted = AdaptedModel(net, plan_adapter(net, 2, 4.0))
    net(torch.ones(2, 8))
    assert adapted.read_statistics()["0.running_mean"].tolist() == [0.5] * 8
    net.double()  # replaces every buffer, as moving to a device does
    net(torch.ones(2, 8, dtype=torch.float64))
    assert adapted.read_statistics()["0.running_mean"].tolist() == [0.75] * 8
    adapted.write_statistics({"0.running_mean": torch.full((8,), 3.0), "0.running_var": torch.ones(8)})
    assert net[0].running_mean.tolist() == [3.0] * 8


def test_trainables_and_base_are_the_modules_present_ones_after_a_move() -> None:
    adapted = build()
    adapted.module.double()
    load(adapted, random_factors(adapted.plan))
    adapted.fold(entries_of(adapted.plan, 1)[0])
    assert adapted.module.fc.base_layer.weight.dtype == torch.float64
    assert torch.equal(adapted.read_base()["fc.weight"], adapted.module.fc.base_layer.weight)
    assert torch.equal(adapted.read_trainables()["fc.lora_A"], adapted.module.fc.lora_A["default"].weight)


def test_the_base_is_read_and_written_by_the_plain_models_names() -> None:
    adapted = build()
    base = adapted.read_base()
    assert list(base) == ["tokens.weight", "conv.weight", "frozen.weight", "frozen.bias", "fc.weight"]
    assert not any(value.requires_grad for value in base.values())
    other = {name: torch.full_like(value, 4.0) for name, value in base.items()}
    adapted.write_base(other)
    assert adapted.module.tokens.base_layer.weight.unique().tolist() == [4.0]
    assert adapted.module.frozen.bias.unique().tolist() == [4.0]
    with pytest.raises(ValueError, match="base tensors received are not this model's"):
        adapted.write_base({name: value for name, value in other.items() if name != "fc.weight"})
    with pytest.raises(ValueError, match=r"base tensor 'fc.weight' has shape \(8,\)"):
        adapted.write_base({**other, "fc.weight": torch.zeros(8)})


def test_gradients_are_on_for_exactly_the_trainables_at_all_times() -> None:
    adapted = build()
    assert trainable(adapted) == TRAINABLE
    entries = entries_of(adapted.plan, 3)
    for held in (1, 3, 0, 2):
        adapted.stack(entries[:held])
        assert trainable(adapted) == TRAINABLE
    adapted.fold(entries[0])
    assert trainable(adapted) == TRAINABLE
    assert adapted.module.fc.base_layer.weight.grad_fn is None


def test_gradients_that_the_users_code_switched_are_set_right_with_the_next_trainables() -> None:
    adapted = build()
    adapted.module.requires_grad_(True)
    adapted.module.fc.requires_grad_(False)
    adapted.write_trainables(adapted.read_trainables())
    assert trainable(adapted) == TRAINABLE
    adapted.watch_gradients()


def test_layers_named_by_the_user_are_trained_although_they_were_frozen() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).requires_grad_(False)
    adapted = AdaptedModel(net, plan_adapter(net, 2, 4.0, "0"))
    assert trainable(adapted) == {"0.lora_A.default.weight", "0.lora_B.default.weight"}


def test_without_dense_leaves_only_the_factors_are_trained() -> None:
    net = Net()
    adapted = AdaptedModel(net, plan_adapter(net, 2, 4.0, "fc", "none"))
    assert trainable(adapted) == {"fc.lora_A.default.weight", "fc.lora_B.default.weight"}


@pytest.mark.parametrize("held", [0, 2])
def test_gradients_reach_both_factors_of_every_layer_and_every_leaf(held: int) -> None:
    adapted = build()
    adapted.stack(entries_of(adapted.plan, held))
    load(adapted, random_factors(adapted.plan))
    adapted.module.train()
    nn.functional.cross_entropy(adapted.module(BATCH), LABELS).backward()
    gradients = {name: parameter.grad for name, parameter in adapted.module.named_parameters()}
    reached = {name for name, gradient in gradients.items() if gradient is not None and torch.count_nonzero(gradient)}
    # A batch norm takes away what a convolution's bias adds: its gradient is zero but for rounding.
    assert reached | {"conv.base_layer.bias"} == TRAINABLE


@pytest.mark.parametrize("held", [0, 2])
def test_training_moves_the_trainables_and_leaves_base_and_stacked_entries_alone(held: int) -> None:
    adapted = build()
    adapted.stack(entries_of(adapted.plan, held))
    load(adapted, random_factors(adapted.plan))
    before = {name: parameter.detach().clone() for name, parameter in adapted.module.named_parameters()}
    assert sum("ledger" in name for name in before) == (6 if held else 0)
    train(adapted)
    moved = {name for name, parameter in adapted.module.named_parameters() if not torch.equal(before[name], parameter)}
    assert moved == TRAINABLE


def test_from_fresh_factors_training_moves_both_after_two_steps() -> None:
    adapted = build()
    fresh = initial_factors(adapted.plan.layers, 0, 0)
    load(adapted, fresh)
    train(adapted, steps=2)
    after = adapted.read_trainables()
    assert not any(torch.equal(fresh[key], after[key]) for key in fresh)


def test_writing_trainables_forgets_gradients() -> None:
    adapted = build()
    nn.functional.cross_entropy(adapted.module(BATCH), LABELS).backward()
    adapted.write_trainables(adapted.read_trainables())
    assert all(parameter.grad is None for parameter in adapted.module.parameters())


def test_a_full_plan_attaches_nothing() -> None:
    net = Net()
    plain = copy.deepcopy(net)
    adapted = AdaptedModel(net, plan_full(net))
    assert [name for name, _ in net.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert list(adapted.read_trainables()) == [name for name, _ in net.named_parameters() if "frozen" not in name]
    assert list(adapted.read_base()) == ["frozen.weight", "frozen.bias"]
    adapted.stack([])
    adapted.watch_gradients()
    nn.functional.cross_entropy(net(BATCH), LABELS).backward()
    assert adapted.layers_without_gradient() == ()


def test_a_copy_of_an_adapted_model_computes_the_same() -> None:
    adapted = build()
    load(adapted, random_factors(adapted.plan))
    adapted.stack(entries_of(adapted.plan, 1))
    adapted.watch_gradients()
    twin = copy.deepcopy(adapted.module)
    assert_same(twin.eval()(BATCH), adapted.module.eval()(BATCH))


@pytest.mark.parametrize("width", [1, 2])
def test_two_adapted_models_live_side_by_side(width: int) -> None:
    one, other = NetworkFactory("mlp", (6,), 3, hidden=(40,))(), NetworkFactory("mlp", (6,), 3, hidden=(40, 40))()
    first = AdaptedModel(one, plan_adapter(one, width, 1.0, "layers.0"))
    second = AdaptedModel(other, plan_adapter(other, width, 1.0, "layers.1"))
    load(first, random_factors(first.plan))
    load(second, random_factors(second.plan, 1))
    assert first.read_trainables()["layers.0.lora_A"].shape == (width, 6)
    assert second.read_trainables()["layers.1.lora_A"].shape == (width, 40)


def test_watching_names_the_layers_that_no_gradient_reached() -> None:
    adapted = build()
    adapted.watch_gradients()
    assert adapted.layers_without_gradient() == ()  # nothing was trained: nothing to say
    adapted.module.out(adapted.module.fc(torch.randn(2, 8))).sum().backward()
    assert adapted.layers_without_gradient() == ("tokens", "conv")
    train(adapted, steps=1)
    assert adapted.layers_without_gradient() == ()


def test_watching_begins_anew_and_ends_when_told() -> None:
    adapted = build()
    adapted.watch_gradients()
    train(adapted, steps=1)
    adapted.watch_gradients()
    assert len(adapted.module.out.bias._post_accumulate_grad_hooks) == 1
    adapted.module.out(torch.randn(2, 8)).sum().backward()
    assert adapted.layers_without_gradient() == ("tokens", "conv", "fc")
    adapted.stop_watching()
    train(adapted, steps=1)
    assert adapted.layers_without_gradient() == ("tokens", "conv", "fc")
    assert not any(parameter._post_accumulate_grad_hooks for parameter in adapted.module.parameters())
