"""Runs whose messages are coded: everybody holds one model, the bytes are those told, nothing is lost for good."""

import json
import shutil

import pytest
import torch
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping, FedMedian
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from test_contract import EVERY, NET, R, make, may
from torch import nn
from toy_federation import (
    Mlp,
    WatchedGrid,
    client_app,
    each_its_own,
    federate,
    own_instances,
    own_machines,
    same,
    seeded,
    timeless,
)

from fedloru_flwr import wire
from fedloru_flwr.coding import RESIDUAL, Follow, Parcel, Step, decode_update, encode_update
from fedloru_flwr.lowrank import Codec, CodecError
from fedloru_flwr.lowrank.ledger import CODED, as_tensor
from fedloru_flwr.store import Store
from fedloru_flwr.strategies import FedAvg, FedLoRA, FedLoRU

BOTH = {"uplink_codec": "int8", "downlink_codec": "int8"}


def run(tmp_path, algorithm="fedloru", rounds=5, tamper=None, **more):
    seen = []
    grid = WatchedGrid(client_app(NET, seen=seen, tamper=tamper), 4, node_configs=own_machines(tmp_path / "disks", 4))
    strategy = make(algorithm, fraction_train=0.5, **more)
    federate(strategy, grid, rounds)
    return strategy, grid, seen


@EVERY
def test_every_algorithm_runs_coded_and_gives_the_same_twice(tmp_path, algorithm):
    strategy, grid, _ = run(tmp_path / "one", algorithm, rounds=3, **BOTH)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 3
    again, other, _ = run(tmp_path / "two", algorithm, rounds=3, **BOTH)
    assert same(strategy.merged_state_dict(), again.merged_state_dict())
    assert timeless(grid.watch.rows) == timeless(other.watch.rows)
    for passed in grid.passed:
        like = strategy._reply_like(wire.Work(half=passed.header.get("work", {}).get("half", "both")))
        numbers = Codec("int8").size(value.shape for value in like.values())
        if algorithm not in ("mfedloru", "hetlora"):  # whose clients' ranks differ
            assert numbers <= passed.reply_size <= numbers + 1300
    rows = grid.watch.rows
    assert sum(row["bytes_up"] for row in rows) == sum(passed.reply_size for passed in grid.passed)
    assert sum(row["bytes_down"] for row in rows) == sum(passed.size for passed in grid.passed)


@EVERY
def test_at_eight_bits_every_algorithm_learns_about_what_it_learns_at_thirty_two(tmp_path, algorithm):
    plain, _, _ = run(tmp_path / "plain", algorithm, rounds=3)
    coded, _, _ = run(tmp_path / "coded", algorithm, rounds=3, **BOTH)
    start, before, after = NET().state_dict(), plain.merged_state_dict(), coded.merged_state_dict()
    for key, value in start.items():
        learned = (before[key] - value).norm()
        assert (before[key] - after[key]).norm() <= 0.15 * learned + 1e-6, key


@pytest.mark.parametrize("algorithm", ["fedloru", "fedloru-seeded", "flora", "fedex-lora"])
@pytest.mark.parametrize("into", ["merge", "stack"])
def test_server_and_clients_hold_one_base_however_they_were_brought_to_it(tmp_path, algorithm, into):
    seen, bases = [], {}
    grid = WatchedGrid(client_app(NET, seen=seen), 4, node_configs=own_machines(tmp_path, 4))
    strategy = make(algorithm, fraction_train=0.5, downlink_codec="int4", accumulate_into=into)
    grid.watch.at_end = lambda row: bases.update({row["round"] + 1: dict(strategy.state.base)})
    federate(strategy, grid, 7)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 7
    assert strategy.state.ledger.version >= 3
    assert all(entry.codec == "int4" for entry in strategy.state.ledger.entries)
    if into == "merge":
        for look in seen:
            base = bases.get(look.server_round, strategy._root_base)
            assert same(look.base, {key: base[key] for key in look.base})


def test_an_entry_is_what_its_bytes_say_on_every_disk(tmp_path):
    strategy, _, _ = run(tmp_path, rounds=6, downlink_codec="int8")
    first = strategy.state.ledger.entries[0]
    found = [Store(tmp_path / f"disks/{client}").entry(first.digest) for client in range(4)]
    assert any(entry is not None for entry in found)
    for entry in filter(None, found):
        assert same(entry.adapter, first.adapter)
        assert entry.coded == first.coded
    shapes = {key: value.shape for key, value in first.adapter.items()}
    assert same(first.adapter, Codec("int8").decode(first.coded, shapes))


