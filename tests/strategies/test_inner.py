"""The inner Flower strategy sees what it would see in plain Flower, and what it returns is the truth."""

import math
import random

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.exception import AggregationError
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAdagrad,
    FedAdam,
    FedAvgM,
    FedMedian,
    FedProx,
    FedTrimmedAvg,
    FedYogi,
    Krum,
    Strategy,
)
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords
from safetensors.torch import load_file
from toy_federation import (
    ConvNet,
    Mlp,
    Watch,
    WatchedGrid,
    client_app,
    descend,
    federate,
    own_machines,
    same,
    samples,
    seeded,
    serialised,
    task,
    usual,
)

from fedloru_flwr import wire
from fedloru_flwr.clients import LowRankSession
from fedloru_flwr.clients.mods import session_mod
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FedAvg, FedLoRU
from fedloru_flwr.strategies.inner import mean_metrics

KEYS = ["hidden.lora_A", "hidden.lora_B", "hidden.bias", "head.weight", "head.bias"]
FACTORS = KEYS[:2]
NET = seeded(Mlp)


class Recorder(Strategy):
    """Hands everything to the strategy it wraps and keeps copies of what went in and out."""

    def __init__(self, strategy):
        self.strategy = strategy
        self.given, self.contents, self.returned = [], [], []

    def configure_train(self, server_round, arrays, config, grid):
        self.given.append((dict(config), arrays.to_torch_state_dict()))
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.contents.append([dict(reply.content) for reply in replies])
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        self.returned.append(None if arrays is None else dict(arrays.to_torch_state_dict()))
        return arrays, metrics

    def configure_evaluate(self, server_round, arrays, config, grid):
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round, replies):
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self):
        self.strategy.summary()


def fedloru(inner, **more):
    arguments = {"rank": 2, "alpha": 3.0, "target_modules": "hidden", "accumulate_every": 2, **usual(), **more}
    return FedLoRU(NET, inner=inner, **arguments)


def as_float(tensors, keys=KEYS):
    return {key: tensors[key].float() for key in keys}


def test_the_inner_strategy_sees_the_trainables_and_nothing_else_sorted_by_client():
    inner = Recorder(FlowerFedAvg())
    configs = [{"partition-id": i, "client-id": name} for i, name in enumerate(["m", "10", "a", "9"])]
    grid = WatchedGrid(client_app(NET), 4, node_configs=configs, shuffle=random.Random(1))
    federate(fedloru(inner), grid, 2)

    config, given = inner.given[0]
    assert config == {"server-round": 1}
    assert list(given) == KEYS
    assert {tensor.dtype for tensor in given.values()} == {torch.float32}
    assert [given[key].shape for key in FACTORS] == [(2, 12), (10, 2)]
    for contents in inner.contents:
        # "10" < "9" < "a" < "m": the third node, then ... by the number of its examples.
        assert [content["metrics"]["num-examples"] for content in contents] == [7, 13, 10, 4]
        for content in contents:
            assert list(content) == ["arrays", "metrics"]
            assert isinstance(content["arrays"], ArrayRecord)
            assert isinstance(content["metrics"], MetricRecord)
            tensors = content["arrays"].to_torch_state_dict()
            assert list(tensors) == KEYS
            assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
            assert set(content["metrics"]) == {"train_loss", "num-examples"}


def test_the_inner_strategy_gets_fresh_factors_after_a_restart_and_dense_leaves_as_they_were():
    inner = Recorder(FlowerFedAvg())
    federate(fedloru(inner), WatchedGrid(client_app(NET), 4), 4)
    (_, first), (_, second), (_, third), (_, fourth) = inner.given
    assert same(dict(second), inner.returned[0])
    assert torch.equal(third["hidden.lora_B"], torch.zeros(10, 2))
    assert not torch.equal(third["hidden.lora_A"], first["hidden.lora_A"]), "every restart draws anew"
    assert not torch.equal(third["hidden.lora_A"], inner.returned[1]["hidden.lora_A"])
    assert same({key: third[key] for key in KEYS[2:]}, {key: inner.returned[1][key] for key in KEYS[2:]})
    assert same(dict(fourth), inner.returned[2])


