"""A bad reply is dropped with its reason, and the round is one in which that client was not drawn."""

import functools
import math
import random
import re

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp.exception import AggregationError
from safetensors.torch import load, save
from toy_federation import (
    RATE,
    ConvNet,
    WatchedGrid,
    client_app,
    federate,
    own_machines,
    same,
    seeded,
    set_header,
    usual,
)

from fedloru_flwr import wire
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.strategies import FedAvg, FedHM, FedLoRU, FlexLoRA, FLoRA, HetLoRA, MFedLoRU, RoLoRA
from fedloru_flwr.strategies.judging import (
    certain_norm,
    distance,
    is_finite,
    reject_absurd_updates,
    reject_odd_metrics,
)

NET = seeded(ConvNet)
BAD = "1"


def make(**more):
    return FedLoRU(NET, rank=2, target_modules=("stem", "hidden"), accumulate_every=2, **usual(**more))


def arrays(change):
    """A change to the Trainables of a reply."""

    def tamper(content):
        tensors = content["arrays"].to_torch_state_dict()
        content["arrays"] = ArrayRecord(change(tensors) or tensors)

    return tamper


def metrics(**changes):
    def tamper(content):
        values = {**content["metrics"], **{key.replace("_examples", "-examples"): v for key, v in changes.items()}}
        content["metrics"] = MetricRecord({key: value for key, value in values.items() if value is not None})

    return tamper


def statistics(change):
    def tamper(content):
        tensors = load(content["config"][wire.STATISTICS])
        content["config"][wire.STATISTICS] = save(change(tensors) or tensors)

    return tamper


def header(**changes):
    return lambda content: set_header(content, **changes)


def fill(name, value):
    """One number of a tensor becomes ``value``."""

    def change(tensors):
        tensors[name].view(-1)[-1] = value

    return change


def reorder(tensors):
    return dict(reversed(tensors.items()))


def raise_error(content):
    raise KeyError("the disk is full")


