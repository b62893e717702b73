"""Exports, as peft, transformers and torch load them; and runs that begin from an adapter."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import fedloru_flwr
from fedloru_flwr import export as exporting
from fedloru_flwr.cli import app
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.data import DataSpec
from fedloru_flwr.export import ExportError, MismatchError, export
from fedloru_flwr.lowrank import product, seeded
from fedloru_flwr.models import MLP, AdapterError, FromAdapter, NetworkFactory, PlanError
from fedloru_flwr.models.peft_files import apply_update, read_adapter
from fedloru_flwr.models.plan import build_seeded, plan_adapter, plan_model, plan_recorded
from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FedLoRA, FedLoRU, FedPara
from fedloru_flwr.strategies.state import Outcome, state_to_checkpoint, step
from fedloru_flwr.workload import network_factory

pytestmark = pytest.mark.usefixtures("fresh_process", "quick_books")


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """No look at the hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def leave_run(strategy, path, rounds=3, size=0.1):
    """A run directory as a killed run of this strategy leaves it, accumulated after all rounds but the last."""
    generator = torch.Generator().manual_seed(5)
    state = strategy.state
    for server_round in range(1, rounds + 1):
        moved = {k: v + size * torch.randn(v.shape, generator=generator) for k, v in state.trainables.items()}
        statistics = {k: v + torch.rand(v.shape, generator=generator) for k, v in state.statistics.items()}
        state = step(
            state,
            server_round,
            Outcome(moved, applied={}),
            statistics,
            plan=strategy.plan,
            accumulate_now=server_round < rounds,
            reinit="reset",
            seed=strategy.seed,
        )
    strategy.state = state
    tensors, saved, entries = state_to_checkpoint(state)
    path.mkdir(parents=True, exist_ok=True)
    settings = {"settings": strategy._fingerprint(), **saved}
    RunDirectory(path).write_checkpoint(rounds, tensors, settings, entries)
    return strategy.merged_state_dict()


def answers(model, *arguments, **keywords):
    with torch.no_grad():
        given = model.eval()(*arguments, **keywords)
    return given if isinstance(given, torch.Tensor) else given.logits


def loaded_with(model, state):
    model.load_state_dict(state)
    return model


