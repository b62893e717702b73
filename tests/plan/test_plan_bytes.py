"""A plan's bytes are those that a run of the same settings writes down, to the byte."""

import os

import pytest
import torch
from flwr.clientapp import ClientApp
from flwr.supercore.task_identity import TaskIdentity
from peft import LoraConfig, get_peft_model

from fedloru_flwr import launch, wire
from fedloru_flwr.clients import LowRankSession
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.data import DataSpec
from fedloru_flwr.engines.in_process import InProcessGrid
from fedloru_flwr.plan import plan
from fedloru_flwr.plan.rehearsal import Cast, Rehearsal
from fedloru_flwr.plan.subject import equal_leaves
from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FedLoRU, FedLoRUSeeded
from fedloru_flwr.workload import plain_network

SMALL = {
    "num-clients": 6,
    "num-server-rounds": 5,
    "fraction-train": 0.5,
    "local-epochs": 1,
    "batch-size": 64,
    "model": "mlp",
    "hidden": "32,24",
    "seed": 1,
    "aggregation-error": False,
}
OWN = {
    "fedloru": {"accumulate-every": 2},
    "pfedloru": {"local-epochs": 4, "accumulate-every": 2},
    "mfedloru": {"ranks": "2:0.5,4:0.5", "accumulate-every": 2},
    "hetlora": {"ranks": "2:0.5,4:0.5"},
    "fedpara": {"accumulate-every": 2},
    "rolora": {"accumulate-every": 3},
}
CASES = {
    "scaffold": {"algorithm": "fedloru", "scaffold": True, "accumulate-every": 2, "checkpoint-every": 2},
    "scaffold with fedavg": {"algorithm": "fedavg", "scaffold": True, "proximal-mu": 0.1},
    "client state over many rounds": {
        "algorithm": "pfedloru",
        "local-epochs": 4,
        "num-server-rounds": 12,
        "checkpoint-every": 3,
        "accumulate-every": 4,
        "fraction-evaluate": 0.5,
    },
    "evaluation now and then": {
        "algorithm": "fedloru",
        "reinit": "keep",
        "fraction-evaluate": 0.4,
        "evaluate-every": 2,
    },
    "coded": {
        "algorithm": "fedloru",
        "accumulate-every": 2,
        "uplink-codec": "int4, 3: int8",
        "downlink-codec": "int8",
        "fraction-evaluate": 0.4,
    },
    "coded, one-sided": {"algorithm": "fedloru-seeded", "uplink-codec": "int4", "downlink-codec": "int4"},
    "coded, other ranks": {"algorithm": "flexlora", "ranks": "2:0.5,4:0.5", "uplink-codec": "int8"},
    "a sparse downlink": {
        "algorithm": "fedloru",
        "accumulate-every": 3,
        "num-server-rounds": 9,
        "fraction-evaluate": 0.3,
        "uplink-codec": "topk:0.1+int4",
        "downlink-codec": "topk:0.1+float16",
    },
    "a sparse downlink after long absence": {
        "algorithm": "fedavg",
        "num-server-rounds": 14,
        "num-clients": 10,
        "fraction-train": 0.1,
        "downlink-codec": "topk:0.2+float16",
    },
    "stacked": {"algorithm": "fedloru", "accumulate-every": 2, "accumulate-into": "stack"},
    "entries and bases ahead": {
        "algorithm": "fedloru",
        "hidden": "700,700",
        "rank": 64,
        "accumulate-every": 1,
        "num-server-rounds": 8,
        "num-clients": 10,
        "fraction-train": 0.1,
    },
    "running statistics": {
        "algorithm": "fedloru",
        "model": "resnet10",
        "model-width": 8,
        "norm": "batch",
        "batch-size": 200,
        "num-clients": 3,
        "num-server-rounds": 2,
        "accumulate-every": 1,
    },
    "a network whose branches are added": {
        "algorithm": "fedavg",
        "model": "resnet10",
        "model-width": 8,
        "batch-size": 200,
        "num-clients": 3,
        "num-server-rounds": 2,
    },
    "one step a round": {"algorithm": "mfedloru", "ranks": "2:0.5,4:0.5", "batch-size": 512},
    "nested pairs after one step and after more": {
        "algorithm": "mfedloru",
        "hidden": "32,32,32",
        "ranks": "2:0.5,4:0.5",
        "batch-size": 512,
        "accumulate-every": 3,
        "nested-scale": 0.5,
    },
    "evaluation in training": {"algorithm": "fedloru", "evaluate-in-training": True, "accumulate-every": 2},
    "evaluation of personal models in training": {
        "algorithm": "pfedloru",
        "local-epochs": 4,
        "evaluate-in-training": True,
    },
    "evaluation in training without a global model": {"algorithm": "fedsa-lora", "evaluate-in-training": True},
    "a limit": {"algorithm": "fedloru", "max-total-bytes": 250_000, "fraction-evaluate": 0.5},
    "a server optimiser": {"algorithm": "ffa-lora", "server-optimizer": "fedadam", "model": "cnn"},
    "clients of many sizes": {
        "algorithm": "fedlora",
        "dataset": "glyphs",
        "glyph-samples": 1500,
        "partitioner": "dirichlet",
        "dirichlet-alpha": 0.2,
    },
}
LONG = {"client state over many rounds", "clients of many sizes", "entries and bases ahead", "running statistics"}
LIKE_OTHERS = {
    "a server optimiser",
    "evaluation now and then",
    "evaluation in training without a global model",
    "nested pairs after one step and after more",
    "scaffold with fedavg",
}