def test_an_accumulation_changes_the_function_by_what_the_codec_leaves_out_and_no_more(tmp_path):
    exact, _, _ = run(tmp_path / "exact", rounds=2, uplink_codec="float32")
    coded, _, _ = run(tmp_path / "coded", rounds=2, downlink_codec="int8, 2: int8")
    one, other = exact.state.ledger.entries[0].adapter, coded.state.ledger.entries[0].adapter
    for key, value in one.items():
        assert not torch.equal(value, other[key])
        assert (value - other[key]).abs().max() < 0.05 * value.abs().max()


# --- error feedback ---------------------------------------------------------------------------------------------------


def test_with_error_feedback_everything_arrives_in_the_end_and_without_it_never():
    """What arrives adds up to what was sent, but for one residual; without feedback most is never sent."""
    codec, generator = Codec("float32", keep=0.1), torch.Generator().manual_seed(0)
    direction = torch.rand(50, generator=generator) + 0.5
    sums = {}
    for feeds in (True, False):
        residual, total = {}, torch.zeros(50)
        for seed in range(200):
            sent = {"w": direction}
            arrays, arrives, left = encode_update(codec, sent, {}, residual, seed)
            assert same(arrives, decode_update(codec, arrays, sent, {}))
            residual = left if feeds else {}
            total += arrives["w"]
        sums[feeds] = total / 200
    assert (sums[True] - direction).abs().max() < 0.15
    assert (sums[False] == 0).sum() == 45
    assert (sums[False] - direction).abs().max() > 0.5


def accuracy_after(rounds, **more):
    """How far a run of many sparse rounds gets, by its training loss."""
    grid = WatchedGrid(client_app(NET, rate=0.1), 4)
    strategy = FedAvg(NET, num_clients=4, min_available_nodes=1, min_train_nodes=1, fraction_evaluate=0.0, **more)
    federate(strategy, grid, rounds)
    return grid.watch.rows[-1]["train_loss"]


@pytest.mark.slow
def test_a_sparse_run_with_error_feedback_gets_as_far_as_a_plain_one_and_without_it_does_not():
    plain = accuracy_after(80)
    fed, starved = (accuracy_after(80, uplink_codec="topk:0.03+int4", error_feedback=feeds) for feeds in (True, False))
    assert fed < plain + 0.08
    assert starved > fed + 0.08


def residuals(strategy, tmp_path, client):
    """What a client has left out, by group: the factors of a draw, and the dense leaves."""
    state = Store(tmp_path / f"disks/{client}").state(strategy._memory.token, client, strategy._memory.counted[client])
    return {key.removeprefix(RESIDUAL): value for key, value in state.items() if key.startswith(RESIDUAL)}