class Small(nn.Module):
    """One of each kind of layer, and a stem whose name ends another's."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(30, 16)
        self.conv1 = nn.Conv1d(16, 12, 3, padding=1)
        self.block = nn.ModuleDict({"conv1": nn.Conv1d(12, 12, 3, padding=1), "norm": nn.BatchNorm1d(12)})
        self.hidden = nn.Linear(12, 14)
        self.head = nn.Linear(14, 3)

    def forward(self, x):
        x = self.conv1(self.embedding(x).transpose(1, 2))
        x = self.block["norm"](torch.relu(self.block["conv1"](x)))
        return self.head(torch.relu(self.hidden(x.mean(2))))


TARGETS = ("embedding", "block.conv1", "hidden")
TOKENS = torch.randint(30, (5, 7), generator=torch.Generator().manual_seed(1))


def small_run(path, strategy=FedLoRU, **more):
    more = {"rank": 2, "alpha": 3, "target_modules": TARGETS, "seed": 4, **more}
    return leave_run(strategy(Small, **more), path)


def small():
    return build_seeded(Small, 4)


# --- small networks ------------------------------------------------------------------------------------------------


def test_the_whole_ledger_is_one_adapter_beside_the_untouched_base(tmp_path):
    merged = small_run(tmp_path / "run")
    exported = export(tmp_path / "run", model=Small, inputs=TOKENS)
    assert exported.path == tmp_path / "run" / "export" / "peft"
    names = {"adapter_config.json", "adapter_model.safetensors", "base.safetensors", "export.json", "README.md"}
    assert {path.name for path in exported.path.iterdir()} == names
    assert {name: row["rank"] for name, row in exported.report["layers"].items()} == {
        "embedding": 6,  # two entries and the current factors, of rank 2 each
        "block.conv1": 6,
        "hidden": 6,
        "conv1": 12,  # PEFT cannot save `conv1` whole beside a pair of `block.conv1`: a pair of full rank
    }
    config = json.loads((exported.path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["bias"]) == (6, 6, "lora_only")
    assert config["rank_pattern"] == config["alpha_pattern"] == {"^conv1": 12}
    assert set(config["modules_to_save"]) == {"block.norm", "head"}
    base = load_file(exported.path / "base.safetensors")
    assert all(torch.equal(base[name], value) for name, value in small().state_dict().items())
    loaded = PeftModel.from_pretrained(loaded_with(Small(), base), exported.path)
    expected = answers(loaded_with(Small(), merged), TOKENS)
    torch.testing.assert_close(answers(loaded, TOKENS), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(answers(small(), TOKENS), expected, atol=1e-2)
    folded = loaded.merge_and_unload().state_dict()
    assert list(folded) == list(merged)
    for name, value in merged.items():
        torch.testing.assert_close(folded[name], value, msg=name)


def test_the_card_says_how_to_load_the_adapter(tmp_path, monkeypatch):
    merged = small_run(tmp_path / "run")
    exported = export(tmp_path / "run", model=Small, inputs=TOKENS)
    card = (exported.path / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: peft\n")
    (snippet,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(exported.path)
    names = {"Small": Small}
    exec(snippet, names)
    expected = answers(loaded_with(Small(), merged), TOKENS)
    torch.testing.assert_close(answers(names["model"], TOKENS), expected, atol=1e-5, rtol=1e-5)


def test_merged_has_the_keys_of_the_plain_network(tmp_path):
    merged = small_run(tmp_path / "run")
    exported = export(tmp_path / "run", "merged", output_dir=tmp_path / "there", model=Small, inputs=TOKENS)
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"model.safetensors", "export.json"}
    state = load_file(exported.path / "model.safetensors")
    assert set(state) == set(Small().state_dict())
    assert all(torch.equal(state[name], value) for name, value in merged.items())
    assert exported.report["check"]["difference"] < 1e-5  # from a model in which nothing is merged
    assert list(exported.report["layers"]) == ["embedding", "block.conv1", "hidden"]
    assert max(row["relative_error"] for row in exported.report["layers"].values()) < 1e-6
    assert exported.report["warnings"] == []


@pytest.mark.parametrize("rank", [1, 3, 6, 50])
def test_a_compressed_adapter_has_the_error_it_reports(tmp_path, rank):
    merged = small_run(tmp_path / "run")
    exported = export(tmp_path / "run", rank=rank, model=Small, inputs=TOKENS)
    assert exported.path.name == f"peft-rank-{rank}"
    report = json.loads((exported.path / "export.json").read_text())
    assert report == exported.report
    loaded = PeftModel.from_pretrained(small(), exported.path)
    folded = loaded.merge_and_unload().state_dict()
    before = small().state_dict()
    for name, row in report["layers"].items():
        key = f"{name}.weight"
        learnt = (merged[key] - before[key]).flatten(1).double()
        singular = torch.linalg.svdvals(learnt)
        # conv1 is a dense leaf, which is not compressed wherever PEFT holds it
        kept = row["learnt_rank"] if name == "conv1" else min(rank, row["learnt_rank"])
        assert row["rank"] == kept
        left = (learnt - (folded[key] - before[key]).flatten(1).double()).norm()
        assert float(left / learnt.norm()) == pytest.approx(row["relative_error"], abs=1e-5)
        assert row["relative_error"] == pytest.approx(float(singular[kept:].norm() / singular.norm()), abs=1e-5)
    if rank >= 6:  # the learnt ranks
        assert max(row["relative_error"] for row in report["layers"].values()) <= 1e-5
        assert report["check"]["difference_from_run"] < 1e-5
    else:
        assert report["check"]["difference_from_run"] > 1e-3


def test_what_is_held_by_merging_and_by_stacking_is_exported_alike(tmp_path):
    for into in ("merge", "stack"):
        small_run(tmp_path / into, accumulate_into=into)
        export(tmp_path / into, model=Small, inputs=TOKENS)
    one, other = (load_file(tmp_path / into / "export/peft/adapter_model.safetensors") for into in ("merge", "stack"))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_rank_stays_at_the_layers_own_however_long_the_ledger(tmp_path):
    strategy = FedLoRU(Small, rank=4, alpha=4, target_modules="hidden", dense_leaves="none", seed=4)
    leave_run(strategy, tmp_path / "run", rounds=8)
    exported = export(tmp_path / "run", model=Small, inputs=TOKENS)
    assert exported.report["layers"]["hidden"]["rank"] == 12
    assert exported.report["whole_modules"] == ["block.norm.running_mean", "block.norm.running_var"]
    assert json.loads((exported.path / "adapter_config.json").read_text())["bias"] == "none"


def test_factors_fresh_from_a_restart_add_no_rank_and_silent_layers_are_left_out(tmp_path):
    strategy = FedLoRU(Small, rank=2, alpha=2, target_modules=TARGETS, dense_leaves="none", seed=4)
    state = strategy.state
    moved = {k: torch.randn(v.shape) if "hidden" in k else v for k, v in state.trainables.items()}
    strategy.state = step(
        state, 1, Outcome(moved, {}), {}, plan=strategy.plan, accumulate_now=True, reinit="reset", seed=4
    )
    tensors, saved, entries = state_to_checkpoint(strategy.state)
    (tmp_path / "run").mkdir()
    RunDirectory(tmp_path / "run").write_checkpoint(1, tensors, {"settings": strategy._fingerprint(), **saved}, entries)
    report = export(tmp_path / "run", model=Small, inputs=TOKENS).report
    assert {name: row["rank"] for name, row in report["layers"].items()} == {"hidden": 2}


def test_hadamard_factors_are_exported_as_the_pairs_of_rank_r_squared_they_are(tmp_path):
    merged = small_run(tmp_path / "run", FedPara, target_modules=("block.conv1", "hidden"), rank=2)
    exported = export(tmp_path / "run", model=Small, inputs=TOKENS)
    assert exported.report["layers"]["hidden"]["rank"] == 12
    assert exported.report["layers"]["block.conv1"]["rank"] == 12
    loaded = PeftModel.from_pretrained(small(), exported.path)
    torch.testing.assert_close(answers(loaded, TOKENS), answers(loaded_with(Small(), merged), TOKENS))


def test_an_instance_of_a_model_will_do(tmp_path):
    net = build_seeded(Small, 9)
    leave_run(FedLoRA(net, rank=2, target_modules=TARGETS), tmp_path / "run")
    exported = export(tmp_path / "run", model=net, inputs=(TOKENS,))
    assert exported.report["round"] == 3


class Convolutional(nn.Module):
    def __init__(self, **conv):
        super().__init__()
        self.first = nn.Conv2d(2, 10, 3, padding=2, **conv)
        self.head = nn.Linear(10, 3)

    def forward(self, x):
        return self.head(torch.relu(self.first(x)).mean((2, 3)))


class Tokened(nn.Module):
    """A parameter on the module that holds all layers."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(8))
        self.hidden = nn.Linear(8, 9)

    def forward(self, x):
        return self.hidden(x + self.token)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True, dropout=0.0)
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


