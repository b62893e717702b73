"""Models of the transformers library, built tiny and without downloads."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from adapting import assert_same, entries_of, evaluating, load, random_factors, with_folded_weights
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.utils import logging

from fedloru_flwr.lowrank import initial_factors
from fedloru_flwr.models import PlanError, plan_adapter
from fedloru_flwr.models.adapters import AdaptedModel
from fedloru_flwr.strategies.state import initial_state, merged_state_dict

BATCH = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])


@pytest.fixture(autouse=True)
def transformers_keep_quiet() -> Iterator[None]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def gpt2() -> nn.Module:
    """Two blocks of GPT-2, whose output layer is tied to the embedding."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 50, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


def llama() -> nn.Module:
    """One block of Llama with fewer heads for keys than for queries."""
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def bert() -> nn.Module:
    """One block of BERT with a classifier on top."""
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=16,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


BLOCK = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
LAYERS = {
    gpt2: ["transformer.wpe", *(f"transformer.h.{n}.{name}" for n in (0, 1) for name in BLOCK)],
    llama: [
        "model.embed_tokens",
        *(f"model.layers.0.self_attn.{name}_proj" for name in "qkvo"),
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ],
    bert: [
        "bert.embeddings.word_embeddings",
        "bert.embeddings.position_embeddings",
        *(f"bert.encoder.layer.0.attention.self.{name}" for name in ("query", "key", "value")),
        "bert.encoder.layer.0.attention.output.dense",
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
        "bert.pooler.dense",
    ],
}
each_model = pytest.mark.parametrize("build", LAYERS, ids=lambda build: build.__name__)


def logits(model: nn.Module) -> Tensor:
    return model(input_ids=BATCH).logits


@each_model
def test_the_automatic_choice(build: object) -> None:
    plan = plan_adapter(build(), 2, 4.0)
    assert [layer.name for layer in plan.layers] == LAYERS[build]


@each_model
@pytest.mark.parametrize("into", ["merge", "stack"])
def test_adapters_compute_what_folded_weights_do_and_an_accumulation_changes_nothing(build: object, into: str) -> None:
    plain = build()
    plan = plan_adapter(plain, 2, 4.0)
    adapted = AdaptedModel(copy.deepcopy(plain), plan)
    (entry,) = entries_of(plan, 1)
    load(adapted, entry.adapter)
    folded = with_folded_weights(plain, plan, entry.adapter)
    with evaluating(plain, folded, adapted.module):
        before = logits(adapted.module)
        assert_same(before, logits(folded))
        assert (before - logits(plain)).abs().max() > 0.01
        if into == "merge":
            adapted.fold(entry)
        else:
            adapted.stack([entry])
        load(adapted, initial_factors(plan.layers, 0, 1))
        assert_same(logits(adapted.module), before)


@each_model
def test_training_reaches_every_factor_and_moves_the_trainables_only(build: object) -> None:
    model = build()
    plan = plan_adapter(model, 2, 4.0)
    adapted = AdaptedModel(model, plan)
    load(adapted, random_factors(plan))
    base, before = {n: v.clone() for n, v in adapted.read_base().items()}, adapted.read_trainables()
    adapted.watch_gradients()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    labels = torch.tensor([0, 2]) if build is bert else BATCH
    model.train()(input_ids=BATCH, labels=labels).loss.backward()
    optimizer.step()
    assert adapted.layers_without_gradient() == ()
    after = adapted.read_trainables()
    assert not any(torch.equal(before[key], after[key]) for key in plan.factor_keys)
    assert all(torch.equal(base[name], value) for name, value in adapted.read_base().items())


def test_gpt2s_linear_layers_are_transposed_and_its_tied_embedding_is_one_dense_leaf() -> None:
    plan = plan_adapter(gpt2(), 2, 4.0)
    shapes = {layer.name: (layer.weight_shape, layer.transposed) for layer in plan.layers}
    assert shapes["transformer.h.0.attn.c_attn"] == ((32, 96), True)
    assert "transformer.wte.weight" in plan.dense_leaves
    assert "lm_head.weight" not in plan.dense_leaves
    assert plan.notes == (
        "lm_head: the output layer stays dense",
        "transformer.wte: stays dense, since its weight is shared with lm_head.weight",
    )


def test_gpt2s_layers_can_be_named_by_their_type() -> None:
    chosen = [layer.name for layer in plan_adapter(gpt2(), 2, 4.0, "Conv1D").layers]
    assert chosen == LAYERS[gpt2][1:]


@pytest.mark.parametrize("target", ["lm_head", "wte"])
def test_gpt2s_tied_layers_are_refused_by_name(target: str) -> None:
    with pytest.raises(PlanError, match=f"{target}' cannot be factorised, since its weight is shared with"):
        plan_adapter(gpt2(), 2, 4.0, target)


def test_a_merged_gpt2_has_every_key_of_the_plain_one_and_computes_the_same() -> None:
    plain = gpt2()
    plan = plan_adapter(plain, 2, 4.0)
    adapted = AdaptedModel(copy.deepcopy(plain), plan)
    load(adapted, random_factors(plan))
    adapted.write_trainables({key: value + 0.01 for key, value in adapted.read_trainables().items()})
    state = replace(initial_state(plain, plan, 0), trainables=adapted.read_trainables())
    merged = merged_state_dict(state, plain, plan, 0)
    assert list(merged) == list(plain.state_dict())
    assert torch.equal(merged["lm_head.weight"], merged["transformer.wte.weight"])
    assert torch.equal(merged["lm_head.weight"], plain.lm_head.weight + 0.01)
    whole = gpt2()
    whole.load_state_dict(merged)
    with evaluating(whole, adapted.module):
        assert_same(logits(whole), logits(adapted.module))
