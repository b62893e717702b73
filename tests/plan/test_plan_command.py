"""The planner as people use it: tables, JSON, pictures, refusals; memory; large models."""

import io
import json
import subprocess
import sys
import time

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from fedloru_flwr.cli import app
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.plan import Bandwidth, plan
from fedloru_flwr.plan.command import show_plan
from fedloru_flwr.plan.picture import draw_plan
from fedloru_flwr.plan.planning import grouped
from fedloru_flwr.plan.report import as_tables
from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.runs.units import format_bytes
from fedloru_flwr.workload import check_init_adapter

SMALL = {
    "num-clients": 6,
    "num-server-rounds": 3,
    "local-epochs": 1,
    "batch-size": 16,
    "model": "mlp",
    "hidden": "32",
    "accumulate-every": 1,
}
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def shown(output="table", picture=None, **more):
    console = Console(file=io.StringIO(), width=140)
    found = show_plan(None, SMALL, output=output, picture=picture, bandwidths=["100/20"], console=console, **more)
    return found, console.file.getvalue()


def test_the_tables_tell_bytes_layers_memory_and_times():
    found, text = shown()
    for part in ("mlp on digits", "layers.0", "catching up", "activations (estimate)", "Transfer times", "100/20"):
        assert part in text, text
    assert f"{found.methods[0].trainable_parameters:,}" in text


def test_json_holds_every_figure():
    found, text = shown("json", all_methods=True)
    content = json.loads(text)
    assert content == json.loads(json.dumps(found.as_json()))
    by_name = {method["algorithm"]: method for method in content["methods"]}
    assert set(by_name) | set(content["refused"]) == set(ALGORITHMS)
    assert next(iter(by_name)) == "fedloru"
    rounds = by_name["fedavg"]["rounds"]
    assert sum(row["bytes_up"] for row in rounds) == by_name["fedavg"]["total_bytes_up"]
    assert by_name["fedlora"]["left_out"] == ["accumulate-every"]
    assert by_name["fedavg"]["total_bytes_up"] > by_name["fedlora"]["total_bytes_up"] > 0
    assert "takes two" in content["refused"]["rolora"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_the_picture_is_the_same_for_the_same_plan(tmp_path, suffix):
    files = [tmp_path / f"{name}.{suffix}" for name in ("one", "two")]
    for file in files:
        shown(picture=file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes().startswith(b"<?xml" if suffix == "svg" else b"\x89PNG")


def test_the_command_prints_json_and_refuses_with_status_two(tmp_path):
    conf = tmp_path / "conf.toml"
    conf.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in SMALL.items()))
    done = CliRunner().invoke(app, ["plan", str(conf), "--format", "json", "-c", "algorithm=fedloru-seeded"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["methods"][0]["algorithm"] == "fedloru-seeded"
    for arguments, told in (
        (["--format", "jsn"], "did you mean 'json'"),
        (["--bandwidth", "fast"], "DOWN/UP"),
        (["--picture", "plan.pdf"], ".svg or .png"),
        (["--picture", str(tmp_path / "none" / "plan.svg")], "there is no directory"),
        (["-c", "rnak=3"], "did you mean 'rank'"),
        (["--transformers", str(tmp_path)], "no configuration that can be read"),
    ):
        refused = CliRunner().invoke(app, ["plan", str(conf), *arguments])
        assert refused.exit_code == 2, arguments
        assert told in refused.stderr, refused.stderr


def test_a_method_that_cannot_do_what_is_asked_is_refused():
    with pytest.raises(ValueError, match="cannot be combined with clients of different ranks"):
        plan(None, {**SMALL, "ranks": "2:0.5,4:0.5"})


@pytest.mark.parametrize("text", ["", "10", "0/5", "1/2/3/4", "nan/1", "inf/1"])
def test_a_bandwidth_is_two_or_three_positive_numbers(text):
    with pytest.raises(ConfigError, match="DOWN/UP"):
        Bandwidth.parse(text)


def test_a_round_takes_as_long_as_its_slowest_client_or_the_server():
    found = plan(None, SMALL, bandwidths=[Bandwidth(100, 20), Bandwidth(100, 20, 0.001)])
    method = found.methods[0]
    slowest = [max(8e-6 * (down / 100 + up / 20) for down, up in one.of_clients) for one in method.rounds]
    assert method.transfers[0].run == pytest.approx(sum(slowest))
    assert method.transfers[0].longest_round == pytest.approx(max(slowest))
    assert method.transfers[1].run == pytest.approx(8e-6 * (method.bytes_up + method.bytes_down) / 0.001)


def test_what_a_client_sends_and_receives_adds_up_to_the_round():
    for one in plan(None, {**SMALL, "fraction-evaluate": 0.5}).methods[0].rounds:
        assert sum(down for down, _ in one.of_clients) == one.bytes_down
        assert sum(up for _, up in one.of_clients) == one.bytes_up


def test_the_memory_of_a_multilayer_perceptron_is_as_counted_by_hand():
    settings = {**SMALL, "hidden": "32,32", "algorithm": "fedlora", "accumulate-every": 0, "optimizer": "adamw"}
    method = plan(None, settings).methods[0]
    plain = 64 * 32 + 32 + 32 * 32 + 32 + 32 * 10 + 10
    factors = 4 * (64 + 32) + 4 * (32 + 32)
    trained = factors + 32 + 32 + 320 + 10
    assert method.trainable_parameters == trained
    assert method.client.weights == 4 * (plain + factors)
    assert method.client.gradients == 4 * trained
    assert method.client.optimizer == 8 * trained
    assert method.client.received == 4 * trained
    assert sum(layer.trainable for layer in method.layers) == trained
    batch = 16
    # Saved at least: the inputs, and the outputs of both ReLUs.
    assert method.client.activations >= 4 * batch * (64 + 32 + 32)
    assert method.client.total == sum(vars(method.client).values())


def test_estimated_activations_are_those_that_autograd_saves():
    from fedloru_flwr.config import RunConfig
    from fedloru_flwr.job import build_strategy, run_options
    from fedloru_flwr.models.functional import FunctionalModel
    from fedloru_flwr.plan.subject import subject_of

    config = RunConfig.from_mapping({**SMALL, "model": "cnn"})
    subject = subject_of(config)
    strategy = build_strategy(config, subject.model, **run_options(config))
    told = plan(None, {**SMALL, "model": "cnn"}).methods[0].client.activations
    layers = strategy.plan
    model = FunctionalModel(subject.model, layers.layers, layers.layout(), layers.dense_leaves)
    values = {key: tensor.clone().requires_grad_() for key, tensor in strategy.state.trainables.items()}
    base = {**model.buffers, **strategy.state.base}
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*values.values(), *base.values())}
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        outputs = model.forward(values, base, torch.randn(16, 1, 8, 8))
        torch.nn.functional.cross_entropy(outputs, torch.zeros(16, dtype=torch.long))
    real = sum(storage.nbytes() for place, storage in saved.items() if place not in weights)
    assert real == pytest.approx(told, rel=0.15)