TENSOR = "hidden.lora_A"
TAMPERS = {
    "error": (raise_error, r"error 2: KeyError: .*the disk is full"),
    "NaN": (arrays(fill(TENSOR, math.nan)), f"{TENSOR} holds NaN or infinite"),
    "infinity": (arrays(fill("head.bias", -math.inf)), "head.bias holds NaN or infinite"),
    "missing key": (arrays(lambda t: t.pop(TENSOR) is None or t), rf"missing \['{TENSOR}'\], unexpected \[\]"),
    "extra key": (arrays(lambda t: {**t, "spy": torch.ones(1)}), r"missing \[\], unexpected \['spy'\]"),
    "another order": (arrays(reorder), "trainable tensors are in another order"),
    "broadcastable shape": (arrays(lambda t: {**t, TENSOR: t[TENSOR][:1]}), r"shape \(1, 32\), expected \(2, 32\)"),
    "transposed": (arrays(lambda t: {**t, TENSOR: t[TENSOR].T.contiguous()}), r"shape \(32, 2\), expected \(2, 32\)"),
    "half precision": (
        arrays(lambda t: {**t, TENSOR: t[TENSOR].half()}),
        "dtype torch.float16, expected torch.float32",
    ),
    "double precision": (arrays(lambda t: {**t, TENSOR: t[TENSOR].double()}), "dtype torch.float64, expected"),
    "integers": (arrays(lambda t: {**t, TENSOR: t[TENSOR].long()}), "dtype torch.int64, expected torch.float32"),
    "no array": (lambda content: content.pop("arrays"), "expected exactly one ArrayRecord, got 0"),
    "two arrays": (lambda c: c.update({"more": c["arrays"]}), "expected exactly one ArrayRecord, got 2"),
    "no metrics": (lambda content: content.pop("metrics"), "expected exactly one MetricRecord, got 0"),
    "two metrics": (lambda c: c.update({"more": c["metrics"]}), "expected exactly one MetricRecord, got 2"),
    "no config": (lambda content: content.pop("config"), "expected exactly one ConfigRecord, got 0"),
    "no header": (lambda content: content["config"].pop(wire.HEADER), "has no 'fedloru' header"),
    "spoilt header": (lambda c: c["config"].update({wire.HEADER: "{"}), "header does not parse"),
    "another version": (header(protocol=1), "protocol-version is 1, this side speaks 4"),
    "another lineage": (header(lineage="0" * 64), "it worked on lineage 000000000000, expected"),
    "no lineage": (header(lineage=""), "it worked on lineage unknown, expected"),
    "another round": (header(round=7), r"it answers round 7, expected round \d"),
    "a round that is no number": (header(round="1"), "header's round is a str"),
    "many bytes": (
        lambda c: c["config"].update({"more": b"x" * 3_000_000}),
        r"it has \d{7} bytes, more than the \d{7} that such a reply may have",
    ),
    "no client": (header(client=""), "does not say which client"),
    "silent layers not a list": (header(silent="all"), "list of silent layers is a str"),
    "no examples": (metrics(num_examples=0), "num-examples must be a positive number, got 0"),
    "negative examples": (metrics(num_examples=-3), "num-examples must be a positive number, got -3"),
    "NaN examples": (metrics(num_examples=math.nan), "num-examples must be a positive number, got nan"),
    "infinite examples": (metrics(num_examples=math.inf), "num-examples must be a positive number, got inf"),
    "absurdly many examples": (metrics(num_examples=2**60), "num-examples must be at most 9007199254740992, got"),
    "examples missing": (metrics(num_examples=None), "num-examples must be a positive number, got None"),
    "a list of examples": (metrics(num_examples=[4, 4]), r"num-examples must be a positive number, got \[4, 4\]"),
    "another metric": (metrics(extra=1.0), "its metrics are extra, num-examples, train_loss, those of most clients"),
    "a metric too few": (metrics(train_loss=None), "its metrics are num-examples, those of most"),
    "a metric as a list": (metrics(train_loss=[1.0, 2.0]), r"num-examples, train_loss \(2 numbers\), those of most"),
    "no statistics": (
        lambda c: c["config"].pop(wire.STATISTICS),
        r"statistics tensors: missing \['after.running_mean'",
    ),
    "spoilt statistics": (lambda c: c["config"].update({wire.STATISTICS: b"x"}), "statistics do not parse"),
    "NaN statistics": (
        statistics(fill("norm.running_var", math.nan)),
        "statistics tensor norm.running_var holds NaN",
    ),
    "statistics of another shape": (
        statistics(lambda t: {**t, "norm.running_var": torch.ones(1)}),
        r"norm.running_var has shape \(1,\), expected \(8,\)",
    ),
}


def spoil(tamper, of=BAD, server_round=None):
    def change(reply, low_rank):
        if low_rank.client == of and server_round in (None, low_rank.server_round):
            tamper(reply.content)
        return reply

    return change


@functools.cache
def without():
    """The strategy after two rounds in which the bad client was not there."""
    strategy = make(num_clients=3)
    federate(strategy, WatchedGrid(client_app(NET), 4, present=lambda _: {0, 2, 3}), 2)
    return strategy


@pytest.mark.parametrize("name", TAMPERS)
def test_a_bad_reply_is_dropped_with_its_reason_and_leaves_no_trace(name):
    tamper, reason = TAMPERS[name]
    strategy = make()
    grid = WatchedGrid(client_app(NET, tamper=spoil(tamper)), 4)
    federate(strategy, grid, 2)
    for row in grid.watch.rows:
        assert (row["clients_ok"], row["clients_failed"]) == (3, 1)
        assert list(row["failures"]) == [BAD]
        assert re.search(reason, row["failures"][BAD]), row["failures"][BAD]
    assert same(strategy.merged_state_dict(), without().merged_state_dict())
    assert strategy.state.ledger.lineage == without().state.ledger.lineage


