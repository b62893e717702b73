"""Layers and models in which adapters would silently do nothing, or the wrong thing, if nobody took care."""

import copy
import types
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from adapting import assert_same, evaluating, load, random_factors, with_folded_weights
from torch import Tensor, nn
from torch.nn import functional

from fedloru_flwr.lowrank import Entry, initial_factors
from fedloru_flwr.models import PlanError, plan_adapter
from fedloru_flwr.models.adapters import AdaptedModel
from fedloru_flwr.strategies.state import initial_state, merged_state_dict


def adapt(plain: nn.Module, targets: str | None = None, rank: int = 2) -> AdaptedModel:
    """An adapted copy with factors that are not zero."""
    plan = plan_adapter(plain, rank, 2.0 * rank, targets)
    adapted = AdaptedModel(copy.deepcopy(plain), plan)
    load(adapted, random_factors(plan))
    return adapted


def assert_equals_folded(plain: nn.Module, adapted: AdaptedModel, *inputs: Tensor, **keywords: Tensor) -> None:
    folded = with_folded_weights(plain, adapted.plan, random_factors(adapted.plan))
    with evaluating(plain, folded, adapted.module):
        output = adapted.module(*inputs, **keywords)
        assert_same(output, folded(*inputs, **keywords))
        assert (output - plain(*inputs, **keywords)).abs().max() > 0.01


def layers(plan_or_adapted: AdaptedModel) -> list[str]:
    return [layer.name for layer in plan_or_adapted.plan.layers]


def encoder_layer(**options: bool) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(16, 2, dim_feedforward=32, dropout=0.1, batch_first=True, **options)


@pytest.mark.parametrize("norm_first", [False, True])
def test_a_transformer_layer_in_eval_mode_uses_its_adapters(norm_first: bool) -> None:
    plain = nn.Sequential(encoder_layer(norm_first=norm_first))
    adapted = adapt(plain, "Linear")
    assert layers(adapted) == ["0.linear1", "0.linear2"]
    assert_equals_folded(plain, adapted, torch.randn(3, 5, 16))


class Encoder(nn.Module):
    def __init__(self, *, nested: bool) -> None:
        super().__init__()
        self.body = nn.TransformerEncoder(encoder_layer(), 2, enable_nested_tensor=nested)
        self.out = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """``(batch, length, 16)`` to ``(batch, 3)``."""
        return self.out(self.body(x, src_key_padding_mask=padding)[:, 0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("nested", [False, True])
def test_a_transformer_encoder_in_eval_mode_uses_its_adapters(nested: bool, masked: bool) -> None:
    plain = Encoder(nested=nested)
    adapted = adapt(plain)
    assert layers(adapted) == [f"body.layers.{n}.linear{m}" for n in (0, 1) for m in (1, 2)]
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5]) if masked else None
    assert_equals_folded(plain, adapted, torch.randn(2, 5, 16), padding=padding)


def test_torchs_fused_path_stays_on_where_no_model_has_attention() -> None:
    adapt(nn.Sequential(nn.Linear(16, 16)))
    assert torch.backends.mha.get_fastpath_enabled()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 64)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, length, 16)`` to ``(batch, length, 64)``."""
        return self.fc(self.attention(x, x, x)[0])


def test_the_output_projection_of_multihead_attention_stays_dense() -> None:
    plain = Attention()
    adapted = adapt(plain)
    assert layers(adapted) == ["fc"]
    assert "attention.out_proj.weight" in adapted.plan.dense_leaves
    assert any(note.startswith("attention.out_proj: stays dense, since nn.Multihead") for note in adapted.plan.notes)
    assert_equals_folded(plain, adapted, torch.randn(2, 5, 16))


@pytest.mark.parametrize("target", ["attention.out_proj", "out_proj", "fc,out_proj"])
def test_the_output_projection_of_multihead_attention_is_refused_by_name(target: str) -> None:
    with pytest.raises(PlanError, match=r"'attention.out_proj' cannot be factorised, since nn.Multi.*; leave it out"):
        plan_adapter(Attention(), 2, 2.0, target)


def test_the_output_projection_of_a_model_that_is_an_attention_layer_is_found_too() -> None:
    with pytest.raises(PlanError, match="'out_proj' cannot be factorised"):
        plan_adapter(nn.MultiheadAttention(16, 2), 2, 2.0, "out_proj")


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        """A linear layer with an activation inside."""
        return functional.gelu(super().forward(x))


class Named(nn.Linear):
    """A linear layer in nothing but its name."""


class Conv1D(nn.Linear):
    """Not GPT-2's layer, which stores its weight transposed."""


