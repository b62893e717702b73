"""What users of the strategies meet: arguments, hooks, results, the merged model."""

import logging

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    Result,
)
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from toy_federation import ConvNet, Mlp, WatchedGrid, client_app, descend, federate, same, samples, seeded, task, usual

from fedloru_flwr import wire
from fedloru_flwr.clients import LowRankSession
from fedloru_flwr.runs import ROUND_DEFAULTS, SUMMARY_KEYS, RunDirectory
from fedloru_flwr.strategies import FedAvg, FedLoRA, FedLoRU
from fedloru_flwr.strategies.state import fold_all

NET = seeded(ConvNet)
ALGORITHMS = {"fedavg": FedAvg, "fedlora": FedLoRA, "fedloru": FedLoRU}
EVERY = pytest.mark.parametrize("algorithm", list(ALGORITHMS))


def make(algorithm="fedloru", net=NET, **more):
    own = {} if algorithm == "fedavg" else {"rank": 2}
    if algorithm == "fedloru":
        own["accumulate_every"] = 2
    return ALGORITHMS[algorithm](net, **own, **usual(**more))


@EVERY
def test_a_foreign_wrapper_is_refused_and_told_to_turn_around(algorithm):
    strategy = make(algorithm)
    name = type(strategy).__name__
    wrapped = DifferentialPrivacyServerSideFixedClipping(strategy, 1.0, 1.0, 4)
    grid = WatchedGrid(client_app(NET), 4)
    with pytest.raises(RuntimeError, match=rf"{name} restarts .* Turn the two around: {name}\(Net, .*inner=Wrapper"):
        wrapped.start(grid, strategy.initial_arrays(), 1)
    arrays, config = strategy.initial_arrays(), ConfigRecord()
    for hook in (
        lambda: strategy.configure_train(1, arrays, config, grid),
        lambda: strategy.aggregate_train(1, []),
        lambda: strategy.configure_evaluate(1, arrays, config, grid),
        lambda: strategy.aggregate_evaluate(1, []),
    ):
        with pytest.raises(RuntimeError, match="cannot be wrapped by another strategy"):
            hook()
    assert grid.passed == []


@EVERY
def test_an_unknown_keyword_is_a_type_error_that_names_it(algorithm):
    with pytest.raises(TypeError, match="fraction_fit"):
        make(algorithm, fraction_fit=0.5)