def test_a_residual_lives_as_long_as_the_factor_it_is_of(tmp_path):
    strategy, _, _ = run(tmp_path, rounds=5, uplink_codec="int4", accumulate_every=3)
    for client, last in strategy._memory.counted.items():
        found = residuals(strategy, tmp_path, client)
        assert set(found) == {"dense", str((last - 1) // 3)}
        assert all(bool(value.any()) for value in found.values())
    (entry,) = strategy.state.ledger.entries
    assert not entry.codec


def test_what_a_client_sends_is_its_update_and_what_it_left_out_before(tmp_path):
    """What arrived and what was left out are, together, what was trained: nothing is lost on the way."""
    trained = []

    def note(reply, low_rank):
        values = low_rank._adapted.read_values()
        trained.append((low_rank.client, {k: v.clone() for k, v in values.items()}))
        return reply

    strategy, _, _ = run(tmp_path, "fedlora", rounds=1, uplink_codec="int4", tamper=note)
    weights = torch.tensor([4.0 + 3 * int(client) for client, _ in trained])
    for group, keys in (("0", strategy.plan.factor_keys), ("dense", strategy.plan.dense_leaves)):
        after = torch.cat([strategy.state.trainables[key].flatten() for key in keys])
        arrived = [
            torch.cat([values[key].flatten() for key in keys]) - residuals(strategy, tmp_path, client)[group]
            for client, values in trained
        ]
        mean = sum(w * one for w, one in zip(weights, arrived, strict=True)) / weights.sum()
        assert torch.allclose(mean, after, atol=1e-6)


def test_a_client_that_lost_its_residual_goes_on_from_none_and_is_told_of(tmp_path):
    def lose(row):
        if row["round"] == 2:
            for states in (tmp_path / "disks").glob("*/states"):
                shutil.rmtree(states)

    grid = WatchedGrid(client_app(NET), 4, node_configs=own_machines(tmp_path / "disks", 4))
    grid.watch.at_end = lose
    strategy = make("fedlora", uplink_codec="int4")
    federate(strategy, grid, 4)
    assert [row.get("states_lost") for row in grid.watch.rows] == [None, None, ["0", "1", "2", "3"], None]
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 4


@pytest.mark.parametrize("algorithm", ["flexlora", "fedhm"])
def test_factors_that_are_other_ones_every_round_have_no_residual(tmp_path, algorithm):
    assert not may(algorithm, "feedback")
    with pytest.raises(ValueError, match="cannot be combined with error_feedback=True: a client's factors are other"):
        make(algorithm, uplink_codec="int8", error_feedback=True)
    strategy, _, _ = run(tmp_path, algorithm, uplink_codec="int8")
    assert not strategy.feedback


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"uplink_codec": "int9"}, "codec stage 'int9' is not known"),
        ({"error_feedback": True}, "means nothing with uplink_codec = 'float32'"),
        (
            {"uplink_codec": "int8", "inner": DifferentialPrivacyClientSideFixedClipping(FlowerFedAvg(), 1.0, 1.0, 2)},
            "its mod on the clients clips plain tensors",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_starts(more, told):
    with pytest.raises(ValueError, match=told):
        FedLoRU(NET, rank=R, **more)


def test_the_inner_strategy_sees_whole_trainables(tmp_path):
    strategy, grid, _ = run(tmp_path, "fedlora", inner=FedMedian(), **BOTH)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 5
    assert set(strategy.state.trainables) == set(make("fedlora").state.trainables)


def replaced(change):
    def tamper(reply, low_rank):
        if low_rank.client != "1":
            return reply
        (arrays,) = reply.content.array_records.values()
        (key,) = reply.content.array_records
        tensor = wire.to_tensors(arrays)[CODED]
        reply.content[key] = wire.to_record(change(tensor))
        return reply

    return tamper


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: {CODED: t[:-1]}, "bytes where int8 has"),
        (lambda t: {CODED: t.float()}, "expected one array 'coded' of bytes"),
        (lambda t: {"hidden.lora_A": t}, "expected one array 'coded' of bytes"),
        (lambda t: {CODED: torch.cat([as_tensor(b"\x00\x00\xc0\x7f"), t[4:]])}, "NaN or infinite"),
        (lambda t: {CODED: t.view(1, -1)}, "expected one array 'coded' of bytes"),
    ],
)
def test_a_malformed_reply_is_dropped_with_its_reason(tmp_path, change, told):
    grid = WatchedGrid(client_app(NET, tamper=replaced(change)), 4)
    strategy = make("fedlora", **BOTH)
    federate(strategy, grid, 2)
    for row in grid.watch.rows:
        assert list(row["failures"]) == ["1"]
        assert told in row["failures"]["1"]


# --- parcels ----------------------------------------------------------------------------------------------------------


def test_a_parcel_is_of_what_changed_since_the_draw_where_that_is_less():
    generator = torch.Generator().manual_seed(0)
    drawn = {"f": torch.randn(4, 30, generator=generator)}
    near = {"f": drawn["f"] + 0.01 * torch.randn(4, 30, generator=generator), "d": torch.randn(9, generator=generator)}
    far = {"f": torch.randn(4, 30, generator=generator) * 0.1, "d": near["d"]}
    for tensors, from_drawn in ((near, True), (far, False)):
        parcel = Parcel.packed(tensors, drawn, Codec("int8"), 0)
        assert parcel.from_drawn is from_drawn
        again = Parcel.labelled(json.loads(json.dumps(parcel.label())), parcel.arrays())
        opened = again.opened(drawn)
        assert list(opened) == list(tensors)
        scale = 0.01 if from_drawn else 0.1
        assert (opened["f"] - tensors["f"]).abs().max() < 0.05 * scale
        assert (opened["d"] - tensors["d"]).abs().max() < 0.05


@pytest.mark.parametrize(
    "label",
    [
        {},
        {"codec": "int8"},
        {"codec": "int8", "shapes": {"a": [-1]}, "drawn": False},
        {"codec": "int8", "shapes": [1], "drawn": False},
        {"codec": "huh", "shapes": {}, "drawn": False},
        {"codec": "int8", "shapes": {"a": ["x"]}, "drawn": False},
    ],
)
def test_a_label_of_something_else_is_refused(label):
    with pytest.raises(ValueError):
        Parcel.labelled(label, {CODED: as_tensor(b"1")})


class Double(nn.Module):
    shape = (12,)

    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(12, 10).double()
        self.head = nn.Linear(10, 3).double()

    def forward(self, x):
        return self.head(torch.relu(self.hidden(x.double())))


