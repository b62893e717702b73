"""Whole runs that fine-tune a language model, in this process."""

import json
import math

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedloru_flwr import launch
from fedloru_flwr.export import export
from fedloru_flwr.plan import plan
from fedloru_flwr.runs import RunDirectory


def run(settings, **more):
    summary = launch.run(None, {**settings, **more}, engine="in-process")
    return RunDirectory.open(summary["run_dir"])


def perplexities(directory):
    return [row["metrics"]["perplexity"] for row in directory.read_rounds()]


def test_a_language_model_learns_and_its_adapter_is_the_runs_model(settings, llama):
    directory = run(
        settings, **{"exact-match-samples": 2, "generated-samples": 2, "max-new-tokens": 4, "local-epochs": 3}
    )
    rows, found = directory.read_rounds(), perplexities(directory)
    assert found[-1] < found[0] / 1.5
    assert [row["metrics"]["perplexity"] for row in rows] == [pytest.approx(math.exp(row["loss"])) for row in rows]
    assert 0 <= rows[-1]["metrics"]["exact_match"] <= 1
    assert rows[-1]["accuracy"] > rows[0]["accuracy"]
    assert rows[-1]["ledger_version"] == 1
    summary = directory.read_summary()
    assert summary["status"] == "finished"
    assert summary["trainable_parameters"] < summary["model_parameters"]

    answers = directory.read_answers()
    assert [row["round"] for row in answers] == [0, 0, 3, 3]
    assert answers[0]["prompt"] == "Q: say a 100\nA: "
    assert answers[0]["reference"] == "aaaa"
    assert len(answers[0]["generated"]) <= 4

    tokens = torch.tensor([[5, 40, 41, 42, 43]])
    merged = AutoModelForCausalLM.from_pretrained(llama)
    merged.load_state_dict(load_file(directory.path / "model.safetensors"))
    want = merged(tokens).logits
    base = AutoModelForCausalLM.from_pretrained(llama)
    assert (base(tokens).logits - want).abs().max() > 0.1

    adapter = export(directory.path, "peft").path
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == llama
    assert config["task_type"] == "CAUSAL_LM"
    again = PeftModel.from_pretrained(base, adapter)
    torch.testing.assert_close(again(tokens).logits, want, atol=1e-4, rtol=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(export(directory.path, "merged").path)
    torch.testing.assert_close(whole(tokens).logits, want, atol=1e-4, rtol=1e-4)


def test_merged_and_stacked_pasts_are_the_same_model(settings):
    merged = perplexities(run(settings))
    stacked = perplexities(run(settings, **{"accumulate-into": "stack", "run-name": "stacked"}))
    assert stacked == pytest.approx(merged, rel=1e-4)


def test_a_plan_tells_the_bytes_of_a_run(settings):
    more = {"fraction-evaluate": 0.5, "exact-match-samples": 1}
    planned = plan(None, {**settings, **more}).methods[0]
    rows = run(settings, **more).read_rounds()[1:]
    assert [one.bytes_up for one in planned.rounds] == [row["bytes_up"] for row in rows]
    assert [one.bytes_down for one in planned.rounds] == [row["bytes_down"] for row in rows]
