"""Whole runs that fine-tune a language model, in this process."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from safetensors.torch import load_file
from small_language import instructions, write_rows
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedloru_flwr import launch
from fedloru_flwr.config import read_config_file
from fedloru_flwr.export import export
from fedloru_flwr.models import pretrained
from fedloru_flwr.models.pretrained import PretrainedFactory
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


def test_a_model_of_gpt2s_layers_learns_in_bfloat16_over_accumulated_batches(settings, gpt2):
    more = {
        "model": f"hf:{gpt2}",
        "base-precision": "bfloat16",
        "precision": "bfloat16",
        "accumulate-steps": 2,
        "batch-size": 2,
        "gradient-checkpointing": True,
        "packing": True,
        "max-length": 96,
        "partitioner": "column:category",
        "num-server-rounds": 2,
        "accumulate-every": 1,
    }
    directory = run(settings, **more)
    found = perplexities(directory)
    assert found[-1] < found[0]
    weights = load_file(directory.path / "model.safetensors")
    assert weights["transformer.h.0.attn.c_attn.weight"].dtype == torch.bfloat16
    exported = export(directory.path, "merged").path
    assert AutoModelForCausalLM.from_pretrained(exported, dtype="auto").dtype == torch.bfloat16


GLUE = {
    "sentence": lambda word, other: {"sentence": f"{word} {other}"},
    "sentence1": lambda word, other: {"sentence1": word, "sentence2": other},
}


@pytest.mark.parametrize("form", GLUE)
def test_a_classifier_of_texts_trains_its_new_head_and_is_exported(settings, llama, tmp_path, form):
    words = {"good": ["fine", "nice", "great"], "bad": ["poor", "awful", "horrible"]}
    rows = [
        {**GLUE[form](words[kind][number % 3], "x" * (number % 5)), "label": kind}
        for number in range(40)
        for kind in words
    ]
    more = {"task": "classification", "data-path": write_rows(tmp_path / "rows.jsonl", rows), "num-server-rounds": 2}
    directory = run({key: value for key, value in settings.items() if key != "prompt-template"}, **more)
    before, *_, after = directory.read_rounds()
    assert after["loss"] < before["loss"]
    assert after["accuracy"] > 0.9
    assert not (directory.path / "samples.jsonl").exists()
    begun = launch_model(llama)
    weights = load_file(directory.path / "model.safetensors")
    assert not torch.equal(weights["score.weight"], begun["score.weight"])
    assert torch.equal(weights["model.embed_tokens.weight"], begun["model.embed_tokens.weight"])

    exported = export(directory.path, "peft")
    assert exported.report["whole_modules"] == ["score.weight"]
    again = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(exported.path / "base"), exported.path
    )
    tokens = torch.tensor([[5, 40, 41, 42, 43]])
    whole = AutoModelForSequenceClassification.from_pretrained(export(directory.path, "merged").path)
    torch.testing.assert_close(again(tokens).logits, whole(tokens).logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.state_dict()["score.weight"], weights["score.weight"])


def launch_model(name):
    return PretrainedFactory(name, "classification", 2)().state_dict()


REFUSED = {
    "no such directory": ({"model": "hf:./nowhere"}, "there is no directory"),
    "no model in it": ({"model": "hf:{folder}"}, "cannot be loaded"),
    "unknown network": ({"model": "cn"}, "model = 'cn' is not one of cnn, mlp"),
    "images": ({"dataset": "digits"}, "dataset = 'digits' has images"),
    "too long": ({"max-length": 4096}, "max-length = 4096 is more than the 256 tokens"),
    "no template": ({"prompt-template": "Q:"}, r"prompt-template = 'Q:' must be auto, alpaca"),
    "corrected steps": ({"accumulate-steps": 2, "proximal-mu": 0.1}, "accumulate-steps = 2 does not go with"),
    "rounded away": ({"base-precision": "nf4"}, "needs accumulate-into = 'stack', got 'merge'"),
    "weights in integers": ({"base-precision": "int8", "algorithm": "fedavg"}, "does not go with algorithm = 'fedavg'"),
    "settings of writers": ({"task": "classification", "packing": True}, "packing = True means nothing to task"),
    "kinds": ({"partitioner": "dirichlet", "label-column": "nothing"}, "deals out classes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_any_client_starts(settings, folder, case):
    more, message = REFUSED[case]
    more = {key: value.format(folder=folder) if isinstance(value, str) else value for key, value in more.items()}
    given = {**settings, **more}
    if given.get("algorithm") == "fedavg":
        given = {key: value for key, value in given.items() if key != "accumulate-every"}
    with pytest.raises(ValueError, match=message):
        launch.run(None, given, engine="in-process")
    assert not (Path(settings["output-dir"]) / "one").exists()


def test_settings_of_language_models_are_refused_for_other_networks(tmp_path):
    with pytest.raises(ValueError, match="packing = True means nothing to model = 'cnn', only to hf: models"):
        launch.run(None, {"packing": True, "output-dir": str(tmp_path)}, engine="in-process")


def test_a_run_of_digits_does_without_transformers(tmp_path):
    script = (
        "import sys\n"
        "from fedloru_flwr import launch\n"
        f"settings = {{'num-server-rounds': 1, 'num-clients': 4, 'local-epochs': 1, 'output-dir': {str(tmp_path)!r}}}\n"
        "launch.run(None, settings, engine='in-process')\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=120)


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'fedloru-flwr\[llm\]'"):
        pretrained.library()


ROOT = Path(__file__).parents[2]
CONF = sorted((ROOT / "conf").glob("llm-llama-*.toml"))


@pytest.mark.parametrize(
    ("rounds", "share", "bound"), [(1, 0.1, 0.5), pytest.param(8, 0.5, 0.1, marks=pytest.mark.slow)]
)
def test_the_small_language_model_learns_to_follow_instructions(rounds, share, bound, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    settings = {
        **read_config_file(ROOT / "conf" / "llm-tiny.toml"),
        "num-server-rounds": rounds,
        "fraction-train": share,
        "exact-match-samples": 0 if rounds == 1 else 100,
        "generated-samples": 1,
        "output-dir": str(tmp_path),
        "run-name": "tiny",
    }
    found = perplexities(run(settings))
    assert found[-1] < bound * found[0]
    assert len((tmp_path / "tiny" / "samples.jsonl").read_text().splitlines()) == 2
    if rounds > 1:
        last = json.loads((tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["ledger_version"] == 1
        assert last["metrics"]["exact_match"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("path", CONF, ids=lambda path: path.name)
def test_the_settings_for_large_models_run_on_a_tiny_one(path, settings, chatty, tmp_path):
    given = read_config_file(path)
    assert str(given["dataset"]).startswith("hub:")
    assert str(given["model"]).startswith("hf:meta-llama/")
    hub = tmp_path / "alpaca"
    hub.mkdir()
    Dataset.from_list(instructions(60)).to_parquet(str(hub / "train-00000-of-00001.parquet"))
    tiny = {
        "model": f"hf:{chatty}",
        "dataset": f"hub:{hub}",
        "max-length": 96,
        "num-clients": 3,
        "fraction-train": 0.5,
        "num-server-rounds": 2,
        "accumulate-every": 1,
        "learning-rate": 0.02,
        "rank": 2,
        "test-fraction": 0.1,
        "generated-samples": 1,
        "max-new-tokens": 2,
        "output-dir": settings["output-dir"],
    }
    if given["base-precision"] in ("int8", "nf4"):
        pytest.importorskip("bitsandbytes")
    found = perplexities(run(given, **tiny))
    assert found[-1] < found[0]


@pytest.mark.slow
def test_a_run_on_flower_is_the_run_in_process(settings):
    own = perplexities(run(settings))
    summary = launch.run(
        None,
        {**settings, "run-name": "flower"},
        engine="flower",
        num_actors=1,
        num_supernodes=2,
        on_line=lambda _: None,
    )
    assert perplexities(RunDirectory.open(summary["run_dir"])) == own