def test_a_run_of_double_precision_stays_double(tmp_path):
    net = seeded(Double)
    grid = WatchedGrid(client_app(net), 4)
    strategy = FedLoRA(net, rank=R, target_modules="hidden", num_clients=4, min_available_nodes=1, **BOTH)
    federate(strategy, grid, 3)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 3
    assert {value.dtype for value in strategy.state.trainables.values()} == {torch.float64}


def test_entries_of_a_one_sided_method_are_on_the_bill(tmp_path):
    _, grid, _ = run(tmp_path, "fedloru-seeded", rounds=6, uplink_codec="int4", downlink_codec="int4")
    entries = sum(row["bytes_by_purpose"].get("entries", {}).get("down", 0) for row in grid.watch.rows)
    assert 0 < entries == sum(passed.entries for passed in grid.passed)


# --- a sparse downlink ------------------------------------------------------------------------------------------------

SPARSE = {"uplink_codec": "topk:0.2+int8", "downlink_codec": "topk:0.2+int8"}


@EVERY
def test_a_sparse_downlink_works_or_is_refused_with_the_reason(tmp_path, algorithm):
    if not may(algorithm, "sparse") or not may(algorithm, "sparse-up"):
        with pytest.raises(ValueError, match=r"cannot be combined with (down|up)link_codec='topk"):
            make(algorithm, **SPARSE)
        return
    strategy, grid, _ = run(tmp_path / "one", algorithm, rounds=4, **SPARSE)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 4
    again, other, _ = run(tmp_path / "two", algorithm, rounds=4, **SPARSE)
    assert same(strategy.merged_state_dict(), again.merged_state_dict())
    assert timeless(grid.watch.rows) == timeless(other.watch.rows)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedloru", "lowrank-ef"])
def test_a_client_that_was_not_asked_is_sent_the_steps_it_lacks_and_holds_what_all_hold(tmp_path, algorithm):
    held, ends = [], {}

    def look(reply, low_rank):
        held.append((low_rank.server_round, dict(low_rank._contact.site.received)))
        return reply

    disks = own_machines(tmp_path, 4)
    grid = WatchedGrid(client_app(NET, tamper=look), 4, node_configs=disks, actor=each_its_own)
    strategy = make(algorithm, fraction_train=0.5, **SPARSE)
    grid.watch.at_end = lambda row: ends.update({row["round"]: dict(strategy.state.chain.y)})
    federate(strategy, grid, 8)
    for server_round, received in held:
        assert same(received, ends[server_round])
    assert max(len(passed.header["coded"]["steps"]) for passed in grid.passed) > 1
    assert all(passed.header["coded"]["start"] for passed in grid.passed), "a step is less than the whole"


def test_the_server_feeds_what_a_step_leaves_out_back_into_the_next(tmp_path):
    """What clients hold stays near what the server has, though most of each change is not sent."""
    strategy, _, _ = run(tmp_path, "fedavg", rounds=30, uplink_codec="float32", downlink_codec="topk:0.1+int8")
    x, y, start = strategy.state.trainables, strategy.state.chain.y, make("fedavg").state.trainables
    moved = sum(float((x[key] - start[key]).square().sum()) for key in x) ** 0.5
    apart = sum(float((x[key] - y[key]).square().sum()) for key in x) ** 0.5
    assert 0 < apart < 0.4 * moved


@pytest.mark.parametrize("algorithm", ["fedavg", "fedloru"])
def test_clients_that_lost_their_disks_are_sent_what_they_need_in_the_same_round(tmp_path, algorithm):
    """After an accumulation a client of FedLoRU needs both: the base, and what the Trainables are told from."""

    def lose(row):
        if row["round"] == 3:
            for client in (1, 2):
                shutil.rmtree(tmp_path / f"disks/{client}")
                grid.actors.pop(1000 + client)

    disks = own_machines(tmp_path / "disks", 4)
    grid = WatchedGrid(client_app(NET), 4, node_configs=disks, actor=each_its_own)
    grid.watch.at_end = lose
    strategy = make(algorithm, downlink_codec="topk:0.2+int8")
    federate(strategy, grid, 5)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 5
    assert "repeats" in grid.watch.rows[3]["bytes_by_purpose"]
    wholes = [passed.node for passed in grid.passed if "coded" in passed.header and not passed.header["coded"]["start"]]
    assert sorted(wholes) == [1, 2]