@pytest.mark.parametrize(
    ("net", "inputs", "targets", "message"),
    [
        (lambda: Convolutional(dilation=2), torch.ones(2, 2, 6, 6), "first", "has neither the dilation"),
        (lambda: Convolutional(padding_mode="circular"), torch.ones(2, 2, 6, 6), "first", "nor the padding mode"),
        (Tokened, torch.ones(2, 8), "hidden", "what was trained of module '': it is saved whole only"),
        (Encoder, torch.ones(2, 4, 16), "linear1", "fused encoder layer reads W alone"),
    ],
)
def test_what_plain_peft_would_compute_otherwise_is_refused_and_can_be_merged(tmp_path, net, inputs, targets, message):
    leave_run(FedLoRU(net, rank=2, target_modules=targets), tmp_path / "run")
    with pytest.raises(AdapterError, match=message):
        export(tmp_path / "run", model=net, inputs=inputs)
    assert list((tmp_path / "run" / "export").iterdir()) == []
    export(tmp_path / "run", "merged", model=net, inputs=inputs)


def test_double_and_half_precision_are_exported_to_their_own_accuracy(tmp_path):
    for dtype, limit in ((torch.float64, 1e-6), (torch.bfloat16, 0.1)):
        name = str(dtype)

        def net(dtype=dtype):
            return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).to(dtype)

        leave_run(FedLoRU(net, rank=2, target_modules="0"), tmp_path / name)
        inputs = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).to(dtype)
        check = export(tmp_path / name, model=net, inputs=inputs).report["check"]
        assert check["difference"] <= limit * check["largest_output"]


# --- what cannot be exported ---------------------------------------------------------------------------------------


def test_a_run_that_cannot_be_taken_up_says_why(tmp_path):
    with pytest.raises(ValueError, match="there is no run at"):
        export(tmp_path / "none")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ExportError, match="has no checkpoint yet"):
        export(tmp_path / "empty")
    small_run(tmp_path / "run")
    RunDirectory(tmp_path / "run").write_manifest({"seed": 4})
    with pytest.raises(ExportError, match=r"give the model's factory \(on the command line --model my_app"):
        export(tmp_path / "run")
    with pytest.raises(ExportError, match="sample inputs are needed"):
        export(tmp_path / "run", model=Small)
    with pytest.raises(ExportError, match="does not begin with the weights that the run began with"):
        export(tmp_path / "run", model=build_seeded(Small, 5), inputs=TOKENS)
    with pytest.raises(PlanError, match=r"the model has no embedding, block\.conv1, hidden"):
        export(tmp_path / "run", model=lambda: MLP((4,), 2, (8,)), inputs=TOKENS)


def test_settings_that_make_no_sense_are_refused(tmp_path):
    small_run(tmp_path / "run")
    for settings, message in [
        ({"format": "pfet"}, "format = 'pfet' is not one of peft, merged; did you mean 'peft'?"),
        ({"format": "merged", "rank": 4}, "rank = 4 means nothing to format = 'merged'"),
        ({"rank": 0}, "rank = 0 must be at least 1"),
        ({"output_dir": tmp_path}, "holds something that is no export"),
    ]:
        with pytest.raises(ExportError) as refusal:
            export(tmp_path / "run", **settings, model=Small, inputs=TOKENS)
        assert message in str(refusal.value)
    assert not (tmp_path / "run" / "export").exists()


def test_nothing_learnt_is_nothing_to_export(tmp_path):
    strategy = FedLoRU(Small, rank=2, target_modules=TARGETS)
    leave_run(strategy, tmp_path / "run", size=0.0)
    for name in strategy.state.statistics:
        strategy.state.statistics[name].copy_(strategy._model.state_dict()[name])
    tensors, saved, entries = state_to_checkpoint(strategy.state)
    RunDirectory(tmp_path / "run").write_checkpoint(4, tensors, {"settings": strategy._fingerprint(), **saved}, entries)
    with pytest.raises(ExportError, match="no factorised layer has changed"):
        export(tmp_path / "run", model=Small, inputs=TOKENS)
    with pytest.raises(ExportError, match="nothing has changed since the run began"):
        export(tmp_path / "run", "merged", model=Small, inputs=TOKENS)


def test_an_adapter_that_loads_as_something_else_is_an_error_and_leaves_nothing(tmp_path, monkeypatch):
    small_run(tmp_path / "run")
    real = exporting.write_adapter

    def nothing(model, update, directory, base_name):
        real(model, update, directory, base_name)
        weights = load_file(Path(directory) / "adapter_model.safetensors")
        exporting.atomic.write_tensors(
            Path(directory) / "adapter_model.safetensors",
            {key: value * 0 if "lora" in key else value for key, value in weights.items()},
            {"format": "pt"},
        )

    monkeypatch.setattr(exporting, "write_adapter", nothing)
    with pytest.raises(MismatchError, match=r"PEFT loads a product that is 1\.0e\+00 off"):
        export(tmp_path / "run", model=Small, inputs=TOKENS)

    def partly(model, update, directory, base_name):
        real(model, update, directory, base_name)
        weights = load_file(Path(directory) / "adapter_model.safetensors")
        kept = {key: value for key, value in weights.items() if "hidden" not in key}
        exporting.atomic.write_tensors(Path(directory) / "adapter_model.safetensors", kept, {"format": "pt"})

    monkeypatch.setattr(exporting, "write_adapter", partly)
    with pytest.raises(AdapterError, match="is incomplete or of another model"):
        export(tmp_path / "run", model=Small, inputs=TOKENS)
    assert list((tmp_path / "run" / "export").iterdir()) == []