@pytest.mark.parametrize("server_round", [1, 2, None], ids=["in the first round", "later", "always"])
def test_an_absurdly_large_update_is_dropped_and_leaves_no_trace(server_round):
    tamper = arrays(lambda tensors: {key: 1e6 * tensor + 1e6 for key, tensor in tensors.items()})
    grid = WatchedGrid(client_app(NET, tamper=spoil(tamper, server_round=server_round)), 4)
    strategy = make()
    federate(strategy, grid, 2)
    for row in grid.watch.rows:
        bad = server_round in (None, row["round"])
        assert (row["clients_ok"], row["clients_failed"]) == ((3, 1) if bad else (4, 0))
        if bad:
            assert re.fullmatch(
                r"its update's norm \S+e\+0\d is more than 100 times the usual \S+ \(max-norm-ratio, 0 lets "
                r"everything pass\)",
                row["failures"][BAD],
            )
    if server_round is None:
        assert same(strategy.merged_state_dict(), without().merged_state_dict())


@pytest.mark.parametrize("strategy_class", [FLoRA, FlexLoRA, FedHM, RoLoRA, MFedLoRU], ids=lambda one: one.__name__)
def test_absurdly_large_factors_are_noticed_whatever_the_server_makes_of_them(strategy_class):
    def enlarge(tensors):
        return {key: 1e6 * tensor if "lora_" in key else tensor for key, tensor in tensors.items()}

    grid = WatchedGrid(client_app(NET, tamper=spoil(arrays(enlarge), server_round=2)), 4)
    ranks = {"ranks": "2:0.5,1:0.5"} if strategy_class in (FLoRA, MFedLoRU) else {}
    federate(strategy_class(NET, rank=2, target_modules=("stem", "hidden"), **ranks, **usual()), grid, 3)
    assert [list(row["failures"]) for row in grid.watch.rows] == [[], [BAD], []]
    assert "max-norm-ratio" in grid.watch.rows[1]["failures"][BAD]


def test_how_large_is_absurd_is_a_setting_and_0_lets_everything_pass():
    tamper = arrays(lambda tensors: {key: 30 * tensor + 30 for key, tensor in tensors.items()})
    for ratio, failed in ((0.0, 0), (2.0, 1), (1e6, 0)):
        grid = WatchedGrid(client_app(NET, tamper=spoil(tamper, server_round=2)), 4)
        federate(make(max_norm_ratio=ratio), grid, 2)
        assert grid.watch.rows[1]["clients_failed"] == failed, ratio


def test_what_is_absurd_is_judged_by_the_rounds_before():
    norms = {"0": 1.0, "1": 1.2, "2": 90.0, "3": 0.9}
    reason = "its update's norm 90 is more than 10 times the usual 1.1 (max-norm-ratio, 0 lets everything pass)"
    assert reject_absurd_updates(norms, [0.5, 1.0, 40.0], 10) == {"2": reason}
    assert list(reject_absurd_updates(norms, [], 10)) == ["2"]
    assert reject_absurd_updates({"0": 1.0, "1": 900.0}, [], 10) == {}, "two alone: which is the odd one?"
    assert list(reject_absurd_updates({"1": 900.0}, [1.0], 10)) == ["1"]
    assert reject_absurd_updates(norms, [1.0], 0) == {}
    assert list(reject_absurd_updates(norms, [1e-6], 10)) == ["2"], "what most do is not absurd"
    assert reject_absurd_updates({"0": 900.0, "1": 800.0}, [1.0], 10) == {}, "nor is what all do"


def test_a_learning_rate_that_grows_from_nothing_loses_no_client():
    rates = iter([1e-9] * 4 + [RATE] * 8)

    class Warming(WatchedGrid):
        def _handle(self, message):
            self._app = client_app(NET, rate=next(rates))
            return super()._handle(message)

    grid = Warming(client_app(NET), 4)
    federate(make(), grid, 3)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0, 0, 0]


