"""A model as a function of its tensors: what its layers compute, alone and stacked over clients."""

import copy
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from formulas import effective
from torch import Tensor, nn
from torch.func import functional_call

from fedloru_flwr.models import AdapterPlan, plan_adapter, stacked
from fedloru_flwr.models.adapters import AdaptedModel
from fedloru_flwr.models.functional import FunctionalModel
from fedloru_flwr.models.layout import Layout, shapes

CLIENTS = 3


class Tokens(nn.Module):
    """An embedding, a convolution along the sequence, two linear layers."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8, padding_idx=padding_idx)
        self.conv = nn.Conv1d(8, 6, 3, stride=2, padding=2, dilation=2, padding_mode="circular")
        self.fc = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length)`` to ``(batch, 3)``."""
        y = torch.relu(self.conv(self.tokens(x).transpose(1, 2))).transpose(1, 2)
        return self.out(torch.relu(self.fc(y)).mean(1))


def convolutions(**options: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 5, 3, **options), nn.Tanh(), nn.Conv2d(5, 4, (1, 2)), nn.Flatten())

    return build


def images() -> Tensor:
    return torch.randn(CLIENTS, 4, 3, 7, 6)


def words() -> Tensor:
    return torch.randint(0, 9, (CLIENTS, 4, 7))


MODELS = {
    "linear": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)),
        lambda: torch.randn(3, 4, 6),
    ),
    "linear of sequences": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh()), lambda: torch.randn(3, 4, 2, 6)),
    "tokens": (Tokens, words),
    "padded tokens": (lambda: Tokens(padding_idx=0), words),
    "conv": (convolutions(), images),
    "stride": (convolutions(stride=(2, 1), padding=(1, 0)), images),
    "dilation": (convolutions(dilation=2, padding=2), images),
    "same": (convolutions(padding="same", dilation=(1, 2)), images),
    "reflect": (convolutions(padding=1, padding_mode="reflect"), images),
    "circular": (convolutions(padding=2, padding_mode="circular", stride=2), images),
    "replicate": (convolutions(padding="same", padding_mode="replicate"), images),
}


def double(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor]:
    return model.double(), x.double() if x.is_floating_point() else x


def layers_of(model: nn.Module) -> AdapterPlan:
    kinds = {type(part).__name__ for part in model.modules()} & {"Linear", "Conv1d", "Conv2d", "Embedding"}
    return plan_adapter(model, 2, 3.0, ",".join(sorted(kinds)))


def draw(plan: AdapterPlan, layout: Layout, model: nn.Module) -> dict[str, Tensor]:
    """Values of `CLIENTS` clients, stacked; dense leaves near the model's."""
    values = {
        key: 0.5 * torch.randn(CLIENTS, *shape, dtype=torch.float64)
        for layer in plan.layers
        for key, shape in shapes(layer, layout)
    }
    state = model.state_dict()
    for name in plan.dense_leaves:
        values[name] = state[name] + 0.1 * torch.randn(CLIENTS, *state[name].shape, dtype=torch.float64)
    return values