def test_data_that_is_not_at_hand_is_taken_for_granted():
    unseen = {**SMALL, "dataset": "clients", "input-shape": "1,8,8", "num-classes": 10}
    found = plan(None, unseen, examples=30)
    assert any("30 samples" in told for told in found.assumptions)


def test_layers_that_differ_by_a_number_are_shown_as_one(tmp_path):
    small = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 100, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_3_8B, **small}))
    settings = {**SMALL, "target-modules": "q_proj,v_proj", "dense-leaves": "none"}
    method = plan(None, settings, transformers=tmp_path).methods[0]
    assert [(name, count) for name, count, _ in grouped(method.layers)] == [
        ("model.layers.*.self_attn.q_proj", 3),
        ("model.layers.*.self_attn.v_proj", 3),
    ]


def test_every_name_and_number_can_be_read_on_eighty_columns(tmp_path):
    # Full-sized layers have the widest numbers; two of them are enough.
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_3_8B, "num_hidden_layers": 2}))
    settings = {**SMALL, "target-modules": "q_proj,v_proj,down_proj", "dense-leaves": "none", "rank": 16}
    found = plan(None, {**settings, "batch-size": 1}, transformers=tmp_path, sequence_length=16)
    console = Console(file=io.StringIO(), width=80)
    console.print(as_tables(found), highlight=False)
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
    begin = next(number for number, line in enumerate(lines) if "what is trained" in line)
    end = next(number for number, line in enumerate(lines) if "catching up" in line)
    folded = "".join(line[1:].partition(" ")[0] for line in lines[begin:end])
    names = [name for name, _, _ in grouped(found.methods[0].layers)]
    assert len(names) == 3
    for name in names:
        assert name in folded
    for _, _, layer in grouped(found.methods[0].layers):
        assert any(f"{layer.trainable:,}" in line and f"{layer.parameters:,}" in line for line in lines)


def of_a_model(directory, configuration, sequence_length=16, **settings):
    (directory / "config.json").write_text(json.dumps(configuration))
    given = {"num-clients": 2, "num-server-rounds": 1, "batch-size": 2, "dense-leaves": "none", **settings}
    return plan(None, given, transformers=directory, sequence_length=sequence_length)


WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
BERT = {"model_type": "bert", "vocab_size": 50, "max_position_embeddings": 64, **WIDTHS}
VIT = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 16, "patch_size": 8, **WIDTHS}
T5 = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "d_model": 32, "d_kv": 16, "d_ff": 48}