def test_other_outputs_and_a_merge_of_nothing_are_errors(tmp_path, monkeypatch):
    small_run(tmp_path / "run")
    real = exporting.load_file

    def off(path):
        return {key: value + 0.01 if key == "hidden.weight" else value for key, value in real(path).items()}

    monkeypatch.setattr(exporting, "load_file", off)
    with pytest.raises(MismatchError, match=r"other tensors than the run's model: hidden\.weight; nothing"):
        export(tmp_path / "run", "merged", model=Small, inputs=TOKENS)
    with pytest.raises(MismatchError, match="outputs that differ by"):
        export(tmp_path / "run", model=Small, inputs=TOKENS)
    monkeypatch.setattr(exporting, "load_file", lambda path: small().state_dict())
    with pytest.raises(MismatchError, match=r"other tensors .* embedding\.weight, .* and \d+ more; nothing"):
        export(tmp_path / "run", "merged", model=Small, inputs=TOKENS)
    assert list((tmp_path / "run" / "export").iterdir()) == []


def test_a_merge_of_nothing_is_an_error_even_where_training_has_changed_little(tmp_path, monkeypatch):
    strategy = FedLoRU(FACTORY, rank=2, target_modules="layers.0", dense_leaves="none")
    leave_run(strategy, tmp_path / "run", size=1.3e-5)
    report = export(tmp_path / "run", "merged", model=FACTORY, inputs=IMAGES).report
    assert 2e-5 < report["check"]["change_by_training"] / report["check"]["largest_output"] < 1e-4
    monkeypatch.setattr(exporting, "load_file", lambda path: FACTORY().state_dict())
    with pytest.raises(MismatchError, match=r"other tensors than the run's model: layers\.0\.weight; nothing"):
        export(tmp_path / "run", "merged", model=FACTORY, inputs=IMAGES)


def test_rows_of_an_embedding_that_no_sample_has_are_compared_too(tmp_path, monkeypatch):
    small_run(tmp_path / "run", target_modules="hidden")
    real = exporting.load_file

    def reverted(path):
        state = real(path)
        state["embedding.weight"][10:] = small().embedding.weight.detach()[10:]
        return state

    monkeypatch.setattr(exporting, "load_file", reverted)
    with pytest.raises(MismatchError, match=r"other tensors than the run's model: embedding\.weight; nothing"):
        export(tmp_path / "run", "merged", model=Small, inputs=TOKENS % 10)


def coarse():
    return nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 5)).to(torch.bfloat16)


ROWS = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)


def coarse_run(path, size):
    leave_run(FedLoRU(coarse, rank=4, alpha=4, target_modules="0", dense_leaves="none", seed=1), path, size=size)


def test_an_untouched_bfloat16_base_is_not_taken_for_the_merge(tmp_path, monkeypatch):
    coarse_run(tmp_path / "run", 0.03)
    monkeypatch.setattr(exporting, "load_file", lambda path: build_seeded(coarse, 1).state_dict())
    with pytest.raises(MismatchError, match=r"other tensors than the run's model: 0\.weight; nothing"):
        export(tmp_path / "run", "merged", model=coarse, inputs=ROWS)


def test_a_merge_that_rounds_the_update_away_says_so(tmp_path):
    coarse_run(tmp_path / "some", 0.005)
    exported = export(tmp_path / "some", "merged", model=coarse, inputs=ROWS)
    before = build_seeded(coarse, 1).state_dict()["0.weight"].double()
    merged = load_file(exported.path / "model.safetensors")["0.weight"].double()
    kept = read_adapter(build_seeded(coarse, 1), export(tmp_path / "some", model=coarse, inputs=ROWS).path)
    learnt = product(kept.layers[0], kept.pairs).double()
    lost = exported.report["layers"]["0"]["relative_error"]
    assert lost == pytest.approx(float((merged - before - learnt).norm() / learnt.norm()), rel=1e-3)
    assert lost > 0.1
    (told,) = (line for line in exported.lines() if "rounding to bfloat16" in line)
    assert told.startswith("warning: ")
    assert "--format peft keeps it" in told
    assert exported.table().row_count == 1
    coarse_run(tmp_path / "all", 1e-9)
    with pytest.raises(ExportError, match=r"layer '0': the merge leaves its weight as it was.*bfloat16.*'peft'"):
        export(tmp_path / "all", "merged", model=coarse, inputs=ROWS)


def test_a_wrong_fold_is_told_from_the_pairs_themselves(tmp_path, monkeypatch):
    small_run(tmp_path / "run")
    real = exporting.merged_state_dict

    def wrong(*arguments):
        merged = real(*arguments)
        return {**merged, "hidden.weight": 0.99 * merged["hidden.weight"]}

    monkeypatch.setattr(exporting, "merged_state_dict", wrong)
    with pytest.raises(MismatchError, match=r"layer 'hidden': its merged weight is .* away from W_0 \+ B A"):
        export(tmp_path / "run", "merged", model=Small, inputs=TOKENS)
    monkeypatch.setattr(exporting, "_merged_layers", lambda trained: ({}, []))
    with pytest.raises(MismatchError, match="outputs that differ by"):
        export(tmp_path / "run", "merged", model=Small, inputs=TOKENS)