def test_the_sum_does_not_depend_on_the_order_in_which_replies_arrive():
    models = []
    for order in (None, random.Random(1), random.Random(2)):
        strategy = fedloru(None)
        federate(strategy, WatchedGrid(client_app(NET), 4, shuffle=order), 3)
        models.append(strategy.merged_state_dict())
    assert same(models[0], models[1])
    assert same(models[0], models[2])


INNERS = {
    "FedAdam": lambda: FedAdam(eta=0.05),
    "FedYogi": lambda: FedYogi(eta=0.05),
    "FedAdagrad": lambda: FedAdagrad(eta=0.05),
    "FedAvgM": lambda: FedAvgM(server_learning_rate=0.7, server_momentum=0.5),
    "FedMedian": FedMedian,
    "FedTrimmedAvg": lambda: FedTrimmedAvg(beta=0.25),
    "Krum": lambda: Krum(num_malicious_nodes=1),
    "DP": lambda: DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 0.2, 0.5, num_sampled_clients=4),
}


@pytest.mark.parametrize("name", INNERS)
def test_the_ledger_and_the_model_hold_what_the_inner_strategy_returned(name):
    inner = Recorder(INNERS[name]())
    strategy = fedloru(inner)
    federate(strategy, WatchedGrid(client_app(NET), 4), 5)
    first, second = strategy.state.ledger.entries
    assert same(dict(first.adapter), as_float(inner.returned[1], FACTORS))
    assert same(dict(second.adapter), as_float(inner.returned[3], FACTORS))
    assert same(dict(strategy.state.trainables), as_float(inner.returned[4]))

    weight = NET().hidden.weight.detach()
    for returned in (inner.returned[1], inner.returned[3], inner.returned[4]):
        weight = weight + 1.5 * (returned["hidden.lora_B"].float() @ returned["hidden.lora_A"].float())
    torch.testing.assert_close(strategy.merged_state_dict()["hidden.weight"], weight)
    assert torch.equal(strategy.merged_state_dict()["head.weight"], inner.returned[4]["head.weight"].float())
    assert {tensor.dtype for _, given in inner.given for tensor in given.values()} == {torch.float32}


def test_the_noise_of_differential_privacy_is_in_the_ledger():
    noisy = DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 1000.0, 0.1, num_sampled_clients=4)
    strategy = fedloru(noisy, accumulate_every=1)
    federate(strategy, WatchedGrid(client_app(NET), 4), 1)
    entry = strategy.state.ledger.entries[0].adapter
    assert entry["hidden.lora_B"].abs().max() > 5, "noise of deviation 25, on factors that were 0"


def test_running_statistics_under_differential_privacy_are_refused_with_what_to_do():
    private = DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 1.0, 0.1, num_sampled_clients=4)
    with pytest.raises(ValueError, match=r"running statistics \(of after, norm\).*use GroupNorm"):
        FedLoRU(seeded(ConvNet), rank=2, inner=private, **usual())


def test_what_is_kept_of_a_private_round_is_noisy(tmp_path):
    """Nothing on the server's disk holds the mean without its noise, which only the inner strategy has seen."""
    inner = DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 1000.0, 0.1, num_sampled_clients=4)
    seen, public, aggregate, configure = [], [], inner.strategy.aggregate_train, inner.configure_train

    def watch_sent(server_round, arrays, config, grid):
        public.append({key: array.numpy().copy() for key, array in arrays.items()})
        return configure(server_round, arrays, config, grid)

    def watch(server_round, replies):
        arrays, metrics = aggregate(server_round, replies)
        seen.append({key: array.numpy().copy() for key, array in arrays.items()})
        return arrays, metrics

    inner.configure_train, inner.strategy.aggregate_train = watch_sent, watch
    strategy = fedloru(inner, accumulate_every=2, run_dir=tmp_path / "run", checkpoint_every=1)
    federate(strategy, WatchedGrid(client_app(NET), 4), 3)
    assert len(seen) == 3
    kept = list((tmp_path / "run").rglob("*.safetensors"))
    assert len(kept) >= 4

    def values(many):
        return {value for arrays in many for array in arrays.values() for value in array.ravel().tolist()}

    # What no client moved, for the noise has saturated its model, comes back as it was sent.
    secret = values(seen) - values(public) - {0.0}
    assert len(secret) > 60
    for path in kept:
        for tensor in load_file(path).values():
            assert secret.isdisjoint(tensor.flatten().tolist()), path.name


