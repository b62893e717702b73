"""Bases in few bits: what they hold, and that the accumulated past stays exact beside them."""

import sys

import pytest
import torch
from small_language import save_model
from transformers import AutoModelForCausalLM

from fedloru_flwr import launch
from fedloru_flwr.models import adapters, pretrained, quantised
from fedloru_flwr.models.plan import plan_adapter
from fedloru_flwr.runs import RunDirectory


def test_without_the_library_the_extra_is_named_before_any_client_starts(settings, monkeypatch):
    monkeypatch.setattr(quantised, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the bitsandbytes library: pip install 'fedloru-flwr\[quantised\]'"):
        launch.run(None, {**settings, "base-precision": "nf4", "accumulate-into": "stack"}, engine="in-process")


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A model whose layers are as wide as the blocks in which weights are quantised."""
    return save_model(tmp_path_factory.mktemp("wide"), width=64)


@pytest.fixture
def adapted(wide):
    pytest.importorskip("bitsandbytes")
    model = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.bfloat16).eval()
    return adapters.AdaptedModel(model, plan_adapter(model, 4, 8.0, "q_proj,v_proj", "none"))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_all_linear_layers_but_the_output_layer_are_held_in_few_bits(adapted, kind):
    tokens = torch.tensor([[5, 40, 41, 42, 43]])
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        before = adapted.module.model.layers[0].mlp.up_proj(x).float()
        weights = {name: tensor.clone() for name, tensor in adapted.read_base().items()}
        adapted.quantise(kind)
        after = adapted.module.model.layers[0].mlp.up_proj(x).float()
        logits = adapted.module(tokens).logits
    base = adapted.read_base()
    small = {name for name in base if not base[name].is_floating_point()}
    assert len(small) == 2 * 7
    assert not any("embed" in name or "norm" in name or name.startswith("lm_head") for name in small)
    assert 0 < (after - before).norm() < {"int8": 0.03, "nf4": 0.15}[kind] * before.norm()
    assert not adapted.restore_dtypes()
    with pytest.raises(ValueError, match="nothing can be folded into quantised weights"):
        adapted.fold(None)
    adapted.write_base({name: torch.zeros_like(tensor) for name, tensor in weights.items()})
    with torch.no_grad():
        assert not adapted.module(tokens).logits.any()
        adapted.write_base(weights)
        torch.testing.assert_close(adapted.module(tokens).logits, logits)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_run_on_a_quantised_base_learns(settings, wide, kind):
    pytest.importorskip("bitsandbytes")
    more = {"model": f"hf:{wide}", "base-precision": kind, "accumulate-into": "stack", "fraction-evaluate": 0.5}
    summary = launch.run(None, {**settings, **more}, engine="in-process")
    rows = RunDirectory.open(summary["run_dir"]).read_rounds()
    assert rows[-1]["clients_failed"] == 0
    assert rows[-1]["ledger_version"] == 1
    assert rows[-1]["metrics"]["perplexity"] < rows[0]["metrics"]["perplexity"]
    assert rows[-1]["clients_evaluated"] == 4
    assert pretrained.PretrainedFactory(wide, precision=kind).quantised == kind
    assert "bitsandbytes" in sys.modules