def test_samples_that_say_nothing_of_the_training_are_named(tmp_path):
    small_run(tmp_path / "run", target_modules="embedding", dense_leaves="none")

    class Silent(Small):
        def forward(self, x):
            return super().forward(x) * 0 + 1

    for format in ("peft", "merged"):
        exported = export(tmp_path / "run", format, model=Silent, inputs=TOKENS)
        assert exported.report["check"]["change_by_training"] == 0
        assert any("they say nothing of the export" in line for line in exported.lines())


def test_what_a_run_began_from_is_not_replaced(tmp_path):
    small_run(tmp_path / "first")
    adapter = export(tmp_path / "first", output_dir=tmp_path / "adapter", model=Small, inputs=TOKENS).path
    factory = FromAdapter(Small, str(adapter))
    leave_run(FedLoRU(factory, rank=2, alpha=2, target_modules="hidden", seed=4), tmp_path / "second")
    (tmp_path / "other").symlink_to(adapter)
    (tmp_path / "export.json").write_text("{}")
    for place in (adapter, tmp_path / "other", tmp_path):
        with pytest.raises(ExportError, match="holds what the run began from \\(init-adapter = "):
            export(tmp_path / "second", output_dir=place, model=factory, inputs=TOKENS)
    assert (adapter / "adapter_model.safetensors").exists()
    export(tmp_path / "second", model=factory, inputs=TOKENS)


def test_inputs_and_places_that_cannot_be_are_named(tmp_path):
    small_run(tmp_path / "run")
    (tmp_path / "file").touch()
    for settings, message in [
        ({"inputs": torch.ones(2, 3)}, "inputs: Small cannot be called with the sample inputs (float32 (2, 3)): "),
        ({"inputs": [1, 2]}, "inputs are of type list: expected a tensor, a tuple of arguments or a dict"),
        ({"inputs": TOKENS, "output_dir": tmp_path / "file" / "x"}, f"output-dir = '{tmp_path}/file/x' cannot be"),
        ({"inputs": TOKENS, "format": "PEFT"}, "did you mean 'peft'?"),
    ]:
        with pytest.raises(ExportError) as refusal:
            export(tmp_path / "run", **settings, model=Small)
        assert message in str(refusal.value)


def test_an_export_is_replaced_by_the_next(tmp_path):
    small_run(tmp_path / "run")
    first = export(tmp_path / "run", "merged", output_dir=tmp_path / "there", model=Small, inputs=TOKENS)
    (first.path / "left.txt").write_text("of the first")
    export(tmp_path / "run", output_dir=tmp_path / "there", model=Small, inputs=TOKENS)
    assert not (tmp_path / "there" / "left.txt").exists()
    assert json.loads((tmp_path / "there" / "export.json").read_text())["format"] == "peft"


# --- transformers --------------------------------------------------------------------------------------------------

IDS = torch.tensor([[1, 2, 3, 4, 5], [6, 7, 8, 9, 1]])
FRESH = """
import sys, torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
models = [
    AutoPeftModelForCausalLM.from_pretrained({adapter!r}),
    AutoModelForCausalLM.from_pretrained({merged!r}),
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base!r}), {full!r}),
]
with torch.no_grad():
    torch.save([model.eval()(input_ids=torch.tensor({ids})).logits for model in models], {out!r})
assert not any(name.startswith(("fedloru_flwr", "flwr")) for name in sys.modules)
"""


def llama(**more):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **more))


def gpt2():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 50, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A Llama model in a directory, as a hub's snapshot is."""
    directory = tmp_path_factory.mktemp("models") / "llama"
    with seeded(0):
        llama().save_pretrained(directory)
    return directory