def test_numbers_of_no_sensible_size_do_not_end_a_run():
    huge = {"loss": 1.7e308, "accuracy": [0.5, 0.25], "num-examples": 4}

    def tamper(message, context):
        if message.metadata.message_type != "evaluate":
            return None
        order, client = wire.read_order(message), str(context.node_config["partition-id"])
        return wire.ReadyReply(
            wire.make_reply(order, client=client, metrics=MetricRecord(huge)),
            trained=False,
            arrays_key=order.arrays_key,
            config_key=order.config_key,
            reply_to=message,
        )

    grid = WatchedGrid(client_app(NET, before=tamper), 4)
    strategy = make(fraction_evaluate=1.0)
    federate(strategy, grid, 2)
    assert [(row["accuracy"], row["clients_failed"]) for row in grid.watch.rows] == [(None, 0), (None, 0)]


def test_what_a_client_says_of_a_dead_worker_counts_in_simulations_only():
    def dies(message, context):
        if context.node_config["partition-id"] == 1:
            told = "<class 'ray.exceptions.OutOfMemoryError'>:<'no memory'>"
            return Message(Error(ErrorCode.UNKNOWN, told), reply_to=message)
        return None

    grid = WatchedGrid(client_app(NET, before=dies), 4)
    federate(make(), grid, 2)
    assert [list(row["failures"]) for row in grid.watch.rows] == [["1"], ["1"]]