def test_fedlora_does_not_take_arguments_of_accumulation():
    for arguments in ({"accumulate_every": 3}, {"accumulate_at": [4]}):
        with pytest.raises(ValueError, match="FedLoRA cannot accumulate: FedLoRA that accumulates is FedLoRU"):
            FedLoRA(NET, **arguments)
    assert not FedLoRA(NET, rank=2).schedule.accumulates
    with pytest.raises(TypeError, match="rank"):
        FedAvg(NET, rank=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fraction_train": 1.5}, r"fraction_train must be between 0 and 1, got 1\.5"),
        ({"fraction_train": 0.0}, "fraction_train is 0: nobody would train"),
        ({"fraction_evaluate": -0.1}, r"fraction_evaluate must be between 0 and 1, got -0\.1"),
        ({"max_failure_fraction": 2}, "max_failure_fraction must be between 0 and 1, got 2"),
        ({"checkpoint_every": 0}, "checkpoint_every must be at least 1 round, got 0"),
        ({"num_clients": 0}, "num_clients must be at least 1, got 0"),
        ({"reinit": "again"}, "reinit must be 'reset' or 'keep', got 'again'"),
        ({"accumulate_into": "heap"}, "accumulate_into must be 'merge' or 'stack', got 'heap'"),
        ({"accumulate_every": -1}, "accumulate_every must be at least 1 round .*, got -1"),
        ({"accumulate_at": [0, 3]}, r"accumulate-at must list rounds of at least 1, got \[0, 3\]"),
        ({"rank": 0}, "rank must be at least 1, got 0"),
        ({"rank": 500}, "no layer is left to factorise at rank 500"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        FedLoRU(NET, **{"rank": 2, **arguments})


def test_rounds_must_be_at_least_one():
    with pytest.raises(ValueError, match="num_rounds must be at least 1, got 0"):
        federate(make(), WatchedGrid(client_app(NET), 4), 0)


def test_accumulation_at_listed_rounds_happens_then_and_not_periodically():
    strategy = FedLoRU(NET, rank=2, accumulate_every=1, accumulate_at=[2, 5], **usual())
    grid = WatchedGrid(client_app(NET), 4)
    federate(strategy, grid, 5)
    versions = [row["ledger_version"] for row in grid.watch.rows]
    assert versions == [0, 1, 1, 1, 2]
    assert [row["accumulated_rank"] for row in grid.watch.rows] == [0, 2, 2, 2, 4]


def test_the_accumulated_rank_is_at_most_that_of_the_largest_layer():
    strategy = FedLoRU(NET, rank=3, target_modules="stem", accumulate_every=1, **usual())
    grid = WatchedGrid(client_app(NET), 4)
    federate(strategy, grid, 4)
    assert [row["accumulated_rank"] for row in grid.watch.rows] == [3, 6, 8, 8], "stem is 8 x 9"


def test_fedavgs_own_keywords_reach_the_default_inner_strategy():
    seen = []

    def own_mean(contents, key):
        seen.append((len(contents), key, list(contents[0])))
        return MetricRecord({"mine": 1.5})

    strategy = make(
        arrayrecord_key="weights",
        configrecord_key="settings",
        train_metrics_aggr_fn=own_mean,
        evaluate_metrics_aggr_fn=lambda contents, key: MetricRecord({"theirs": 2.5}),
        fraction_evaluate=1.0,
        min_evaluate_nodes=1,
    )
    plain = make()
    result = federate(strategy, WatchedGrid(client_app(NET), 4), 1)
    assert seen == [(4, "num-examples", ["weights", "metrics"])]
    assert dict(result.train_metrics_clientapp[1]) == {"mine": 1.5}
    assert dict(result.evaluate_metrics_clientapp[1]) == {"theirs": 2.5}
    plain._keeps_replies = "they are kept for metrics of one's own"
    federate(plain, WatchedGrid(client_app(NET), 4), 1)
    assert same(strategy.merged_state_dict(), plain.merged_state_dict())


def test_another_metric_may_weigh_the_replies():
    def app(trust):
        app = ClientApp()

        @app.train()
        def train(message, context):
            low_rank = LowRankSession(NET, message, context)
            descend(low_rank.model, *samples(context.node_config["partition-id"], NET.shape))
            return low_rank.reply({"trust": trust[context.node_config["partition-id"]]})

        return app

    models = {}
    for name, trust in {"equal": (1, 1, 1, 1), "one": (1e-9, 1e-9, 1e-9, 5.0)}.items():
        strategy = make(weighted_by_key="trust")
        federate(strategy, WatchedGrid(app(trust), 4), 1)
        models[name] = strategy.merged_state_dict()
    alone = make(num_clients=1)
    federate(alone, WatchedGrid(client_app(NET), 4, present=lambda _: {3}), 1)
    torch.testing.assert_close(models["one"], alone.merged_state_dict())
    assert (models["equal"]["head.weight"] - models["one"]["head.weight"]).abs().max() > 0.01


def test_at_least_so_many_train():
    grid = WatchedGrid(client_app(NET), 4)
    federate(make(fraction_train=0.25, min_train_nodes=3), grid, 2)
    assert grid.watch.drawn == [3, 3]


@EVERY
def test_central_evaluation_gets_a_plain_model_in_eval_mode_with_the_right_weights(algorithm):
    seen = {}

    def evaluate(server_round, model):
        assert type(model) is ConvNet
        assert not any(module.training for module in model.modules())
        assert type(model.hidden) is nn.Linear
        assert list(model.state_dict()) == list(NET().state_dict())
        assert same(dict(model.state_dict()), strategy.merged_state_dict())
        seen[server_round] = {name: value.clone() for name, value in model.state_dict().items()}
        return {"accuracy": torch.tensor(0.25 * server_round), "loss": 3 - server_round, "good": server_round > 1}

    strategy = make(algorithm)
    grid = WatchedGrid(client_app(NET), 4)
    result = federate(strategy, grid, 3, evaluate_fn=strategy.central_evaluation(evaluate))
    assert sorted(seen) == [0, 1, 2, 3]
    assert same(seen[0], dict(NET().state_dict()))
    assert not same(seen[1], seen[0])
    assert [row["round"] for row in grid.watch.rows] == [0, 1, 2, 3]
    assert [row["accuracy"] for row in grid.watch.rows] == [0.0, 0.25, 0.5, 0.75]
    assert [row["loss"] for row in grid.watch.rows] == [3, 2, 1, 0]
    assert [row["metrics"] for row in grid.watch.rows] == [{"good": 0.0}, {"good": 0.0}, {"good": 1.0}, {"good": 1.0}]
    assert dict(result.evaluate_metrics_serverapp[2]) == {"accuracy": 0.5, "loss": 1, "good": 1.0}


def test_central_evaluation_may_have_nothing_to_say():
    strategy = make()
    grid = WatchedGrid(client_app(NET), 4)
    result = federate(strategy, grid, 1, evaluate_fn=strategy.central_evaluation(lambda server_round, model: None))
    assert result.evaluate_metrics_serverapp == {}
    assert grid.watch.rows[1]["accuracy"] is None


def test_a_model_changed_by_an_evaluation_does_not_change_the_run():
    strategy, reference = make(), make()

    def destroy(server_round, model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        return {}

    federate(strategy, WatchedGrid(client_app(NET), 4), 2, evaluate_fn=strategy.central_evaluation(destroy))
    federate(reference, WatchedGrid(client_app(NET), 4), 2)
    assert same(strategy.merged_state_dict(), reference.merged_state_dict())


class Tied(nn.Module):
    shape = (12,)

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.middle = nn.Linear(12, 16)
        self.last = nn.Linear(16, 12)
        self.out = nn.Linear(12, 12)
        self.out.weight = self.first.weight

    def forward(self, x):
        return self.out(self.last(torch.relu(self.middle(self.first(x)))))


def of_dtype(net, dtype):
    def factory():
        return seeded(net)().to(dtype)

    factory.shape = net.shape
    return factory


class Casting(nn.Module):
    """Takes float32 inputs whatever its own dtype, and gives float32 outputs."""

    shape = (12,)

    def __init__(self):
        super().__init__()
        self.inside = Mlp()

    def forward(self, x):
        # PEFT keeps factors of half-precision layers in float32 and casts between them.
        return self.inside(x.to(self.inside.head.weight.dtype)).float()


MODELS = {
    "batch normalisation": NET,
    "tied weights": seeded(Tied),
    "float16": of_dtype(Casting, torch.float16),
    "bfloat16": of_dtype(Casting, torch.bfloat16),
    "float64": of_dtype(Casting, torch.float64),
}


@EVERY
@pytest.mark.parametrize("kind", MODELS)
def test_the_merged_model_has_the_keys_shapes_and_dtypes_of_the_plain_one(algorithm, kind, tmp_path):
    net = MODELS[kind]
    own = {} if algorithm == "fedavg" else {"rank": 2, "target_modules": "Linear", "alpha": 2.0}
    if algorithm == "fedloru":
        own["accumulate_every"] = 2
    if kind == "batch normalisation" and own:
        own["target_modules"] = "hidden"
    strategy = ALGORITHMS[algorithm](net, run_dir=tmp_path / "run", **own, **usual())
    start = net().state_dict()
    assert same(strategy.merged_state_dict(), dict(start)), "before the first round it is the plain model"
    federate(strategy, WatchedGrid(client_app(net), 4), 3)
    merged, plain = strategy.merged_state_dict(), net().state_dict()
    assert list(merged) == list(plain)
    assert {k: (v.shape, v.dtype) for k, v in merged.items()} == {k: (v.shape, v.dtype) for k, v in plain.items()}
    assert not any(torch.equal(merged[k], start[k]) for k in merged if k.endswith("weight"))
    if kind == "tied weights":
        assert torch.equal(merged["first.weight"], merged["out.weight"])
    if kind == "batch normalisation":
        assert merged["norm.num_batches_tracked"] == 0, "counters are not sent"
        assert not torch.equal(merged["norm.running_mean"], start["norm.running_mean"])
    model = net()
    model.load_state_dict(merged)
    assert same(dict(sorted(load_file(tmp_path / "run" / "model.safetensors").items())), dict(sorted(merged.items())))


def test_instances_in_bfloat16_get_their_base_over_the_wire():
    strategy = make(net=MODELS["bfloat16"])
    own = of_dtype(seeded(Casting, 77), torch.bfloat16)()
    own.shape = (12,)
    seen = []
    grid = WatchedGrid(client_app(own, seen=seen), 4)
    federate(strategy, grid, 1)
    assert grid.watch.rows[0]["clients_ok"] == 4
    assert {p.kind for p in grid.passed} == {"work", "base"}
    assert same(seen[0].base, dict(strategy._root_base))
    assert {tensor.dtype for tensor in seen[0].base.values()} == {torch.bfloat16}


def test_the_base_on_the_server_is_what_the_ledger_says():
    strategy = make()
    federate(strategy, WatchedGrid(client_app(NET), 4), 5)
    folded = fold_all(strategy._root_base, strategy.state.ledger.entries, strategy.plan, strategy.seed)
    assert same(folded, dict(strategy.state.base))
    assert strategy.state.ledger.version == 2
    assert same(dict(strategy._root_base), {k: v for k, v in NET().state_dict().items() if k in strategy.plan.base})


def test_federated_evaluation_is_averaged_by_the_number_of_examples():
    grid = WatchedGrid(client_app(NET), 4)
    strategy = make(fraction_evaluate=1.0)
    result = federate(strategy, grid, 2)
    losses = []
    model = NET()
    model.load_state_dict(strategy.merged_state_dict())
    model.eval()
    for client in range(4):
        inputs, labels = samples(client, NET.shape)
        losses.append(functional.cross_entropy(model(inputs), labels).item())
    expected = sum(loss * (4 + 3 * client) for client, loss in enumerate(losses)) / (4 + 7 + 10 + 13)
    assert result.evaluate_metrics_clientapp[2]["loss"] == pytest.approx(expected, rel=1e-4)
    assert grid.watch.rows[1]["loss"] == pytest.approx(expected, rel=1e-4)
    assert grid.watch.rows[1]["clients_evaluated"] == 4


def test_an_app_without_an_evaluate_function_turns_federated_evaluation_off(caplog):
    grid = WatchedGrid(client_app(NET, evaluates=False), 4)
    with caplog.at_level(logging.WARNING, logger="flwr"):
        result = federate(make(fraction_evaluate=1.0), grid, 3)
    assert sum(p.phase == "evaluate" for p in grid.passed) == 4, "asked once"
    assert [record.message for record in caplog.records if "evaluate function" in record.message] == [
        "the client app has no evaluate function: federated evaluation is off (fraction_evaluate=0)"
    ]
    assert result.evaluate_metrics_clientapp == {}
    assert [row.get("clients_evaluated", 0) for row in grid.watch.rows] == [4, 0, 0]


def test_initial_arrays_start_the_run_from_other_values():
    strategy = make()
    arrays = strategy.initial_arrays().to_torch_state_dict()
    assert list(arrays) == list(strategy.plan.trainable_keys)
    arrays["head.bias"] = torch.tensor([5.0, 6.0, 7.0], dtype=torch.float64)
    start = []
    grid = WatchedGrid(client_app(NET), 4)
    strategy.books.observer = grid.watch

    with task():
        strategy.start(
            grid, ArrayRecord(arrays), 1, evaluate_fn=lambda r, a: start.append(a.to_torch_state_dict()["head.bias"])
        )
    assert torch.equal(start[0], torch.tensor([5.0, 6.0, 7.0]))
    assert (start[1] > 4).all(), "and training went on from there"


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: arrays.pop("head.bias"),
        lambda arrays: arrays.update({"surplus": torch.ones(1)}),
        lambda arrays: arrays.update({"head.bias": torch.ones(1, 3)}),
    ],
)
def test_initial_arrays_that_are_not_the_trainables_are_refused_by_name(change):
    strategy = make()
    arrays = strategy.initial_arrays().to_torch_state_dict()
    change(arrays)
    with pytest.raises(ValueError, match=r"wrong or missing: (head\.bias|surplus)"):
        strategy.start(WatchedGrid(client_app(NET), 4), ArrayRecord(arrays), 1)


def test_a_whole_state_dict_as_initial_arrays_is_refused():
    with pytest.raises(ValueError, match="as initial_arrays"):
        make().start(WatchedGrid(client_app(NET), 4), ArrayRecord(NET().state_dict()), 1)


@EVERY
def test_the_result_is_flowers_and_holds_the_final_trainables(algorithm):
    strategy = make(algorithm, fraction_evaluate=1.0)
    evaluate = strategy.central_evaluation(lambda server_round, model: {"accuracy": server_round / 10})
    result = federate(strategy, WatchedGrid(client_app(NET), 4), 3, evaluate_fn=evaluate)
    assert isinstance(result, Result)
    assert same(dict(result.arrays.to_torch_state_dict()), dict(strategy.state.trainables))
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    assert set(result.train_metrics_clientapp[1]) == {"train_loss"}
    assert sorted(result.evaluate_metrics_clientapp) == [1, 2, 3]
    assert [result.evaluate_metrics_serverapp[r]["accuracy"] for r in range(4)] == [0.0, 0.1, 0.2, 0.3]


def test_the_observer_is_told_of_every_round_with_what_the_file_gets(tmp_path):
    strategy = make(run_dir=tmp_path / "run")
    grid = WatchedGrid(client_app(NET), 4)
    federate(strategy, grid, 3)
    assert grid.watch.drawn == [4, 4, 4]
    rows = RunDirectory(tmp_path / "run").read_rounds()
    assert [dict(row) for row in grid.watch.rows] == rows
    assert set(ROUND_DEFAULTS) <= set(rows[0])
    summary = RunDirectory(tmp_path / "run").read_summary()
    assert set(summary) == set(SUMMARY_KEYS)
    assert summary["total_bytes_up"] == sum(row["bytes_up"] for row in rows)
    assert summary["total_bytes_down"] == sum(row["bytes_down"] for row in rows)
    assert summary["trainable_parameters"] == sum(t.numel() for t in strategy.state.trainables.values())
    assert summary["model_parameters"] == sum(p.numel() for p in NET().parameters())
    assert (summary["algorithm"], summary["rounds"], summary["status"]) == ("fedloru", 3, "finished")
    assert summary["final_accuracy"] is None


def test_a_second_run_does_not_overwrite_the_first(tmp_path):
    federate(make(run_dir=tmp_path), WatchedGrid(client_app(NET), 4), 1)
    with pytest.raises(ValueError, match=r"holds a run already: choose another directory, or .* resume='auto'"):
        federate(make(run_dir=tmp_path), WatchedGrid(client_app(NET), 4), 1)


def test_without_a_run_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    federate(make(), WatchedGrid(client_app(NET), 4), 2)
    assert list(tmp_path.iterdir()) == []


def test_layers_that_get_no_gradient_are_told_of_once(caplog):
    class Idle(Mlp):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(20, 20)

    net = seeded(Idle)
    strategy = FedLoRU(net, rank=2, target_modules=["hidden", "unused"], **usual())
    with caplog.at_level(logging.WARNING, logger="flwr"):
        federate(strategy, WatchedGrid(client_app(net), 4), 3)
    told = [r.message for r in caplog.records if "on some clients" in r.message]
    assert told == ["these factorised layers got no gradient on some clients: unused"]


def test_the_summary_tells_what_travels(caplog):
    with caplog.at_level(logging.INFO, logger="flwr"):
        make().summary()
    text = "\n".join(record.message for record in caplog.records)
    assert "FedLoRU: " in text
    assert "factorised, rank 2: hidden (12, 32)" in text


def test_the_servers_instance_is_not_touched():
    instance = NET()
    before = {name: value.clone() for name, value in instance.state_dict().items()}
    strategy = make(net=instance)
    federate(strategy, WatchedGrid(client_app(NET), 4), 2)
    assert list(instance.state_dict()) == list(before)
    assert same(dict(instance.state_dict()), before)


def test_a_factory_is_built_under_the_runs_seed_and_leaves_the_generators_as_they_were():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    one, same_seed, other = (FedLoRU(ConvNet, rank=2, seed=seed) for seed in (5, 5, 6))
    assert torch.equal(torch.rand(3), expected)
    assert same(one.merged_state_dict(), same_seed.merged_state_dict())
    assert not same(one.merged_state_dict(), other.merged_state_dict())
    assert one.state.ledger.root == same_seed.state.ledger.root != other.state.ledger.root


def test_merge_and_stack_give_the_same_function_and_the_same_ledger_length():
    models = []
    for into in ("merge", "stack"):
        strategy = FedLoRU(NET, rank=2, accumulate_every=1, accumulate_into=into, **usual())
        federate(strategy, WatchedGrid(client_app(NET), 4), 6)
        models.append(strategy.merged_state_dict())
    for key, value in models[0].items():
        torch.testing.assert_close(value, models[1][key], rtol=1e-3, atol=1e-4)


def test_an_accumulation_with_reset_leaves_the_models_outputs_unchanged():
    outputs = {}
    inputs = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    for accumulates in (True, False):
        strategy = FedLoRU(NET, rank=2, accumulate_at=[3] if accumulates else [99], **usual())
        evaluate = strategy.central_evaluation(lambda r, model, a=accumulates: outputs.update({(r, a): model(inputs)}))
        federate(strategy, WatchedGrid(client_app(NET), 4), 3, evaluate_fn=evaluate)
    assert (outputs[3, True] - outputs[3, False]).abs().max() <= 1e-5
    assert (outputs[3, True] - outputs[2, True]).abs().max() > 1e-3


def test_flowers_default_key_names_are_on_the_wire():
    strategy = make()
    record = strategy.initial_arrays()
    assert isinstance(record, ArrayRecord)
    assert wire.ARRAYS == "arrays"
    assert wire.CONFIG == "config"
    assert FlowerFedAvg().arrayrecord_key == wire.ARRAYS
    assert FlowerFedAvg().configrecord_key == wire.CONFIG


def test_what_another_thread_draws_while_the_model_is_built_does_not_get_into_it():
    calls = []

    def disturbed():
        calls.append(1)
        if len(calls) == 1:
            torch.rand(3)  # as an app's own module does when it is imported meanwhile
        return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))

    alone = FedLoRU(lambda: nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), rank=2)
    assert FedLoRU(disturbed, rank=2).state.ledger.root == alone.state.ledger.root
    assert len(calls) == 3