def in_a_fresh_process(tmp_path, **paths):
    out = tmp_path / "logits.pt"
    text = FRESH.format(ids=IDS.tolist(), out=str(out), **{name: str(path) for name, path in paths.items()})
    done = subprocess.run(
        [sys.executable, "-c", text],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return torch.load(out)


@pytest.mark.slow
def test_a_language_model_is_loaded_by_transformers_and_peft_alone(tmp_path, pretrained):
    def factory():
        return LlamaForCausalLM.from_pretrained(pretrained)

    merged = leave_run(FedLoRU(factory, rank=4, alpha=8), tmp_path / "run")
    run = tmp_path / "run"
    expected = answers(loaded_with(llama(), merged), input_ids=IDS)
    exported = export(run, model=factory)
    assert not (exported.path / "base").exists()
    assert exported.report["base"] == str(pretrained)
    config = json.loads((exported.path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pretrained)
    assert config["task_type"] == "CAUSAL_LM"
    assert {"model.norm", "lm_head"} <= set(config["modules_to_save"])
    assert "model.embed_tokens" in exported.report["layers"]
    whole = export(run, "merged", model=factory)
    full = export(run, rank=12, model=factory)
    assert max(row["relative_error"] for row in full.report["layers"].values()) <= 1e-5
    for plain in in_a_fresh_process(
        tmp_path, adapter=exported.path, merged=whole.path, base=pretrained, full=full.path
    ):
        torch.testing.assert_close(plain, expected, atol=1e-4, rtol=1e-4)


def test_the_adapter_is_loaded_by_transformers_own_load_adapter(tmp_path, pretrained):
    def factory():
        return LlamaForCausalLM.from_pretrained(pretrained)

    more = {"target_modules": "q_proj,v_proj", "dense_leaves": "none"}
    merged = leave_run(FedLoRU(factory, rank=2, alpha=4, **more), tmp_path / "run")
    exported = export(tmp_path / "run", model=factory)
    model = factory()
    model.load_adapter(str(exported.path))
    expected = answers(loaded_with(llama(), merged), input_ids=IDS)
    torch.testing.assert_close(answers(model, input_ids=IDS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [llama, gpt2, lambda: llama(tie_word_embeddings=True)], ids=["llama", "gpt2", "tied"])
def test_a_model_that_no_name_gives_is_exported_with_its_base(tmp_path, build):
    merged = leave_run(FedLoRU(build, rank=2, alpha=4), tmp_path / "run")
    exported = export(tmp_path / "run", model=build)
    assert exported.report["base"] == "base"
    base = type(build()).from_pretrained(exported.path / "base")
    loaded = PeftModel.from_pretrained(base, exported.path)
    expected = answers(loaded_with(build(), merged), input_ids=IDS)
    torch.testing.assert_close(answers(loaded, input_ids=IDS), expected, atol=1e-4, rtol=1e-4)
    whole = export(tmp_path / "run", "merged", model=build)
    again = type(build()).from_pretrained(whole.path)
    torch.testing.assert_close(answers(again, input_ids=IDS), expected, atol=1e-4, rtol=1e-4)


# --- runs of this package's app ------------------------------------------------------------------------------------

SMALL = {
    "num-clients": 4,
    "num-server-rounds": 3,
    "local-epochs": 1,
    "model": "mlp",
    "hidden": "24",
    "fraction-train": 1.0,
    "max-norm-ratio": 0.0,
}


def run_small(**settings):
    given = {**SMALL, **{key.replace("_", "-"): value for key, value in settings.items()}}
    return Path(fedloru_flwr.run(config=given, engine="in-process")["run_dir"])


FACTORY = NetworkFactory("mlp", (1, 8, 8), 10, hidden=(24,))
IMAGES = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(2))
ACCUMULATING = {"ffa-lora", "rolora", "fedpara", "hetlora", "fedloru", "pfedloru", "mfedloru", "fedloru-seeded"}


LIKE_OTHERS = {"fedlora", "pfedloru", "mfedloru", "rolora", "hetlora", "flexlora"}


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ())
        for name in sorted(set(ALGORITHMS) - {"fedavg", "fedsa-lora"})
    ],
)
def test_every_method_with_factors_is_exported(tmp_path, monkeypatch, algorithm):
    monkeypatch.chdir(tmp_path)
    more = {"accumulate_every": 2} if algorithm in ACCUMULATING else {}
    epochs = {"local_epochs": 3} if algorithm == "pfedloru" else {}
    ranks = {"ranks": "4:0.5,2:0.5"} if algorithm in ("mfedloru", "flexlora", "hetlora", "flora", "fedhm") else {}
    run = run_small(algorithm=algorithm, **more, **epochs, **ranks)
    expected = answers(loaded_with(FACTORY(), load_file(run / "model.safetensors")), IMAGES)
    loaded = PeftModel.from_pretrained(FACTORY(), export(run).path)
    torch.testing.assert_close(answers(loaded, IMAGES), expected, atol=1e-4, rtol=1e-4)
    state = load_file(export(run, "merged").path / "model.safetensors")
    assert all(torch.equal(state[name], value) for name, value in load_file(run / "model.safetensors").items())
    full = export(run, rank=64).report
    assert max(row["relative_error"] for row in full["layers"].values()) <= 1e-5


def test_methods_without_factors_or_without_a_global_model_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_small(algorithm="fedavg")
    with pytest.raises(ExportError, match="has no factors to write as an adapter: use format = 'merged'"):
        export(run)
    state = load_file(export(run, "merged").path / "model.safetensors")
    assert torch.equal(state["layers.0.weight"], load_file(run / "model.safetensors")["layers.0.weight"])
    run = run_small(algorithm="fedsa-lora")
    for format in ("peft", "merged"):
        with pytest.raises(ExportError, match="FedSALoRA has no global model to export"):
            export(run, format)


def test_a_model_file_that_is_not_the_checkpoints_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = run_small(num_server_rounds=1)
    state = load_file(run / "model.safetensors")
    RunDirectory(run).write_model({**state, "layers.1.bias": state["layers.1.bias"] + 1})
    with pytest.raises(MismatchError, match=r"checkpoint of round 1 gives \(it differs in layers\.1\.bias\)"):
        export(run)