def test_memory_of_which_a_part_is_unknown_is_told_as_more_than_the_rest(tmp_path):
    found = of_a_model(tmp_path, {**T5, "num_layers": 1, "num_heads": 2, "vocab_size": 50}, **{"target-modules": "q"})
    client = found.methods[0].client
    assert client.activations is None
    assert client.total is None
    assert client.at_least == client.weights + client.gradients + client.optimizer + client.received
    told = found.as_json()["methods"][0]["client_memory"]
    assert (told["total"], told["total_at_least"]) == (None, client.at_least)
    (why,) = (one for one in found.assumptions if "activations (?)" in one)
    assert "ValueError: You must specify" in why
    console = Console(file=io.StringIO(), width=100)
    console.print(as_tables(found), highlight=False)
    assert f"more than {format_bytes(client.at_least)}" in console.file.getvalue()
    pictures = []
    for one in (found, plan(None, SMALL)):
        draw_plan(one, tmp_path / "plan.svg")
        pictures.append("more than" in (tmp_path / "plan.svg").read_text())
    assert pictures == [True, False]


def test_images_are_planned_as_images(tmp_path):
    client = of_a_model(tmp_path, VIT, **{"target-modules": "q_proj,v_proj"}).methods[0].client
    assert client.activations > 4 * 2 * 3 * 16 * 16
    assert client.total == client.at_least


def test_more_tokens_than_the_model_can_take_are_refused(tmp_path):
    told = {**BERT, "architectures": ["BertForSequenceClassification"]}
    with pytest.raises(ConfigError, match=r"sequence-length = 65 is more than the 64 tokens .*: expected 1 to 64"):
        of_a_model(tmp_path, told, sequence_length=65, **{"target-modules": "query"})
    assert of_a_model(tmp_path, told, sequence_length=64, **{"target-modules": "query"}).methods[0].client.activations


def test_an_architecture_that_is_missing_or_unknown_is_told(tmp_path):
    for named, told in (([], "names no architecture"), (["MyBert"], "names 'MyBert', which the library does not have")):
        found = of_a_model(tmp_path, {**BERT, "architectures": named}, **{"target-modules": "query"})
        assert any("causal language model" in one and told in one for one in found.assumptions)
    with pytest.raises(ConfigError, match="no causal language model can be made of this configuration") as refusal:
        of_a_model(tmp_path, {"model_type": "resnet"})
    assert "\n" not in str(refusal.value)


def test_settings_that_a_transformers_model_makes_idle_are_named_and_an_adapter_must_be_there(tmp_path):
    told = {**BERT, "architectures": ["BertForSequenceClassification"]}
    found = of_a_model(tmp_path, told, hidden="7", dataset="glyphs", **{"target-modules": "query"})
    (idle,) = (one for one in found.assumptions if "without effect" in one)
    assert idle.endswith(": dataset, hidden")
    assert not any("without effect" in one for one in plan(None, SMALL).assumptions)
    with pytest.raises(ConfigError, match="is no directory"):
        of_a_model(tmp_path, told, **{"init-adapter": str(tmp_path / "none")})


def test_a_path_below_the_home_directory_is_one_for_every_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    paths = {"init-adapter": "~/one", "data-path": "~/two", "model": "hf:~/three"}
    given = RunConfig.from_mapping({"dataset": "local", **paths})
    assert (given.init_adapter, given.data_path) == (str(tmp_path / "one"), str(tmp_path / "two"))
    assert given.pretrained == str(tmp_path / "three")
    (tmp_path / "one").mkdir()
    check_init_adapter(given)


PLAN_LLAMA = """
import resource, socket, sys, time
from fedloru_flwr.plan import plan

def refuse(*_, **__):
    raise OSError("no network here")

socket.socket.connect = refuse
started = time.process_time()
settings = {"num-clients": 20, "fraction-train": 0.2, "num-server-rounds": 200, "rank": 16, "batch-size": 2,
            "target-modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "dense-leaves": "none"}
found = plan(None, settings, transformers=sys.argv[1])
method = found.methods[0]
print(found.model_parameters, method.trainable_parameters, method.client.weights, method.client.activations > 0)
print(time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
def test_a_llama_of_eight_billion_is_planned_from_its_configuration_alone(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", PLAN_LLAMA, str(path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    figures, cost = done.stdout.splitlines()[-2:]
    assert figures.split() == ["8030261248", "41943040", str(_weights()), "True"]
    seconds, kilobytes = map(float, cost.split())
    assert kilobytes < 2 * 1024**2
    assert seconds < 10 or time.monotonic() - began < 10


def _weights():
    """The model in bfloat16, its table of rotary frequencies (64 float32, kept twice), and factors in float32."""
    factors = 32 * 16 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    return 2 * 8_030_261_248 + 2 * 4 * 64 + 4 * factors