def test_a_node_that_is_gone_is_answered_for_by_the_superlink():
    """Its reply comes from the SuperLink's own node, and says only which message it is about."""

    def answer(message, about):
        reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=message)
        reply.metadata.__dict__.update(_src_node_id=1, _reply_to_message_id=about)
        return reply

    class Gone(WatchedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = super().send_and_receive(messages, timeout=timeout)
            (gone,) = [message for message in messages if message.metadata.dst_node_id == 1001]
            others = [reply for reply in replies if reply.metadata.src_node_id != 1001]
            return [answer(gone, gone.metadata.message_id), *others, answer(gone, "another round's")]

    grid = Gone(client_app(NET), 4)
    federate(make(), grid, 2)
    assert [row["failures"] for row in grid.watch.rows] == [{"1": "error 5: Node Unavailable"}] * 2


def test_clients_that_are_not_who_they_seemed_to_be_are_judged_by_their_own_orders():
    """Nodes that registered in another order than that of their names, and ranks by name."""
    configs = [{"partition-id": i} for i in (1, 0, 3, 2)]
    grid = WatchedGrid(client_app(NET), 4, node_configs=configs)
    ranks = {"0": 1, "1": 2, "2": 1, "3": 2}
    federate(HetLoRA(NET, rank=2, target_modules=("stem", "hidden"), ranks=ranks, **usual()), grid, 3)
    assert [row["failures"] for row in grid.watch.rows] == [{}] * 3


def test_a_client_that_claims_to_be_another_is_dropped():
    tamper = spoil(header(client="2"), server_round=2)
    grid = WatchedGrid(client_app(NET, tamper=tamper), 4)
    strategy = make()
    federate(strategy, grid, 3)
    assert [row["clients_ok"] for row in grid.watch.rows] == [4, 3, 4]
    assert grid.watch.rows[1]["failures"] == {BAD: "its SuperNode is client '1', and now says it is client '2'"}
    assert set(strategy._memory.held) == {"0", "1", "2", "3"}


def test_a_client_that_cannot_be_brought_to_the_lineage_is_dropped_and_says_so():
    def forgetful(message, context):
        if context.node_config["partition-id"] != 1:
            return None
        answer = wire.Answer("need-base", "1", "")
        return Message(wire.answer_content(wire.read_order(message), answer), reply_to=message)

    grid = WatchedGrid(client_app(NET, before=forgetful), 4)
    federate(make(), grid, 1)
    assert grid.watch.rows[0]["clients_ok"] == 3
    assert "could not be brought to the lineage" in grid.watch.rows[0]["failures"][BAD]


def test_a_client_that_cannot_take_a_supply_is_dropped_with_its_reason_and_not_asked_to_train(monkeypatch):
    monkeypatch.setattr(wire, "INLINE_LIMIT", 10)

    def no_room(message, context):
        if context.node_config["partition-id"] == 1 and wire.read_order(message).kind == "entries":
            raise OSError("no space left on device")

    grid = WatchedGrid(client_app(NET, before=no_room), 4)
    federate(make(), grid, 4)
    assert [row["clients_ok"] for row in grid.watch.rows] == [4, 4, 3, 3]
    assert grid.watch.rows[2]["failures"] == {BAD: "error 2: OSError: no space left on device"}
    assert [p.kind for p in grid.to(1, 3)] == ["entries"]
    assert [p.kind for p in grid.to(1, 4)] == ["entries"], "it is sent again, since it was not stored"
    assert [p.kind for p in grid.to(0, 4)] == ["work"]


def test_a_client_that_does_not_answer_in_time_is_dropped():
    class SilentGrid(WatchedGrid):
        def send_and_receive(self, messages, *, timeout=None):
            assert timeout is not None
            assert 0 < timeout <= 77
            return [r for r in super().send_and_receive(messages) if r.metadata.src_node_id != 1001]

    grid = SilentGrid(client_app(NET), 4)
    federate(make(), grid, 1, timeout=77)
    assert grid.watch.rows[0]["failures"] == {BAD: "no reply within 77 s"}


@pytest.mark.parametrize("bad", [{"1", "2", "3"}, {"1", "2"}])
def test_more_failures_than_allowed_stop_the_run_with_reasons_and_a_checkpoint(tmp_path, bad):
    def tamper(reply, low_rank):
        if low_rank.server_round == 3 and low_rank.client in bad:
            raise RuntimeError(f"out of memory on {low_rank.client}")
        return reply

    run_dir = tmp_path / "run"
    strategy = make(run_dir=run_dir)
    grid = WatchedGrid(client_app(NET, tamper=tamper), 4)
    if len(bad) == 2:  # half is not more than half
        federate(strategy, grid, 3)
        assert RunDirectory(run_dir).read_summary()["status"] == "finished"
        return
    with pytest.raises(AggregationError) as raised:
        federate(strategy, grid, 5)
    text = str(raised.value)
    assert text.startswith("round 3: 3 of 4 clients failed, more than max-failure-fraction = 0.5 allows.")
    assert "client 1: error 2: RuntimeError: out of memory on 1" in text
    run = RunDirectory(run_dir)
    assert run.latest_checkpoint()[0] == 3
    assert run.read_summary()["status"] == "failed"
    assert run.read_summary()["rounds"] == 3
    assert run.read_rounds()[-1]["failures"]["3"] == "error 2: RuntimeError: out of memory on 3"
    assert (run_dir / "model.safetensors").exists()

    again = make(run_dir=run_dir, resume="auto")
    federate(again, WatchedGrid(client_app(NET), 4), 5)
    assert [row["round"] for row in run.read_rounds()] == [1, 2, 3, 4, 5]


def test_a_first_round_that_fails_can_be_started_again(tmp_path):
    def tamper(reply, low_rank):
        raise RuntimeError("no")

    with pytest.raises(AggregationError, match="round 1: 4 of 4"):
        federate(make(run_dir=tmp_path / "run"), WatchedGrid(client_app(NET, tamper=tamper), 4), 2)
    again = make(run_dir=tmp_path / "run", resume="auto")
    grid = WatchedGrid(client_app(NET), 4)
    federate(again, grid, 2)
    assert [row["round"] for row in RunDirectory(tmp_path / "run").read_rounds()] == [1, 2]
    assert RunDirectory(tmp_path / "run").read_summary()["status"] == "finished"


def test_a_bad_evaluation_reply_is_left_out_and_the_run_goes_on():
    def sometimes(message, context):
        if message.metadata.message_type == "evaluate" and context.node_config["partition-id"] == 1:
            raise RuntimeError("no held-out data")

    grid = WatchedGrid(client_app(NET, before=sometimes), 4)
    result = federate(make(fraction_evaluate=1.0), grid, 2)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0, 0]
    assert grid.watch.rows[1]["loss"] == pytest.approx(result.evaluate_metrics_clientapp[2]["loss"])