def test_the_command_exports_an_interrupted_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = "num-clients=4 local-epochs=1 model=resnet10 model-width=8 norm=batch accumulate-every=1"
    outcome = CliRunner().invoke(
        app,
        ["run", "--engine", "in-process", "-c", f"{settings} num-server-rounds=2 run-name=cut checkpoint-every=1"],
    )
    assert outcome.exit_code == 0, outcome.output
    run = tmp_path / "runs" / "cut"
    state = load_file(run / "model.safetensors")
    for name in ("model.safetensors", "summary.json", "metrics.jsonl"):  # as a killed process leaves it
        (run / name).unlink()
    outcome = CliRunner().invoke(app, ["export", "runs/latest", "--format", "peft", "--out", "adapter"])
    assert outcome.exit_code == 0, outcome.output
    assert "relative error" in outcome.output
    assert "peft of round 2 of cut" in outcome.output
    assert f"exported to: {tmp_path / 'adapter'}" in outcome.output
    network = NetworkFactory("resnet10", (1, 8, 8), 10, width=8, norm="batch")
    loaded = PeftModel.from_pretrained(network(), tmp_path / "adapter")
    torch.testing.assert_close(
        answers(loaded, IMAGES), answers(loaded_with(network(), state), IMAGES), atol=1e-4, rtol=1e-4
    )
    for arguments, status, message in [
        (["export", "runs/none"], 2, "there is no run at"),
        (["export", "runs/cut", "--format", "onnx"], 2, "format = 'onnx' is not one of peft, merged"),
        (["export", "runs/cut", "--model", "nowhere"], 2, "--model = 'nowhere' must be of the form"),
        (["export", "runs/cut", "--rank", "0"], 2, "rank = 0 must be at least 1"),
    ]:
        outcome = CliRunner().invoke(app, arguments)
        assert outcome.exit_code == status
        assert message in outcome.output


def test_the_command_takes_the_model_and_inputs_of_an_app_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own_app.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def Net(): return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))\n"
        "def sample_inputs(): return torch.ones(2, 12)\n"
    )
    net = lambda: nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))  # noqa: E731
    leave_run(FedLoRU(net, rank=2, target_modules="0"), tmp_path / "mine")
    arguments = ["export", "mine", "--model", "my_own_app:Net", "--inputs", "my_own_app:sample_inputs"]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 0, outcome.output
    assert "compared on 2 sample inputs" in outcome.output
    assert "which training has changed by" in outcome.output
    with (tmp_path / "my_own_app.py").open("a") as file:
        file.write("tensor = torch.ones(2, 12)\ndef nothing(): pass\ndef failing(): return {}['x']\n")
        file.write("def wide(): return torch.ones(2, 13)\n")
    sys.modules.pop("my_own_app")
    importlib.invalidate_caches()
    for given, message in [
        ("my_own_app", "--inputs = 'my_own_app' must be of the form package.module:name"),
        ("my_own_app:tensor", "--inputs = 'my_own_app:tensor' is a Tensor: expected a function"),
        ("my_own_app:nothing", "--inputs = 'my_own_app:nothing' returned None"),
        ("my_own_app:failing", "--inputs = 'my_own_app:failing' failed with KeyError: 'x'"),
        ("my_own_app:wide", "inputs: Sequential cannot be called with the sample inputs (float32 (2, 13))"),
    ]:
        outcome = CliRunner().invoke(app, [*arguments[:-1], given])
        assert outcome.exit_code == 2
        assert message in outcome.output, outcome.output


def documented(first_line):
    """The Python block of the document on exports that begins so."""
    text = (Path(__file__).parent.parent / "docs" / "export.md").read_text()
    (block,) = [one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if one.startswith(first_line)]
    return block


def test_the_documented_snippets_run_as_they_stand(tmp_path, monkeypatch, pretrained):
    monkeypatch.chdir(tmp_path)
    run = run_small(num_server_rounds=1)
    names = {"Net": FACTORY, "FedLoRU": FedLoRU}
    exec(documented("from fedloru_flwr.export import export"), names)
    assert names["exported"].path == tmp_path / "adapter"
    exec(documented("from peft import PeftModel"), names)
    state = load_file(run / "model.safetensors")
    torch.testing.assert_close(answers(names["model"], IMAGES), answers(loaded_with(FACTORY(), state), IMAGES))
    exec(documented("from fedloru_flwr.models import FromAdapter"), names)
    assert torch.equal(names["strategy"]._model.layers[1].weight, state["layers.1.weight"])

    def factory():
        return LlamaForCausalLM.from_pretrained(pretrained)

    leave_run(FedLoRU(factory, rank=2), tmp_path / "language")
    export("language", output_dir="adapter", model=factory)
    exec(documented("from peft import AutoPeftModelForCausalLM"), names)
    assert answers(names["model"], input_ids=IDS).shape == (2, 5, 50)


# --- runs that begin from an adapter -------------------------------------------------------------------------------


def adapter_of(factory, directory, **config):
    """An adapter that PEFT has saved, with everything trained a little."""
    model = get_peft_model(build_seeded(factory, 0), LoraConfig(**{"r": 3, "lora_alpha": 6, **config}))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "original_module" not in name:
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(directory, save_embedding_layers=False)
    return model


RICH = {
    "target_modules": ["embedding", "block.conv1", "hidden"],
    "rank_pattern": {"hidden": 5},
    "alpha_pattern": {"hidden": 1},
    "use_rslora": True,
    "bias": "lora_only",
    "modules_to_save": ["head"],
}


def test_an_adapter_is_taken_up_as_peft_computes_it(tmp_path):
    theirs = adapter_of(Small, tmp_path / "adapter", **RICH)
    update = read_adapter(build_seeded(Small, 0), tmp_path / "adapter")
    assert [layer.name for layer in update.layers] == ["embedding", "block.conv1", "hidden"]
    assert update.rank_of(update.layers[2]) == 5
    assert set(update.values) == {"block.conv1.bias", "hidden.bias", "head.weight", "head.bias"}
    ours = build_seeded(Small, 0)
    apply_update(ours, update)
    torch.testing.assert_close(answers(ours, TOKENS), answers(theirs, TOKENS), atol=1e-5, rtol=1e-5)
    built = build_seeded(FromAdapter(Small, str(tmp_path / "adapter")), 0)
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in built.state_dict().items())
    assert all(parameter.requires_grad for parameter in built.parameters())