def moved(strategy, before):
    return math.sqrt(sum(float((strategy.state.trainables[key] - before[key]).square().sum()) for key in before))


@pytest.mark.parametrize("adaptive", [False, True])
def test_clients_that_clip_by_flowers_mods_move_the_model_by_no_more_than_the_norm(adaptive):
    if adaptive:
        inner = DifferentialPrivacyClientSideAdaptiveClipping(
            FlowerFedAvg(), 0.0, 4, initial_clipping_norm=0.01, clipped_count_stddev=0.0
        )
    else:
        inner = DifferentialPrivacyClientSideFixedClipping(FlowerFedAvg(), 0.0, 0.01, 4)
    mods = [session_mod, adaptiveclipping_mod if adaptive else fixedclipping_mod]
    strategy = fedloru(inner, accumulate_every=0)
    before = dict(strategy.state.trainables)
    grid = WatchedGrid(client_app(NET, mods=mods), 4)
    federate(strategy, grid, 1)
    assert [row["failures"] for row in grid.watch.rows] == [{}]
    assert 0.001 < moved(strategy, before) <= 0.01 * (1 + 1e-5)


def test_noise_of_the_clients_own_follows_from_no_seed():
    def after():
        strategy = fedloru(FlowerFedAvg(), accumulate_every=0)
        mods = [session_mod, LocalDpMod(0.5, 0.01, 1.0, 1e-3)]
        grid = WatchedGrid(client_app(NET, mods=mods), 4)
        federate(strategy, grid, 2)
        assert [row["failures"] for row in grid.watch.rows] == [{}, {}]
        return strategy.merged_state_dict()

    assert not same(after(), after())


def test_what_noise_does_not_cover_is_refused_or_not_kept(tmp_path):
    def private():
        return DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 0.1, 1.0, num_sampled_clients=4)

    class Own(DifferentialPrivacyServerSideFixedClipping):
        """A user's."""

    with pytest.raises(ValueError, match="cannot be combined with scaffold=True: control variates are clients'"):
        fedloru(private(), scaffold=True)
    with pytest.raises(ValueError, match="running statistics"):
        FedLoRU(seeded(ConvNet), rank=2, inner=Own(FlowerFedAvg(), 1.0, 0.1, num_sampled_clients=4), **usual())
    strategy = fedloru(private(), run_dir=tmp_path / "run", checkpoint_every=1)
    federate(strategy, WatchedGrid(client_app(NET), 4), 2)
    rows = RunDirectory(tmp_path / "run").read_rounds()
    assert all("aggregation_error" not in row for row in rows)
    assert RunDirectory(tmp_path / "run").latest_checkpoint().state["memory"]["norms"] == []


def test_an_update_of_nothing_does_not_end_a_private_round():
    inner = DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(), 1.0, 0.01, num_sampled_clients=4)
    strategy = fedloru(inner)

    def idle(reply, low_rank):
        if low_rank.client == "2":
            reply.content["arrays"] = wire.to_record(strategy.state.trainables)
        return reply

    grid = WatchedGrid(client_app(NET, tamper=idle), 4)
    federate(strategy, grid, 2)
    assert [set(row["failures"]) for row in grid.watch.rows] == [{"2"}, {"2"}]
    assert "update is zero" in grid.watch.rows[0]["failures"]["2"]


def test_server_momentum_steps_from_the_factors_that_were_sent_not_from_those_before_a_restart():
    inner = Recorder(FedAvgM(server_learning_rate=0.5, server_momentum=0.0))
    federate(fedloru(inner), WatchedGrid(client_app(NET), 4), 3)
    weights = [content["metrics"]["num-examples"] for content in inner.contents[2]]
    for key in KEYS:
        replies = [content["arrays"].to_torch_state_dict()[key] for content in inner.contents[2]]
        mean = sum(w / sum(weights) * reply for w, reply in zip(weights, replies, strict=True))
        halfway = (inner.given[2][1][key] + mean) / 2
        torch.testing.assert_close(inner.returned[2][key], halfway)