LAYOUTS = {
    "pair": Layout(2, 1.5),
    "pair of another rank": Layout(3, 0.7),
    "nested": Layout(2, 1.5, nested_rank=1, nested_scale=0.6),
    "personal": Layout(2, 1.5, personal_rank=3, personal_scale=0.4),
    "nested and personal": Layout(2, 1.5, nested_rank=2, nested_scale=2.0, personal_rank=1, personal_scale=0.4),
    "loha": Layout(2, 1.5, family="loha"),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "name", [name for name in MODELS if name != "padded tokens"]
)  # a factor's padding is not the weight's
def test_outputs_and_gradients_are_those_of_the_effective_weights(name: str, layout: Layout) -> None:
    build, inputs = MODELS[name]
    model, x = double(build(), inputs())
    plan = layers_of(model)
    values = {key: value.requires_grad_() for key, value in draw(plan, layout, model).items()}
    functional = FunctionalModel(model, plan.layers, layout, plan.dense_leaves)
    assert functional.keys == tuple(values)
    base = {key: value for key, value in model.state_dict().items() if key in functional.base_keys}
    outputs = functional.forward_clients(values, base, x)
    direction = torch.randn_like(outputs)
    gradients = torch.autograd.grad((outputs * direction).sum(), tuple(values.values()))
    for client in range(CLIENTS):
        own = {key: value[client].detach().requires_grad_() for key, value in values.items()}
        expected = functional_call(model, effective(plan, layout, own, model.state_dict()), (x[client],))
        torch.testing.assert_close(outputs[client], expected, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(functional.forward(own, base, x[client]), expected, rtol=1e-10, atol=1e-10)
        wanted = torch.autograd.grad((expected * direction[client]).sum(), tuple(own.values()))
        for key, gradient, one in zip(values, gradients, wanted, strict=True):
            torch.testing.assert_close(gradient[client], one, rtol=1e-9, atol=1e-9, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", MODELS)
def test_a_pair_computes_what_peft_does(name: str) -> None:
    build, inputs = MODELS[name]
    model, x = build(), inputs()
    plan = layers_of(model)
    values = {key: value.float() for key, value in draw(plan, Layout(2, plan.scale), model).items()}
    functional = FunctionalModel(model, plan.layers, Layout(2, plan.scale), plan.dense_leaves)
    base = {key: value.clone() for key, value in model.state_dict().items() if key in functional.base_keys}
    adapted = AdaptedModel(model, plan)
    for value in values.values():
        value.requires_grad_()
    outputs = functional.forward_clients(values, base, x)
    outputs.square().sum().backward()
    for client in range(CLIENTS):
        adapted.write_trainables({key: value[client].detach() for key, value in values.items()})
        expected = adapted.module(x[client])
        torch.testing.assert_close(outputs[client], expected, rtol=1e-5, atol=1e-5)
        expected.square().sum().backward()
        torch.optim.SGD([one for one in adapted.module.parameters() if one.requires_grad], lr=1.0).step()
        for key, stepped in adapted.read_trainables().items():
            gradient = values[key].grad
            assert gradient is not None
            torch.testing.assert_close(values[key][client] - gradient[client], stepped, rtol=1e-4, atol=1e-4)


def assert_outputs_are_those_of_the_effective_weights(model: nn.Module, plan: AdapterPlan, x: Tensor) -> None:
    """In every layout, stacked over clients and alone."""
    for layout in LAYOUTS.values():
        values = draw(plan, layout, model)
        functional = FunctionalModel(model, plan.layers, layout, plan.dense_leaves)
        outputs = functional.forward_clients(values, model.state_dict(), x)
        for client in range(CLIENTS):
            own = {key: value[client] for key, value in values.items()}
            expected = functional_call(model, effective(plan, layout, own, model.state_dict()), (x[client],))
            torch.testing.assert_close(outputs[client], expected, rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(functional.forward(own, model.state_dict(), x[client]), expected)


def test_gpt2s_transposed_layer_is_factorised_too() -> None:
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(layer(5, 6), nn.Tanh(), layer(4, 5)).double()
    plan = plan_adapter(model, 2, 3.0, "Conv1D")
    x = torch.randn(CLIENTS, 4, 2, 6, dtype=torch.float64)
    assert_outputs_are_those_of_the_effective_weights(model, plan, x)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_can_be_the_clients_own(name: str) -> None:
    build, inputs = MODELS[name]
    model, x = double(build(), inputs())
    assert assert_own_parameters_compute_alike(model, x, lambda name: True).base_keys == ()


def assert_own_parameters_compute_alike(model: nn.Module, x: Tensor, is_own: Callable[[str], bool]) -> FunctionalModel:
    """Stacked over clients, outputs and gradients are those of each client alone."""
    state = {name: value.detach() for name, value in model.named_parameters()}
    values = {
        key: (value + 0.1 * torch.randn(CLIENTS, *value.shape, dtype=torch.float64)).requires_grad_()
        for key, value in state.items()
        if is_own(key)
    }
    functional = FunctionalModel(model, dense_leaves=list(values))
    outputs = functional.forward_clients(values, state, x)
    direction = torch.randn_like(outputs)
    gradients = torch.autograd.grad((outputs * direction).sum(), tuple(values.values()))
    for client in range(CLIENTS):
        own = {key: value[client].detach().requires_grad_() for key, value in values.items()}
        expected = functional_call(model, {**state, **own}, (x[client],))
        torch.testing.assert_close(outputs[client], expected, rtol=1e-10, atol=1e-10)
        wanted = torch.autograd.grad((expected * direction[client]).sum(), tuple(own.values()))
        for gradient, one in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(gradient[client], one, rtol=1e-9, atol=1e-9)
    return functional


class Scale(nn.Module):
    """A normalisation with a formula of its own, as language models have them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, power: int = 2) -> Tensor:
        """The root mean square is one before the weight."""
        return self.weight * x / x.abs().pow(power).mean(-1, keepdim=True).pow(1 / power)


class Odd(nn.Module):
    """What a layer-by-layer treatment has no form for: tensors at the top, layers' tensors used from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(6))
        self.tokens = nn.Linear(5, 6, bias=False)
        self.norm = Scale(6)

    def forward(self, x: Tensor) -> Tensor:
        """There and back again, through one weight."""
        return self.norm(self.tokens(x) + self.shift) @ self.tokens.weight


class Attention(nn.Module):
    """Self-attention, whose projections torch reads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, 6)`` to the same."""
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.norm(x + y)


OWN = {
    "biases of a perceptron": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), "bias"),
    "weights of a perceptron": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)), "weight"),
    "a layer norm": (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.Linear(6, 4)), "1."),
    "a layer norm's bias": (lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6)), "1.bias"),
    "a norm of one's own": (lambda: nn.Sequential(nn.Linear(5, 6), Scale(6), nn.Linear(6, 4)), "1."),
    "a weight used from outside": (Odd, "tokens"),
    "a tensor at the top": (Odd, "shift"),
    "all of an odd model": (Odd, ""),
}