def leave_run(settings, tmp_path):
    launch.run(None, {**settings, "output-dir": str(tmp_path), "run-name": "run"}, engine="in-process")


def assert_planned(settings, tmp_path):
    run = RunDirectory.open(tmp_path / "run")
    rows, summary = [row for row in run.read_rounds() if row["round"] > 0], run.read_summary()
    planned = plan(None, settings).methods[0]
    for mine, row in zip(planned.rounds, rows, strict=True):
        assert mine.bytes_by_purpose == row["bytes_by_purpose"], row["round"]
        assert (mine.bytes_up, mine.bytes_down) == (row["bytes_up"], row["bytes_down"])
        assert (mine.clients, mine.ledger_version) == (row["clients_ok"], row["ledger_version"])
        assert mine.evaluated == row.get("clients_evaluated", 0)
    assert planned.trainable_parameters == summary["trainable_parameters"]
    assert planned.bytes_up == summary["total_bytes_up"]
    assert planned.stopped == (summary["status"] == "stopped")


pytestmark = pytest.mark.usefixtures("fresh_process", "quick_books")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_method_sends_what_was_planned(algorithm, tmp_path):
    settings = {**SMALL, **OWN.get(algorithm, {}), "algorithm": algorithm}
    leave_run(settings, tmp_path)
    assert_planned(settings, tmp_path)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.slow if case in LONG or case in LIKE_OTHERS else ()) for case in CASES],
)
def test_settings_send_what_was_planned(case, tmp_path):
    settings = {**SMALL, **CASES[case]}
    leave_run(settings, tmp_path)
    assert_planned(settings, tmp_path)


def test_a_run_that_was_stopped_and_goes_on_sends_what_was_planned_of_the_whole(tmp_path):
    settings = {**SMALL, "algorithm": "fedloru", "accumulate-every": 2}
    leave_run({**settings, "max-total-bytes": 100_000}, tmp_path)
    assert RunDirectory.open(tmp_path / "run").read_summary()["rounds"] < settings["num-server-rounds"]
    leave_run({**settings, "max-total-bytes": 0, "resume": "auto"}, tmp_path)
    assert_planned(settings, tmp_path)