class NothingAtTwo(FlowerFedAvg):
    def aggregate_train(self, server_round, replies):
        return (None, None) if server_round == 2 else super().aggregate_train(server_round, replies)


def test_a_round_without_a_result_changes_and_accumulates_nothing():
    strategy, states = fedloru(NothingAtTwo()), {}

    def note(server_round, _):
        states[server_round] = strategy.state

    result = federate(strategy, WatchedGrid(client_app(NET), 4), 4, evaluate_fn=note)
    assert same(dict(states[2].trainables), dict(states[1].trainables))
    assert (states[2].server_round, states[2].ledger.version) == (2, 0)
    assert not same(dict(states[3].trainables), dict(states[2].trainables)), "and the run goes on from there"
    assert states[4].ledger.version == 1
    assert sorted(result.train_metrics_clientapp) == [1, 3, 4]


def test_a_round_whose_replies_are_all_bad_changes_and_accumulates_nothing():
    def spoil_second_round(reply, low_rank):
        if low_rank.server_round == 2:
            reply.content["metrics"]["num-examples"] = 0
        return reply

    strategy, states = fedloru(None, max_failure_fraction=1.0), {}

    def note(server_round, _):
        states[server_round] = strategy.state

    watch = Watch()
    federate(strategy, WatchedGrid(client_app(NET, tamper=spoil_second_round), 4, watch=watch), 3, evaluate_fn=note)
    assert same(dict(states[2].trainables), dict(states[1].trainables))
    assert states[3].ledger.version == 0
    assert [(row["clients_ok"], row["clients_failed"]) for row in watch.rows[1:]] == [(4, 0), (0, 4), (4, 0)]


def test_the_result_of_the_last_round_is_in_the_model_whether_it_is_accumulated_or_not():
    for rounds in (2, 3):
        inner = Recorder(FlowerFedAvg())
        strategy = fedloru(inner)
        federate(strategy, WatchedGrid(client_app(NET), 4), rounds)
        merged, last = strategy.merged_state_dict(), inner.returned[-1]
        assert torch.equal(merged["head.weight"], last["head.weight"])
        weight = NET().hidden.weight.detach()
        for returned in inner.returned[1:]:  # rounds 2 and, if there is one, 3
            weight = weight + 1.5 * returned["hidden.lora_B"] @ returned["hidden.lora_A"]
        torch.testing.assert_close(merged["hidden.weight"], weight)


def test_an_inner_strategy_that_returns_something_else_than_trainables_stops_the_run_by_name():
    class Broken(FlowerFedAvg):
        def __init__(self, change):
            super().__init__()
            self.change = change

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            tensors = arrays.to_torch_state_dict()
            self.change(tensors)
            return ArrayRecord(tensors), metrics

    changes = [
        lambda tensors: tensors.pop("head.bias"),
        lambda tensors: tensors.update({"head.bias": torch.zeros(1)}),
        lambda tensors: tensors["head.bias"].fill_(float("nan")),
    ]
    for change in changes:
        strategy = fedloru(Broken(change))
        with pytest.raises(AggregationError, match=r"inner strategy Broken did not return Trainables.*head\.bias"):
            federate(strategy, WatchedGrid(client_app(NET), 4), 1)
        assert strategy.state.server_round == 0


def test_a_placeholder_of_an_inner_strategy_that_wants_more_nodes_than_were_drawn_is_not_sent():
    inner = Recorder(FedMedian(min_train_nodes=4, min_available_nodes=9))
    grid = WatchedGrid(client_app(NET), 4)
    federate(fedloru(inner, fraction_train=0.25), grid, 2)
    assert len(grid.passed) == 2
    assert [len(contents) for contents in inner.contents] == [1, 1]