def test_records_of_other_names_are_those_of_plain_flower_to_the_inner_strategy(tmp_path):
    """What a client calls its records does not matter: Flower would stop the run over it."""

    def rename(reply, low_rank):
        if low_rank.client == BAD:
            content = reply.content
            reply.content = RecordDict(
                {"weights": content["arrays"], "numbers": content["metrics"], "config": content["config"]}
            )
        return reply

    models = []
    for tamper in (None, rename):
        strategy = make()
        machines = own_machines(tmp_path / str(len(models)), 4)
        federate(strategy, WatchedGrid(client_app(NET, tamper=tamper), 4, node_configs=machines), 2)
        models.append(strategy.merged_state_dict())
    assert same(*models)


def test_most_clients_decide_which_metrics_are_odd():
    usual_ones = {"a": {"loss": 1.0, "n": 3}, "b": {"n": 2, "loss": 2.0}, "d": {"loss": [1.0], "n": 1}}
    assert reject_odd_metrics(usual_ones) == {"d": "its metrics are loss (1 numbers), n, those of most clients loss, n"}
    assert reject_odd_metrics({}) == {}


def test_full_rank_replies_are_judged_in_the_same_way():
    strategy = FedAvg(NET, **usual())
    tamper = spoil(arrays(lambda t: {**t, "head.bias": t["head.bias"][:1]}))
    grid = WatchedGrid(client_app(NET, tamper=tamper), 4)
    federate(strategy, grid, 1)
    assert grid.watch.rows[0]["failures"] == {BAD: "trainable tensor head.bias has shape (1,), expected (3,)"}


def test_a_metric_that_is_not_a_number_does_not_cost_the_reply():
    grid = WatchedGrid(client_app(NET, tamper=spoil(metrics(train_loss=math.nan))), 4)
    federate(make(), grid, 1, train_config=ConfigRecord())
    assert grid.watch.rows[0]["clients_ok"] == 4
    assert math.isnan(grid.watch.rows[0]["train_loss"])


def test_an_update_that_earlier_rounds_let_pass_is_refused_in_no_company():
    draw = random.Random(0)
    certain = 0
    for _ in range(3000):
        norms = {
            str(k): draw.choice([0.0, 1.0, 10.0 ** draw.uniform(-6, 6), math.inf]) for k in range(draw.randint(1, 7))
        }
        earlier = [draw.choice([0.0, 10.0 ** draw.uniform(-3, 3)]) for _ in range(draw.randint(0, 4))]
        ratio = draw.choice([0.0, 0.5, 1.0, 100.0])
        limit = certain_norm(earlier, ratio)
        passes = {client for client, norm in norms.items() if norm <= limit}
        certain += len(passes)
        assert passes.isdisjoint(reject_absurd_updates(norms, earlier, ratio))
    assert certain > 1000


def test_the_distance_is_that_of_all_numbers_together():
    one = {"a": torch.tensor([[1.0, 2.0]]), "b": torch.full((100_000,), 3.0), "c": torch.zeros(0)}
    other = {"b": torch.full((100_000,), 1.0), "a": torch.tensor([[4.0, 6.0]]), "c": torch.zeros(0), "d": torch.ones(9)}
    assert distance(one, other) == pytest.approx(math.sqrt(25 + 400_000))
    far = {"x": torch.tensor([3e38])}
    assert distance(far, {"x": -far["x"]}) == pytest.approx(6e38)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_none_is_found_and_sums_that_overflow_are_no_reason(odd):
    large = torch.full((1000,), 3e38)
    assert is_finite(large)
    assert is_finite(torch.cat([large, -large]))
    large[500] = odd
    assert not is_finite(large)
    assert not is_finite(torch.tensor([math.inf, -math.inf]))
    assert is_finite(torch.zeros(0))