def test_reading_an_adapter_leaves_the_random_numbers_as_they_were(tmp_path):
    adapter_of(Small, tmp_path / "adapter", target_modules=["hidden"])
    model = small()
    before = torch.get_rng_state()
    read_adapter(model, tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_from_an_adapter_is_exported_beside_the_plain_base(tmp_path):
    adapter_of(Small, tmp_path / "adapter", **RICH)

    factory = FromAdapter(Small, str(tmp_path / "adapter"))
    strategy = FedLoRU(factory, rank=2, alpha=2, target_modules="hidden,conv1", dense_leaves="none", seed=0)
    merged = leave_run(strategy, tmp_path / "run")
    exported = export(tmp_path / "run", model=factory, inputs=TOKENS)
    ranks = {name: row["rank"] for name, row in exported.report["layers"].items()}
    assert ranks == {"embedding": 3, "block.conv1": 3 + 6, "hidden": 5 + 6, "conv1": 6}
    loaded = PeftModel.from_pretrained(build_seeded(Small, 0), exported.path)
    expected = answers(loaded_with(Small(), merged), TOKENS)
    torch.testing.assert_close(answers(loaded, TOKENS), expected, atol=1e-5, rtol=1e-5)


def test_what_is_no_usable_adapter_is_refused(tmp_path):
    def save(name, config):
        model = get_peft_model(build_seeded(Small, 0), config)
        with torch.no_grad():
            for parameter in (one for one in model.parameters() if one.requires_grad):
                parameter += 0.1
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)

    save("loha", LoHaConfig(r=2, target_modules=["hidden"]))
    save("dora", LoraConfig(r=2, target_modules=["hidden"], use_dora=True))
    save("pissa", LoraConfig(r=2, target_modules=["hidden"], init_lora_weights="pissa"))
    get_peft_model(build_seeded(Small, 0), LoraConfig(r=2, target_modules=["hidden"])).save_pretrained(
        tmp_path / "zero"
    )
    adapter_of(lambda: MLP((4,), 2, (8,)), tmp_path / "other", target_modules=["layers.0"])
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "adapter_config.json").write_text("{")
    for name, message in [
        ("none", "there is no adapter_config.json"),
        ("empty", "there is no adapter_config.json"),
        ("odd", "cannot be read"),
        ("loha", "is of type LOHA, not LORA"),
        ("dora", "more than a product of factors beside a weight (use_dora)"),
        ("pissa", "changes the weight of 'hidden' when it is loaded (init_lora_weights = 'pissa')"),
        ("zero", "changes nothing"),
        ("other", "PEFT cannot load the adapter"),
    ]:
        with pytest.raises(AdapterError) as refusal:
            read_adapter(build_seeded(Small, 0), tmp_path / name)
        assert message in str(refusal.value)


def test_a_run_begins_with_the_adapter_its_settings_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs = adapter_of(FACTORY, tmp_path / "adapter", target_modules=["layers.0"], modules_to_save=["layers.1"])
    first = run_small(init_adapter="adapter", learning_rate=1e-6, accumulate_every=1)
    began = loaded_with(FACTORY(), load_file(first / "model.safetensors"))
    torch.testing.assert_close(answers(began, IMAGES), answers(theirs, IMAGES), atol=1e-3, rtol=1e-3)
    rows = RunDirectory.open(first).read_rounds()
    assert all("base" not in row["bytes_by_purpose"] for row in rows)  # every client has built W_0 by itself
    loaded = PeftModel.from_pretrained(FACTORY(), export(first).path)
    torch.testing.assert_close(answers(loaded, IMAGES), answers(began, IMAGES), atol=1e-5, rtol=1e-5)
    # An export of a run is an adapter that the next run can begin with.
    second = run_small(init_adapter=str(first / "export" / "peft"), num_server_rounds=1)
    assert export(second).report["layers"]["layers.0"]["learnt_rank"] > 4
    with pytest.raises(ConfigError, match=r"init-adapter = '.*none' is no directory"):
        run_small(init_adapter="none")
    with pytest.raises(AdapterError, match="there is no adapter_config"):
        run_small(init_adapter=str(first))


def test_a_client_without_the_adapter_builds_the_plain_network(tmp_path):
    adapter_of(FACTORY, tmp_path / "adapter", target_modules=["layers.0"])
    spec = DataSpec((1, 8, 8), 10)
    settings = {"model": "mlp", "hidden": "24"}
    there = RunConfig.from_mapping({**settings, "init-adapter": str(tmp_path / "adapter")})
    elsewhere = RunConfig.from_mapping({**settings, "init-adapter": str(tmp_path / "not-here")})
    assert network_factory(there, spec) == FromAdapter(FACTORY, str(tmp_path / "adapter"))
    assert network_factory(elsewhere, spec) == FACTORY


def test_a_recorded_plan_is_the_plan(tmp_path):
    model = small()
    for form in ("factors", "from-zero", "compressed", "one-sided"):
        plan = plan_model(model, form, 2, 3.0, TARGETS, "head,block.norm")
        names = [layer.name for layer in plan.layers]
        again = plan_recorded(model, form, 2, 3.0, names, plan.dense_leaves)
        for part in ("layers", "dense_leaves", "statistics", "base", "scale", "form"):
            assert getattr(again, part) == getattr(plan, part)
    assert plan_adapter(model, 2, 3.0, TARGETS).layers == again.layers
