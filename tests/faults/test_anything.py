"""Whatever records come, what parses a message either takes them or says by its own error why not."""

import torch
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from hypothesis import given, settings
from hypothesis import strategies as st
from test_wire import CONTENTS, LINEAGE, STATISTICS, TENSORS
from toy_federation import Mlp, WatchedGrid, client_app, federate, seeded, task, usual

from fedloru_flwr import wire
from fedloru_flwr.clients.session import Contact, SessionAnswer
from fedloru_flwr.engines.in_process import InProcessGrid
from fedloru_flwr.store import Store
from fedloru_flwr.strategies import FedLoRU
from fedloru_flwr.strategies.judging import Expected, Rejected, judge, reject_odd_metrics

EXTRAS = {"control/b": torch.ones(3)}
NET = seeded(Mlp)


def contents():
    return CONTENTS.map(lambda records: RecordDict({str(index): record for index, record in enumerate(records)}))


def attempt(call, *errors):
    """What a call returns, and which of the errors it raises instead."""
    try:
        return call(), None
    except errors as error:
        return None, error


def reply_of(content):
    asked = Message(RecordDict({"config": ConfigRecord()}), 1, "train")
    return Message(content, reply_to=asked)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(contents() | st.text(max_size=100).map(lambda text: Error(2, text)), st.booleans())
def test_a_reply_of_any_records_is_refused_with_a_reason_or_is_what_was_asked_for(content, trained):
    with task():
        reply = reply_of(content)
    expected = Expected(LINEAGE, TENSORS if trained else None, STATISTICS, EXTRAS, "num-examples", 9)
    judged, reason = attempt(lambda: judge(reply, expected), Rejected)
    if reason:
        assert str(reason).strip()
        return
    assert (judged.lineage, judged.server_round) == (LINEAGE, 9)
    assert judged.metrics["num-examples"] > 0
    assert list(judged.tensors) == (list(TENSORS) if trained else [])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(contents())
def test_the_size_and_the_round_of_any_records_can_be_told(content):
    size, error = attempt(lambda: wire.content_bytes(content), ValueError)
    if error:
        assert "out of range" in str(error)  # nor could Flower send it
    else:
        assert 0 <= wire.extras_bytes(content) <= size
    server_round, error = attempt(lambda: wire.template_round(content), wire.WireError)
    assert error or isinstance(server_round, int)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(contents())
def test_a_client_that_is_sent_any_records_says_why_it_cannot_take_them(tmp_path_factory, content):
    store = Store(tmp_path_factory.mktemp("store"))
    with task():
        message = Message(content, 1000, "train")
        context = next(iter(InProcessGrid(None, 1, {})._contexts.values()))
        _, error = attempt(lambda: Contact(NET, message, context, store), SessionAnswer, ValueError)
    if isinstance(error, SessionAnswer):
        assert wire.find_answer(error.message) is not None
    else:
        assert error is None or str(error)


METRICS = st.dictionaries(
    st.text(max_size=3), st.integers() | st.floats() | st.lists(st.floats(), max_size=2), max_size=3
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.dictionaries(st.sampled_from("abcdef"), METRICS))
def test_what_is_left_of_any_metrics_has_one_shape(metrics):
    odd = reject_odd_metrics(metrics)
    left = [of for client, of in metrics.items() if client not in odd]
    assert bool(left) == bool(metrics)
    assert len({tuple(sorted((k, len(v) if isinstance(v, list) else -1) for k, v in of.items())) for of in left}) <= 1
    assert all(reason.startswith("its metrics are") for reason in odd.values())


def answers():
    """What a client might claim: other kinds and names, digests that are none, short or unknown, or that of W_0."""
    held = st.text("0123456789abcdef", max_size=70) | st.just("0" * 64) | st.just("root") | st.text(max_size=10)
    kinds = st.sampled_from(["need-base", "stored", "dance"])
    return st.tuples(kinds, st.sampled_from(["0", "1", "2", "x", ""]) | st.text(max_size=300), held)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(answers(), min_size=3, max_size=3))
def test_what_a_client_claims_to_hold_never_ends_a_run(claims):
    """Round after round, in the first of which nothing and in the last of which two entries are on the ledger."""
    strategy = FedLoRU(NET, rank=1, target_modules="hidden", accumulate_every=1, **usual(num_clients=3))

    def claim(message, context):
        if context.node_config["partition-id"] != 1:
            return None
        kind, client, held = claims[wire.read_order(message).server_round - 1]
        held = strategy.state.ledger.root if held == "root" else held
        told = f"fedloru-answer kind={kind} client={client} held={held}."
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, told), reply_to=message)

    grid = WatchedGrid(client_app(NET, before=claim), 3)
    federate(strategy, grid, 3)
    assert [list(row["failures"]) for row in grid.watch.rows] == [["1"]] * 3
    assert all(reason.strip() for row in grid.watch.rows for reason in row["failures"].values())
    assert all(len(held) <= 64 for held in strategy._memory.held.values())