class Fixed(nn.Conv2d):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


def old_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(40, 40))


def tied_pair() -> nn.Module:
    pair = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    pair[1].weight = pair[0].weight
    return pair


def used_twice() -> nn.Module:
    layer = nn.Linear(40, 40)
    return nn.Sequential(layer, nn.ReLU(), layer)


UNSAFE: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "grouped convolution": (lambda: nn.Conv2d(40, 40, 3, groups=2), "bad", r"grouped convolution \(groups=2\)"),
    "depthwise convolution": (lambda: nn.Conv1d(40, 40, 3, groups=40), "bad", r"grouped convolution \(groups=40\)"),
    "weight norm": (old_weight_norm, "bad", "its weight is computed from other parameters"),
    "weight norm as a parametrisation": (
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(40, 40)),
        "bad",
        "its weight is computed from other parameters",
    ),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(40, 40, 3)),
        "bad",
        "its weight is computed from other parameters",
    ),
    "old spectral norm": (
        lambda: nn.utils.spectral_norm(nn.Linear(40, 40)),
        "bad",
        "its weight is computed from other parameters",
    ),
    "renormalising embedding": (lambda: nn.Embedding(40, 40, max_norm=1.0), "bad", "renormalises its rows"),
    "tied weight": (tied_pair, "bad.0", "its weight is shared with bad.1.weight"),
    "module at two places": (used_twice, "bad.0", "its weight is shared with bad.2.weight"),
    "subclass with a forward of its own": (lambda: Scaled(40, 40), "bad", "its class Scaled changes what the layer"),
    "subclass with a constructor of its own": (lambda: Fixed(40), "bad", "its class Fixed changes what the layer"),
    "subclass that changes its weight": (lambda: Standardised(40, 40, 3), "bad", "its class Standardised changes"),
    "complex weight": (lambda: nn.Linear(40, 40, dtype=torch.complex64), "bad", "its weight has dtype torch.complex64"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_a_layer_that_cannot_be_factorised_safely_stays_dense_and_is_refused_by_name(case: str) -> None:
    build, name, reason = UNSAFE[case]
    model = nn.ModuleDict({"good": nn.Linear(40, 40), "bad": build(), "out": nn.Linear(40, 2)})
    plan = plan_adapter(model, 2, 2.0)
    assert [layer.name for layer in plan.layers] == ["good"]
    assert any(note.startswith(f"{name}: stays dense, since ") for note in plan.notes)
    trained = {leaf for leaf in plan.dense_leaves if leaf.startswith("bad.")}
    assert trained == {key for key, _ in model.named_parameters() if key.startswith("bad.")}
    with pytest.raises(PlanError, match=f"'{name}' cannot be factorised, since .*{reason}.*; leave it out"):
        plan_adapter(model, 2, 2.0, name)
    AdaptedModel(model, plan)


def test_an_unsafe_layer_met_by_its_type_is_left_out_and_noted() -> None:
    model = nn.ModuleDict({"good": nn.Conv2d(40, 40, 3), "bad": nn.Conv2d(40, 40, 3, groups=2)})
    plan = plan_adapter(model, 2, 2.0, "Conv2d")
    assert [layer.name for layer in plan.layers] == ["good"]
    assert plan.notes[0].startswith("bad: stays dense, since it is a grouped convolution")


@pytest.mark.parametrize("cls", [Named, Conv1D])
def test_a_subclass_in_name_only_is_a_linear_layer(cls: type[nn.Linear]) -> None:
    plain = nn.Sequential(cls(40, 30), nn.Linear(30, 2))
    adapted = adapt(plain)
    assert adapted.plan.layers[0].weight_shape == (30, 40)
    assert not adapted.plan.layers[0].transposed
    assert [layer.name for layer in plan_adapter(plain, 2, 2.0, "Linear").layers] == ["0"]
    assert_equals_folded(plain, adapted, torch.randn(3, 40))


def test_a_layer_called_several_times_in_one_pass_is_factorised() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(20, 20)

        def forward(self, x: Tensor) -> Tensor:
            """Apply the cell three times."""
            return self.cell(torch.tanh(self.cell(torch.tanh(self.cell(x)))))

    plain = Recurrent()
    assert_equals_folded(plain, adapt(plain), torch.randn(3, 20))


@pytest.mark.parametrize("targets", [None, "Linear"])
def test_a_model_that_is_itself_one_layer_is_refused_with_the_way_out(targets: str | None) -> None:
    with pytest.raises(PlanError, match=r"Linear: stays dense, since it is the whole model .*wrap it in nn.Sequential"):
        plan_adapter(nn.Linear(40, 40), 2, 2.0, targets)
    assert layers(adapt(nn.Sequential(nn.Linear(40, 40)), targets)) == ["0"]


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(30, 12, padding_idx=0)
        self.out = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Token numbers ``(batch, length)`` to ``(batch, 4)``."""
        return self.out(self.tokens(x).mean(1) * self.tokens.embedding_dim**0.5)


def test_training_moves_an_embeddings_factors_and_keeps_its_padding_row() -> None:
    plain = Embedded()
    plan = plan_adapter(plain, 2, 4.0)
    (layer,) = plan.layers
    assert (layer.name, layer.transposed) == ("tokens", True)
    adapted = AdaptedModel(copy.deepcopy(plain), plan)
    fresh = initial_factors(plan.layers, 0, 0)
    load(adapted, fresh)
    batch = torch.tensor([[1, 2, 0], [3, 1, 0], [5, 6, 7]])
    with evaluating(plain, adapted.module):
        assert_same(adapted.module(batch), plain(batch))
    optimizer = torch.optim.SGD(adapted.module.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        functional.cross_entropy(adapted.module(batch), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    trained = adapted.read_trainables()
    touched = trained["tokens.lora_A"].abs().sum(0)
    assert touched.nonzero().flatten().tolist() == [1, 2, 3, 5, 6, 7]
    assert not torch.equal(trained["tokens.lora_B"], fresh["tokens.lora_B"])
    entry = Entry.after("root", {key: trained[key] for key in plan.factor_keys}, plan.scale)
    adapted.fold(entry)
    moved = (adapted.read_base()["tokens.weight"] - plain.tokens.weight).abs().sum(1)
    assert moved.nonzero().flatten().tolist() == [1, 2, 3, 5, 6, 7]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(50, 20)
        self.body = nn.Linear(20, 20)
        self.out = nn.Linear(20, 50, bias=False)
        self.out.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """Token numbers to the next one's logits."""
        return self.out(torch.relu(self.body(self.tokens(x))))


@pytest.mark.parametrize(("target", "other"), [("tokens", "out"), ("out", "tokens")])
def test_tied_weights_are_refused_by_name(target: str, other: str) -> None:
    with pytest.raises(PlanError, match=f"'{target}' cannot be .* its weight is shared with {other}.weight; leave it"):
        plan_adapter(Tied(), 2, 2.0, target)


def test_tied_weights_are_one_dense_leaf_and_both_names_are_in_the_merged_model() -> None:
    plain = Tied()
    adapted = adapt(plain)
    assert layers(adapted) == ["body"]
    assert adapted.plan.dense_leaves == ("tokens.weight", "body.bias")
    adapted.module(torch.tensor([[1, 2]])).sum().backward()
    trained = {key: value + 0.25 for key, value in adapted.read_trainables().items()}
    adapted.write_trainables(trained)
    assert adapted.module.out.weight is adapted.module.tokens.weight
    state = replace(initial_state(plain, adapted.plan, 0), trainables=trained)
    merged = merged_state_dict(state, plain, adapted.plan, 0)
    assert list(merged) == list(plain.state_dict())
    assert torch.equal(merged["out.weight"], plain.tokens.weight + 0.25)
    assert torch.equal(merged["tokens.weight"], merged["out.weight"])
    whole = Tied()
    whole.load_state_dict(merged)
    batch = torch.tensor([[3, 4, 5]])
    with evaluating(whole, adapted.module):
        assert_same(whole(batch), adapted.module(batch))


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_trained_densely(cls: type[nn.RNNBase]) -> None:
    class Reader(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = cls(12, 12, batch_first=True, bidirectional=True)
            self.fc = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            """``(batch, length, 12)`` to ``(batch, 24)``."""
            return self.fc(self.read(x)[0][:, -1])

    plain = Reader()
    adapted = adapt(plain)
    assert layers(adapted) == ["fc"]
    recurrent = [name for name, _ in plain.named_parameters() if name.startswith("read.")]
    assert len(recurrent) == 8
    assert list(adapted.plan.dense_leaves) == [*recurrent, "fc.bias"]
    batch = torch.randn(3, 4, 12)
    assert_equals_folded(plain, adapted, batch)
    adapted.watch_gradients()
    adapted.module.train()(batch).sum().backward()
    assert all(adapted.module.get_parameter(name).grad is not None for name in recurrent)
    changed = {key: torch.zeros_like(value) for key, value in adapted.read_trainables().items()}
    adapted.write_trainables(changed)
    with evaluating(adapted.module):
        assert_same(adapted.module(batch), torch.zeros(3, 24))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_parametrised_layers_are_trained_densely_beside_adapted_ones(kind: str) -> None:
    wrap = getattr(nn.utils.parametrizations, kind)
    plain = nn.Sequential(nn.Linear(20, 20), wrap(nn.Linear(20, 20)), nn.Linear(20, 2)).eval()
    adapted = adapt(plain)
    assert layers(adapted) == ["0"]
    batch = torch.randn(3, 20)
    assert_equals_folded(plain, adapted, batch)
    before = adapted.read_trainables()
    optimizer = torch.optim.SGD(adapted.module.parameters(), lr=0.1)
    adapted.module.train()(batch).square().sum().backward()
    optimizer.step()
    after = adapted.read_trainables()
    assert not any(torch.equal(before[key], after[key]) for key in before)


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Twice the stored value."""
        return 2 * x


def test_a_layer_of_which_only_the_bias_is_parametrised_is_factorised() -> None:
    plain = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    nn.utils.parametrize.register_parametrization(plain[0], "bias", Doubled())
    adapted = adapt(plain, "0")
    assert "0.parametrizations.bias.original" in adapted.plan.dense_leaves
    assert_equals_folded(plain, adapted, torch.randn(3, 20))


class Careless(nn.Module):
    """Factorised layers that its forward pass does not, or not always, call."""

    def __init__(self, mode: str) -> None:
        super().__init__()
        self.fc = nn.Linear(20, 20)
        self.odd = nn.Linear(20, 20)
        self.mode = mode
        self.kept = [self.odd]  # a plain list, of which nobody hears that the layer was replaced

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 20)`` to the same."""
        y = self.fc(x)
        if self.mode == "weight":
            return functional.linear(y, self.odd.weight, self.odd.bias)
        if self.mode == "list":
            return self.kept[0](y)
        if self.mode == "sometimes":
            return self.odd(y) if x.sum() > 0 else y
        return y


@pytest.mark.parametrize("mode", ["weight", "list", "unused"])
def test_a_layer_whose_adapters_are_bypassed_is_named(mode: str) -> None:
    adapted = adapt(Careless(mode), "fc,odd")
    adapted.watch_gradients()
    adapted.module(torch.ones(2, 20)).sum().backward()
    assert adapted.layers_without_gradient() == ("odd",)


def test_a_layer_that_is_used_in_some_batches_is_named_only_while_it_never_was() -> None:
    adapted = adapt(Careless("sometimes"), "fc,odd")
    adapted.watch_gradients()
    adapted.module(-torch.ones(2, 20)).sum().backward()
    assert adapted.layers_without_gradient() == ("odd",)
    adapted.module(torch.ones(2, 20)).sum().backward()
    adapted.module(-torch.ones(2, 20)).sum().backward()
    assert adapted.layers_without_gradient() == ()


def test_fresh_factors_whose_gradient_is_zero_count_as_reached() -> None:
    plain = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    adapted = AdaptedModel(plain, plan_adapter(plain, 2, 2.0, "0,1", "none"))
    load(adapted, initial_factors(adapted.plan.layers, 0, 0))
    adapted.watch_gradients()
    plain(torch.zeros(2, 20)).sum().backward()
    assert adapted.layers_without_gradient() == ()


class Lora(nn.Module):
    """A model that uses PEFT's words for its own things."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Linear(20, 20)
        self.base_layer = nn.Sequential(nn.Linear(20, 20), nn.ReLU())
        self.default = nn.Linear(20, 20)
        self.lora_scale = nn.Parameter(torch.ones(20))
        self.register_buffer("lora_statistics", torch.full((20,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, 20)`` to the same."""
        return self.default(self.base_layer(self.lora_A(x))) * self.lora_scale * self.lora_statistics


def test_a_model_may_use_pefts_words_in_its_names() -> None:
    plain = Lora()
    adapted = adapt(plain)
    assert layers(adapted) == ["lora_A", "base_layer.0", "default"]
    assert adapted.plan.dense_leaves == ("lora_scale", "lora_A.bias", "base_layer.0.bias", "default.bias")
    assert adapted.plan.statistics == ()
    assert "left as they are built: lora_statistics" in adapted.plan.notes[-1]
    batch = torch.randn(3, 20)
    assert_equals_folded(plain, adapted, batch)
    adapted.stack([Entry.after("root", random_factors(adapted.plan, 1), 0.5)])
    before = adapted.read_base()["lora_A.weight"].clone()
    adapted.module(batch).square().sum().backward()
    assert adapted.module.lora_scale.grad is not None
    own = {name for name, parameter in adapted.module.named_parameters() if parameter.requires_grad}
    assert len(own) == 6 + 4
    assert not any("ledger" in name for name in own)
    assert torch.equal(adapted.read_base()["lora_A.weight"], before)


def test_only_the_named_one_of_similarly_named_layers_is_touched() -> None:
    plain = nn.ModuleDict(
        {"fc": nn.Linear(20, 20), "xfc": nn.Linear(20, 20), "in": nn.ModuleDict({"fc1": nn.Linear(20, 20)})}
    )
    adapted = AdaptedModel(plain, plan_adapter(plain, 2, 2.0, "fc"))
    assert layers(adapted) == ["fc"]
    assert type(plain["xfc"]) is nn.Linear
    assert type(plain["in"]["fc1"]) is nn.Linear
    assert type(plain["fc"]) is not nn.Linear


@pytest.mark.parametrize("targets", [None, "Linear", "0"])
def test_a_model_that_already_carries_adapters_is_refused(targets: str | None) -> None:
    from peft import LoraConfig, get_peft_model

    plain = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40))
    wrapped = get_peft_model(plain, LoraConfig(r=2, target_modules=["0"]))
    for model, where in ((wrapped, "PeftModel"), (plain, "0")):
        with pytest.raises(PlanError, match=rf"already carries PEFT's layers \({where}\).*merge_and_unload"):
            plan_adapter(model, 2, 2.0, targets)
    plain = wrapped.merge_and_unload().requires_grad_(True)
    assert plan_adapter(plain, 2, 2.0, targets).layers[0].name == "0"