@pytest.mark.parametrize(("build", "part"), OWN.values(), ids=OWN)
def test_some_parameters_can_be_the_clients_own(build: Callable[[], nn.Module], part: str) -> None:
    for shape in ((4, 5), (4, 3, 5)):
        model, x = double(build(), torch.randn(CLIENTS, *shape))
        assert_own_parameters_compute_alike(model, x, lambda name: part in name)


@pytest.mark.parametrize("part", ["bias", "weight", "0.", "1."])
def test_parts_of_a_convolution_and_its_norm_can_be_the_clients_own(part: str) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.GroupNorm(2, 6), nn.Tanh(), nn.MaxPool2d(2))

    model, x = double(build(), torch.randn(CLIENTS, 3, 4, 7, 6))
    assert_own_parameters_compute_alike(model, x, lambda name: part in name)


@pytest.mark.parametrize("part", ["attention.in_proj", "out_proj", "norm", ""])
def test_attention_can_be_the_clients_own(part: str) -> None:
    model, x = double(Attention(), torch.randn(CLIENTS, 4, 3, 6))
    assert_own_parameters_compute_alike(model, x, lambda name: part in name)


class Viewed(nn.Module):
    """The network of many a tutorial, which reshapes by ``view``: of no use to images with channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        self.fc = nn.Linear(5 * 2 * 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 3, 7, 6)`` to ``(batch, 4)``."""
        x = nn.functional.max_pool2d(torch.tanh(self.conv(x)), 2)
        return self.fc(x.view(-1, 5 * 2 * 2))


def test_a_network_that_views_its_images_goes_side_by_side_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "vmap", None)
    model, x = double(Viewed(), torch.randn(CLIENTS, 4, 3, 7, 6))
    for part in ("conv", "fc", ""):
        assert_own_parameters_compute_alike(model, x, lambda name, part=part: part in name)
    plan = layers_of(model)
    assert_outputs_are_those_of_the_effective_weights(model, plan, x)


def test_a_token_a_sample_can_be_looked_up_in_the_clients_own_table() -> None:
    model, x = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 2)).double(), torch.randint(0, 9, (CLIENTS, 4))
    assert_own_parameters_compute_alike(model, x, lambda name: name.startswith("0."))


@pytest.mark.parametrize("token", [9, -1])
def test_a_token_beyond_the_clients_own_table_is_not_looked_up_in_anothers(token: int) -> None:
    model, x = nn.Sequential(nn.Embedding(9, 5), nn.Linear(5, 2)), torch.randint(0, 9, (CLIENTS, 4))
    functional = FunctionalModel(model, dense_leaves=("0.weight",))
    values = {"0.weight": torch.randn(CLIENTS, 9, 5)}
    base = {name: value.detach() for name, value in model.named_parameters() if name != "0.weight"}
    functional.forward_clients(values, base, x)
    x[1, 2] = token
    with pytest.raises(IndexError, match="out of range"):
        functional.forward_clients(values, base, x)