def test_flowers_own_fedavg_and_this_ones_give_the_same_model():
    def descend_on(model, partition):
        inputs, labels = samples(partition, NET.shape)
        return {"train_loss": descend(model, inputs, labels), "num-examples": len(labels)}

    plain = ClientApp()

    @plain.train()
    def train(message, context):
        model = NET()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        metrics = descend_on(model, int(context.node_config["partition-id"]))
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    drop_in = ClientApp()

    @drop_in.train()
    def train_drop_in(message, context):
        low_rank = LowRankSession(NET, message, context)
        return low_rank.reply(descend_on(low_rank.model, int(context.node_config["partition-id"])))

    class SortedGrid(WatchedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            return super().send_and_receive(sorted(messages, key=lambda m: m.metadata.dst_node_id), timeout=timeout)

        def _handle(self, message):
            return super(WatchedGrid, self)._handle(message)

    with task():
        flowers = FlowerFedAvg(fraction_evaluate=0.0).start(
            SortedGrid(plain, 4), ArrayRecord(NET().state_dict()), num_rounds=4
        )
    ours = FedAvg(NET, **usual())
    ours._keeps_replies = "Flower sums them one after the other"  # folded as they come, their mean has other last bits
    result = federate(ours, WatchedGrid(drop_in, 4), 4)
    assert same(ours.merged_state_dict(), dict(flowers.arrays.to_torch_state_dict()))
    assert same(dict(result.arrays.to_torch_state_dict()), dict(flowers.arrays.to_torch_state_dict()))
    assert {r: dict(m) for r, m in result.train_metrics_clientapp.items()} == {
        r: dict(m) for r, m in flowers.train_metrics_clientapp.items()
    }


def test_what_is_impossible_of_an_inner_strategy_is_refused_with_a_reason():
    with pytest.raises(ValueError, match=r"FedAdam has fraction_train=0.5: .* give fraction_train to that one"):
        fedloru(FedAdam(fraction_train=0.5))
    with pytest.raises(ValueError, match=r"fraction_evaluate=0\.3"):
        fedloru(DifferentialPrivacyServerSideFixedClipping(FlowerFedAvg(fraction_evaluate=0.3), 1.0, 1.0, 4))
    with pytest.raises(ValueError, match=r"fraction_train=0\.0"):
        fedloru(FlowerFedAvg(fraction_train=0.0))
    with pytest.raises(TypeError, match=r"must be an instance of .* got the class FedAdam"):
        fedloru(FedAdam)
    with pytest.raises(TypeError, match="got str"):
        fedloru("fedadam")
    with pytest.raises(ValueError, match=r"weighs replies by 'samples'.*give weighted_by_key='samples' here too"):
        fedloru(FlowerFedAvg(weighted_by_key="samples"))


def test_an_inner_strategy_may_leave_evaluation_out():
    grid = WatchedGrid(client_app(NET), 4)
    federate(fedloru(FlowerFedAvg(fraction_evaluate=0.0), fraction_evaluate=1.0), grid, 1)
    assert {passed.phase for passed in grid.passed} == {"train"}


def test_an_inner_strategys_settings_reach_the_clients(tmp_path):
    seen = []

    def look(reply, low_rank):
        seen.append(dict(low_rank._contact.message.content["config"]))
        return reply

    grid = WatchedGrid(client_app(NET, tamper=look), 4, node_configs=own_machines(tmp_path, 4))
    federate(fedloru(FedProx(proximal_mu=0.5)), grid, 1, train_config=ConfigRecord({"lr": 0.25}))
    assert {(c["proximal-mu"], c["lr"], c["server-round"]) for c in seen} == {(0.5, 0.25, 1)}


def test_metrics_are_averaged_as_flower_does_to_the_last_bit():
    rng = random.Random(0)
    metrics = [
        {"loss": rng.uniform(-9, 9), "n": rng.randint(1, 70), "right": rng.randint(0, 9), "each": [rng.random(), 2.0]}
        for _ in range(50)
    ]
    flowers = aggregate_metricrecords([RecordDict({"m": MetricRecord(dict(one))}) for one in metrics], "n")
    assert mean_metrics(metrics, "n") == dict(flowers)
    assert mean_metrics(metrics[:1], "n") == {key: metrics[0][key] for key in ("loss", "right", "each")}


def test_the_size_of_a_content_counts_equal_parts_once():
    once, twice = torch.ones(5), {"a": torch.ones(5), "b": torch.ones(5)}
    one, two = (serialised(RecordDict({"arrays": ArrayRecord(t)})) for t in ({"a": once}, twice))
    assert two - one < 200, "the second array is the same object"