@pytest.mark.parametrize(
    "config",
    [None, {"tie_word_embeddings": True}, ("a", 1), types.SimpleNamespace(model_type="mine", tie_word_embeddings=True)],
    ids=lambda config: type(config).__name__,
)
def test_a_model_may_keep_any_object_as_its_config(config: object) -> None:
    plain = Embedded()
    plain.config = config
    assert_equals_folded(plain, adapt(plain, "tokens,out"), torch.tensor([[1, 2, 0], [3, 1, 0]]))


def test_the_models_own_code_can_go_on_reading_the_attributes_of_its_layers() -> None:
    class Tokens(nn.Embedding):
        def __init__(self) -> None:
            super().__init__(30, 12, padding_idx=3)
            self.language = "en"

    model = nn.ModuleDict({"e": Tokens(), "c": nn.Conv2d(12, 12, (3, 5), stride=2), "fc": nn.Linear(12, 12)})
    adapted = AdaptedModel(model, plan_adapter(model, 2, 2.0, "e,c,fc"))
    e, c, fc = (adapted.module[name] for name in ("e", "c", "fc"))
    assert (e.num_embeddings, e.embedding_dim, e.padding_idx, e.language) == (30, 12, 3, "en")
    assert (c.kernel_size, c.stride, c.padding, c.in_channels, c.groups) == ((3, 5), (2, 2), (0, 0), 12, 1)
    assert (fc.in_features, fc.out_features, fc.weight.shape, fc.bias.shape) == (12, 12, (12, 12), (12,))


def test_after_an_accumulation_is_folded_the_factors_go_on_counting() -> None:
    plain = nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20))
    adapted = adapt(plain)
    adapted.fold(Entry.after("root", random_factors(adapted.plan, 1), adapted.plan.scale))
    before = adapted.module(torch.ones(1, 20))
    load(adapted, random_factors(adapted.plan, 2))
    assert (adapted.module(torch.ones(1, 20)) - before).abs().max() > 0.01