def test_a_run_that_begins_with_an_adapter_sends_what_was_planned(tmp_path):
    settings = {**SMALL, "algorithm": "fedloru", "accumulate-every": 2, "num-server-rounds": 3}
    network = plain_network(RunConfig.from_mapping(settings), DataSpec((1, 8, 8), 10))()
    wrapped = get_peft_model(network, LoraConfig(r=2, target_modules=["layers.0"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    settings["init-adapter"] = str(tmp_path / "adapter")
    leave_run(settings, tmp_path)
    assert_planned(settings, tmp_path)
    with pytest.raises(ConfigError, match="is no directory"):
        plan(None, {**settings, "init-adapter": str(tmp_path / "none")})


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config)


def language_app():
    app = ClientApp()

    @app.train()
    def train(message, context):
        session = LowRankSession(tiny_llama, message, context)
        tokens = torch.randint(50, (4, 8))
        optimiser = torch.optim.AdamW([p for p in session.model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(2):
            optimiser.zero_grad()
            loss = session.model(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimiser.step()
        return session.reply({"train_loss": loss, "num-examples": 4})

    return app


class Watch:
    def __init__(self):
        self.rows = []

    def start_round(self, server_round, num_clients):
        pass

    def end_round(self, row):
        self.rows.append(row)


@pytest.mark.parametrize("strategy", [FedLoRU, FedLoRUSeeded])
@pytest.mark.parametrize("dense_leaves", [pytest.param("all", marks=pytest.mark.slow), "none"])
def test_a_language_model_sends_what_was_planned(strategy, dense_leaves):
    watch = Watch()

    def make(model, **more):
        return strategy(
            model,
            rank=2,
            accumulate_every=2,
            target_modules="q_proj,v_proj,down_proj",
            dense_leaves=dense_leaves,
            fraction_train=0.5,
            fraction_evaluate=0.0,
            **more,
        )

    real = make(tiny_llama, num_clients=4, observer=watch)
    before = (TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id)
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    try:
        real.start(InProcessGrid(language_app(), 4, {}), real.initial_arrays(), num_rounds=5)
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before
    cast = Cast(tuple("0123"), (4,) * 4, (1,) * 4, (2,) * 4, is_saved=False)
    planned = list(Rehearsal(make(tiny_llama), cast, 5).rounds())
    assert [one.bytes_by_purpose for one in planned] == [row["bytes_by_purpose"] for row in watch.rows]


def test_parameters_that_stay_equal_are_told_by_one_backward_pass():
    class Branches(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (torch.nn.Linear(3, 3) for _ in range(3))
            self.unused = torch.nn.Parameter(torch.zeros(3))
            for layer in (self.a, self.b, self.c):
                torch.nn.init.zeros_(layer.bias)

        def forward(self, x):
            return self.c(torch.relu(self.a(x) + self.b(x)))

    found = equal_leaves(Branches(), torch.empty(5, 3, device="meta"))
    assert found == {"a.bias": "a.bias", "b.bias": "a.bias", "unused": ""}


def test_a_client_that_was_away_is_sent_what_the_run_would_send_it():
    # One of ten clients a round: what a real client was sent when it came back is what is told of it.
    settings = {**SMALL, "num-clients": 10, "fraction-train": 0.1, "accumulate-every": 1, "num-server-rounds": 12}
    found = plan(None, {**settings, "algorithm": "fedloru"}).methods[0]
    new = found.catch_up[-1]
    assert (new.rounds, new.entries, new.as_base) == (11, 11, True)
    assert [one.entries for one in found.catch_up[:4]] == [1, 2, 3, 6]
    one = found.catch_up[0]
    by_purpose = [row.bytes_by_purpose["entries"]["down"] for row in found.rounds if "entries" in row.bytes_by_purpose]
    assert one.bytes <= min(by_purpose)
    assert wire.INLINE_LIMIT > one.bytes > 0


def test_nothing_is_written_and_nothing_is_left_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    plan(None, SMALL)
    assert list(tmp_path.iterdir()) == []
    assert dict(os.environ) == before