def test_only_odd_models_are_left_to_vmap(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = stacked.vmap
    monkeypatch.setattr(stacked, "vmap", lambda *a, **k: calls.append(1) or original(*a, **k))
    for build, shape, part in ((convolutions(padding=1), (4, 3, 7, 6), ""), (Attention, (4, 3, 6), "norm")):
        model, x = double(build(), torch.randn(CLIENTS, *shape))
        assert_own_parameters_compute_alike(model, x, lambda name, part=part: part in name)
    assert not calls
    model, x = double(Odd(), torch.randn(CLIENTS, 4, 5))
    assert_own_parameters_compute_alike(model, x, lambda name: True)
    assert calls


@pytest.mark.parametrize("first", [1, CLIENTS], ids=["one client", "several"])
def test_a_model_that_mixes_samples_is_found_out_whoever_comes_first(first: int) -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            """Of what is left beside the batch's mean."""
            return super().forward(x - x.mean(0))

    model, x = double(nn.Sequential(Centred(5, 4)), torch.randn(CLIENTS, 4, 5))
    values = {key: value.detach().expand(CLIENTS, *value.shape) for key, value in model.named_parameters()}
    functional = FunctionalModel(model, dense_leaves=list(values))
    functional.forward_stacked({key: value[:first] for key, value in values.items()}, {}, x[:first])
    torch.testing.assert_close(functional.forward_clients(values, {}, x), torch.stack([model(one) for one in x]))


def test_a_trial_leaves_the_generators_alone_and_takes_no_part_in_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Dropout(0.5), nn.Flatten())
    values = {key: value.detach().expand(CLIENTS, *value.shape) for key, value in model.named_parameters()}
    x = torch.randn(CLIENTS, 2, 3, 5, 5)
    outputs = []
    functional = FunctionalModel(model, dense_leaves=list(values))
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(functional.forward({key: value[0] for key, value in values.items()}, {}, x[0]))
    assert torch.equal(*outputs)
    plain = FunctionalModel(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)), dense_leaves=list(values))
    monkeypatch.setattr(stacked, "vmap", None)
    with torch.autocast("cpu", torch.bfloat16):
        plain.forward_clients(values, {}, x)


def test_the_padding_row_of_no_client_gets_a_gradient() -> None:
    model = Tokens(padding_idx=3)
    values = {"tokens.weight": torch.randn(CLIENTS, 9, 8).requires_grad_()}
    functional = FunctionalModel(model, dense_leaves=["tokens.weight"])
    functional.forward_clients(values, model.state_dict(), words()).sum().backward()
    gradient = values["tokens.weight"].grad
    assert gradient is not None
    assert torch.count_nonzero(gradient[:, 3]) == 0
    assert all(torch.count_nonzero(one) > 0 for one in gradient)


def test_a_tied_parameter_is_given_once_and_used_twice() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    functional = FunctionalModel(model, dense_leaves=["0.weight"])
    weight, x = torch.randn(CLIENTS, 4, 4), torch.randn(CLIENTS, 2, 4)
    outputs = functional.forward_clients({"0.weight": weight}, model.state_dict(), x)
    for client in range(CLIENTS):
        expected = functional_call(model, {"0.weight": weight[client]}, (x[client],))
        torch.testing.assert_close(outputs[client], expected)
        assert (expected - model(x[client])).abs().max() > 0.1


def test_buffers_are_the_models_own_unless_the_base_has_others() -> None:
    class Shifted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("shift", torch.ones(2), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            """With a shift."""
            return super().forward(x) + self.shift

    model = Shifted()
    functional, x = FunctionalModel(model), torch.randn(3, 2)
    base = dict(model.named_parameters())
    torch.testing.assert_close(functional.forward({}, base, x), model(x))
    torch.testing.assert_close(functional.forward({}, {**base, "shift": torch.zeros(2)}, x), model(x) - 1.0)


def test_the_module_passed_in_is_left_alone() -> None:
    model = Tokens().eval()
    before = copy.deepcopy(model.state_dict())
    plan = layers_of(model)
    FunctionalModel(model, plan.layers, Layout(2, 1.0), plan.dense_leaves)
    assert [type(part).__name__ for part in model.children()] == ["Embedding", "Conv1d", "Linear", "Linear"]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_factorised_layers_need_a_layout() -> None:
    model = Tokens()
    with pytest.raises(ValueError, match="needs their layout"):
        FunctionalModel(model, layers_of(model).layers)


def test_peft_is_not_imported() -> None:
    code = "import sys, fedloru_flwr.models.functional; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