@pytest.mark.parametrize("algorithm", ["fedavg", "fedloru"])
def test_clients_with_weights_of_their_own_are_sent_the_whole_once(tmp_path, algorithm):
    app = client_app(own_instances(Mlp, 4))
    grid = WatchedGrid(app, 4, node_configs=own_machines(tmp_path / "disks", 4))
    strategy = make(algorithm, downlink_codec="topk:0.2+int8")
    federate(strategy, grid, 3)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 3
    wholes = [passed.node for passed in grid.passed if "coded" in passed.header and not passed.header["coded"]["start"]]
    assert sorted(wholes) == [0, 1, 2, 3]


def test_how_often_one_looks_does_not_change_the_training(tmp_path):
    models = []
    for share in (0.0, 1.0):
        grid = WatchedGrid(client_app(NET), 4, node_configs=own_machines(tmp_path / str(share), 4))
        strategy = make("fedavg", fraction_train=0.5, **{**SPARSE, "fraction_evaluate": share})
        federate(strategy, grid, 6)
        models.append(strategy.merged_state_dict())
    assert same(*models)


def test_a_run_that_starts_from_weights_given_sends_them_whole_at_first_contact(tmp_path):
    given = {key: value + 1 for key, value in make("fedavg").state.trainables.items()}
    seen = []

    def look(reply, low_rank):
        seen.append((low_rank.server_round, dict(low_rank._contact.site.received)))
        return reply

    grid = WatchedGrid(client_app(NET, tamper=look), 4, node_configs=own_machines(tmp_path, 4))
    strategy = make("fedavg", downlink_codec="topk:0.2+int8")
    strategy.initial_arrays = lambda: wire.to_record(given)
    federate(strategy, grid, 2)
    assert all(same(received, given) for server_round, received in seen if server_round == 1)


def test_a_sparse_downlink_may_begin_in_the_middle(tmp_path):
    _, grid, _ = run(tmp_path, "fedloru", rounds=7, downlink_codec="int8, 4: topk:0.2+int8")
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 7


@pytest.mark.parametrize("codec", ["float32, 3: int4", "int4, 2: float32, 4: int4"])
def test_residuals_survive_rounds_of_plain_numbers(tmp_path, codec):
    grid = WatchedGrid(client_app(NET), 4, node_configs=own_machines(tmp_path / "disks", 4))
    strategy = make("fedlora", uplink_codec=codec)
    federate(strategy, grid, 5)
    assert not any(row.get("states_lost") for row in grid.watch.rows)
    assert set(residuals(strategy, tmp_path, "1")) == {"0", "dense"}


def test_what_was_left_out_goes_with_a_round_of_plain_numbers(tmp_path):
    grid = WatchedGrid(client_app(NET), 4, node_configs=own_machines(tmp_path / "disks", 4))
    strategy = make("fedlora", uplink_codec="topk:0.1+int4, 3: float32")
    federate(strategy, grid, 3)
    assert all(float(value.abs().max()) < 1e-6 for value in residuals(strategy, tmp_path, "1").values())


def test_a_double_precision_model_needs_no_whole_either(tmp_path):
    net = seeded(Double)
    grid = WatchedGrid(client_app(net), 4, node_configs=own_machines(tmp_path / "disks", 4))
    strategy = FedLoRA(net, rank=R, target_modules="hidden", num_clients=4, min_available_nodes=1, **SPARSE)
    federate(strategy, grid, 2)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 2
    assert not any("repeats" in row["bytes_by_purpose"] for row in grid.watch.rows)


@pytest.mark.parametrize("shape", [[500_000_000], [20_000, 20_000, 20_000]])
@pytest.mark.parametrize("codec", ["topk:0.0001+int8", "int8", "int8+zstd"])
def test_a_few_bytes_do_not_become_gigabytes(shape, codec):
    label = {"codec": codec, "shapes": {"a": shape}, "drawn": 0}
    with pytest.raises(CodecError, match="cannot stand for"):
        Parcel.labelled(label, {CODED: as_tensor(bytes(10))}).opened({})


def test_steps_that_were_tampered_with_are_not_taken(tmp_path):
    follow = Follow("0" * 64, "0" * 64, "1" * 64, (Step(-1, "float32", bytes(8)),))
    arrays = {CODED: as_tensor(bytes(8))}
    again = Follow.labelled(json.loads(json.dumps(follow.label())), arrays)
    assert again == follow
    with pytest.raises(CodecError, match="do not lead where they should"):
        again.taken({"w": torch.zeros(2)}, lambda draw: {})
    for change in ({"end": "x"}, {"steps": [[0, "huh", 1]]}, {"steps": [[-2, "int8", 1]]}, {"steps": 3}):
        with pytest.raises(ValueError):
            Follow.labelled({**follow.label(), **change}, arrays)
