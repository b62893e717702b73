"""What every algorithm of the registry keeps to: a new one without a row here fails."""

import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from flwr.app import ArrayRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvgM
from torch import nn
from torch.nn import functional
from toy_federation import (
    ConvNet,
    Mlp,
    Watch,
    WatchedGrid,
    client_app,
    federate,
    own_machines,
    same,
    samples,
    seeded,
    timeless,
    usual,
)

from fedloru_flwr import strategies
from fedloru_flwr.clients import LowRankSession, session
from fedloru_flwr.models.plan import PlanError
from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.store import Store
from fedloru_flwr.strategies.ranks import RankMap

NET, CONV = seeded(Mlp), seeded(ConvNet)
IN, OUT, DENSE, R = 12, 10, 10 + 33, 2  # of Mlp, whose layer ``hidden`` is factorised
RANKS = {"0": 1, "1": 2, "2": 3, "3": 2}


@dataclass(frozen=True)
class Row:
    """What is said of an algorithm.

    Attributes:
        up: numbers in a reply in rounds 1 and 2, beside the dense leaves (at rank ``R``, layer ``hidden``).
        down: numbers in an order of these rounds; None: as many as in the reply.
        error: what its aggregation error is: ``zero``, ``positive`` or ``none`` (unknown to the server).
        own: what a client keeps of its own.
        args: its arguments in these tests.
    """

    up: tuple[int, int]
    down: tuple[int, int] | None = None
    error: str = "positive"
    own: tuple[str, ...] = ()
    args: dict = field(default_factory=dict)


PAIR = (R * (IN + OUT),) * 2
ROWS = {
    "fedavg": Row((IN * OUT,) * 2, error="none"),
    "fedlora": Row(PAIR),
    "fedloru": Row(PAIR, args={"accumulate_every": 2}),
    "fedloru-seeded": Row((R * OUT,) * 2, down=(0, 0), error="zero"),
    "pfedloru": Row(PAIR, own=("hidden.personal_A", "hidden.personal_B"), args={"accumulate_every": 2}),
    "mfedloru": Row(PAIR, args={"accumulate_every": 2}),
    "fedhm": Row(PAIR, error="zero"),
    "fedpara": Row((2 * R * (IN + OUT),) * 2),
    "ffa-lora": Row((R * OUT,) * 2, error="zero"),
    "rolora": Row((R * OUT, R * IN), down=PAIR, error="zero"),
    "flora": Row(PAIR, down=(0, 0), error="zero"),
    "fedex-lora": Row(PAIR, error="zero"),
    "flexlora": Row(PAIR, down=(0, PAIR[0]), error="zero"),
    "hetlora": Row(PAIR, args={"ranks": RANKS}),
    "fedsa-lora": Row((R * IN,) * 2, error="none", own=("hidden.lora_B",)),
    "lowrank-ef": Row(PAIR, down=(IN * OUT,) * 2, error="zero", own=("hidden.weight",)),
}
EVERY = pytest.mark.parametrize("algorithm", ALGORITHMS)


def cls(algorithm):
    return getattr(strategies, ALGORITHMS[algorithm].cls)


def make(algorithm, net=NET, targets="hidden", **more):
    own = {**ROWS[algorithm].args, "rank": R, "target_modules": targets} if ALGORITHMS[algorithm].factorised else {}
    return cls(algorithm)(net, **{**own, **usual(), **more})


def may(algorithm, what):
    """Whether a combination is not refused."""
    return what not in cls(algorithm).refused


def kept(strategy, store):
    """What every client holds of its own, of the round that counted last."""
    return {
        client: Store(store).state(strategy._memory.token, client, counted)
        for client, counted in strategy._memory.counted.items()
    }


def same_states(one, other):
    return set(one) == set(other) and all(
        (one[client] is None and other[client] is None) or same(one[client], other[client]) for client in one
    )


def test_every_algorithm_has_a_row():
    assert set(ROWS) == set(ALGORITHMS)


@EVERY
def test_it_runs_to_the_end_and_its_model_is_a_plain_one(algorithm):
    net, grid = CONV, WatchedGrid(client_app(CONV), 4)
    strategy = make(algorithm, net, ("stem", "hidden"), fraction_train=0.5)
    result = federate(strategy, grid, 4)
    assert [(row["clients_ok"], row["clients_failed"]) for row in grid.watch.rows] == [(2, 0)] * 4
    merged, plain = strategy.merged_state_dict(), net().state_dict()
    assert [(k, v.shape, v.dtype) for k, v in merged.items()] == [(k, v.shape, v.dtype) for k, v in plain.items()]
    assert all(bool(value.isfinite().all()) for value in merged.values())
    for key in ("head.bias", "norm.running_var", *(() if algorithm == "fedsa-lora" else ("hidden.weight",))):
        assert not torch.equal(merged[key], plain[key])
    net().load_state_dict(merged)
    assert same(dict(result.arrays.to_torch_state_dict()), dict(strategy.state.trainables))
    assert strategy.algorithm == algorithm


@EVERY
def test_it_trains_without_dense_leaves_too(algorithm):
    if not ALGORITHMS[algorithm].factorised:
        return
    grid = WatchedGrid(client_app(NET), 4)
    strategy = make(algorithm, dense_leaves="none")
    federate(strategy, grid, 3)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 3
    merged, plain = strategy.merged_state_dict(), NET().state_dict()
    assert same({k: v for k, v in merged.items() if k != "hidden.weight"}, {k: plain[k] for k in list(plain)[1:]})
    assert torch.equal(merged["hidden.weight"], plain["hidden.weight"]) == (algorithm == "fedsa-lora")


@EVERY
def test_a_model_in_float64_is_trained_in_it(algorithm):
    class Double(Mlp):
        def __init__(self):
            super().__init__()
            self.double()

        def forward(self, x):
            return super().forward(x.double())

    grid = WatchedGrid(client_app(seeded(Double)), 4)
    strategy = make(algorithm, seeded(Double))
    federate(strategy, grid, 3)
    assert [row["failures"] for row in grid.watch.rows] == [{}] * 3
    assert {value.dtype for value in strategy.merged_state_dict().values()} == {torch.float64}


# --- what is sent ---------------------------------------------------------------------------------------------------


def numbers(record):
    return sum(tensor.numel() for tensor in record.to_torch_state_dict().values())


@EVERY
def test_a_message_holds_as_many_numbers_as_is_said(algorithm):
    asked, told = {}, {}

    def before(message, context):
        if "arrays" in message.content and len(message.content["arrays"]) >= 0:
            server_round = message.content["config"]["server-round"]
            asked[server_round] = numbers(message.content["arrays"])

    def after(reply, low_rank):
        told[low_rank.server_round] = numbers(reply.content["arrays"])
        return reply

    row, grid = ROWS[algorithm], WatchedGrid(client_app(NET, before=before, tamper=after), 4)
    federate(make(algorithm, **({"ranks": None} if algorithm == "hetlora" else {})), grid, 2)
    assert (told[1] - DENSE, told[2] - DENSE) == row.up
    assert (asked[1] - DENSE, asked[2] - DENSE) == (row.down or row.up)
    for passed in grid.passed:
        count = told[passed.server_round]
        # Flower's serialisation of an array takes about 500 bytes beside its values; there are 3 to 7.
        assert 0 < passed.reply_size - 4 * count < 7 * 600
        assert 0 < passed.size - passed.entries - 4 * asked[passed.server_round] < 7 * 600
    rows = grid.watch.rows
    for server_round in (1, 2):
        of = [p for p in grid.passed if p.server_round == server_round]
        assert rows[server_round - 1]["bytes_up"] == sum(p.reply_size for p in of)
        assert rows[server_round - 1]["bytes_down"] == sum(p.size for p in of)


def test_smaller_clients_send_as_many_numbers_as_is_said():
    r = max(RANKS.values())
    per_client = {name: (lambda rank: rank * (IN + OUT)) for name in ("flora", "flexlora", "hetlora", "fedhm")}
    per_client["mfedloru"] = lambda rank: rank * (IN + OUT + 2 * r) if rank < r else r * (IN + OUT)
    assert {name for name in ALGORITHMS if may(name, "ranks") and name != "fedavg"} == set(per_client)
    for algorithm, expected in per_client.items():
        told = {}

        def after(reply, low_rank, told=told):
            told[low_rank.client] = numbers(reply.content["arrays"]) - DENSE
            return reply

        federate(make(algorithm, rank=r, ranks=RANKS), WatchedGrid(client_app(NET, tamper=after), 4), 2)
        assert told == {client: expected(rank) for client, rank in RANKS.items()}, algorithm


@pytest.mark.parametrize("algorithm", ["fedavg", "fedloru"])
def test_control_variates_double_what_is_sent_and_have_a_purpose_of_their_own(algorithm):
    rows = []
    for scaffold in (False, True):
        watch = Watch()
        federate(make(algorithm, scaffold=scaffold), WatchedGrid(client_app(NET), 4, watch=watch), 2)
        rows.append(watch.rows[1])
    count = DENSE + ROWS[algorithm].up[1]
    for way in ("up", "down"):
        cost = rows[1]["bytes_by_purpose"]["control"][way]
        assert 4 * 4 * count < cost < 4 * (4 * count + 800)
        assert rows[1][f"bytes_{way}"] - rows[0][f"bytes_{way}"] == pytest.approx(cost, abs=4 * 300)
        assert rows[1][f"bytes_{way}"] == sum(of[way] for of in rows[1]["bytes_by_purpose"].values())


# --- aggregation errors -----------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("net", [NET, CONV], ids=["mlp", "conv"])
def test_the_aggregation_error_is_what_is_said_of_the_algorithm(algorithm, net):
    grid = WatchedGrid(client_app(net), 4)
    targets = ("hidden",) if net is NET else ("stem", "hidden")
    federate(make(algorithm, net, targets), grid, 3)
    errors = [row.get("aggregation_error", {}) for row in grid.watch.rows]
    if ROWS[algorithm].error == "none":
        assert errors == [{}] * 3
        return
    assert all(set(of_round) == set(targets) for of_round in errors)
    for target in targets:
        largest = max(of_round[target] for of_round in errors)
        assert largest < 1e-5 if ROWS[algorithm].error == "zero" else 1e-4 < largest < 1.0


def test_the_aggregation_error_is_its_definition():
    replies, watch = [], Watch()

    def after(reply, low_rank):
        replies.append((reply.content["metrics"]["num-examples"], reply.content["arrays"].to_torch_state_dict()))
        return reply

    strategy = make("fedloru", CONV, ("stem", "hidden"), accumulate_every=5)
    federate(strategy, WatchedGrid(client_app(CONV, tamper=after), 4, watch=watch), 1)
    total = sum(weight for weight, _ in replies)
    for name in ("stem", "hidden"):
        pairs = [
            (weight / total, sent[f"{name}.lora_B"].double().flatten(1), sent[f"{name}.lora_A"].double().flatten(1))
            for weight, sent in replies
        ]
        exact = sum(p * b @ a for p, b, a in pairs)
        applied = sum(p * b for p, b, _ in pairs) @ sum(p * a for p, _, a in pairs)
        expected = float((exact - applied).norm() / exact.norm())
        assert watch.rows[0]["aggregation_error"][name] == pytest.approx(expected, rel=1e-3)


def test_a_server_optimiser_does_not_apply_the_mean_and_the_error_says_so_unless_it_is_not_measured():
    rows = {}
    for measured in (True, False):
        watch = Watch()
        inner = FedAvgM(server_learning_rate=0.5, server_momentum=0.0)
        strategy = make("ffa-lora", inner=inner, measure_aggregation=measured)
        federate(strategy, WatchedGrid(client_app(NET), 4, watch=watch), 1)
        rows[measured] = watch.rows[0]
    assert rows[True]["aggregation_error"]["hidden"] == pytest.approx(0.5, rel=1e-4), "half of the way is applied"
    assert "aggregation_error" not in rows[False]


# --- what clients keep ------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


VARIANTS = {
    **{algorithm: (algorithm, dict) for algorithm in ALGORITHMS},
    "fedavg, SCAFFOLD": ("fedavg", lambda: {"scaffold": True}),
    "fedloru, SCAFFOLD": ("fedloru", lambda: {"scaffold": True}),
    "fedloru, SCAFFOLD and FedAdam": ("fedloru", lambda: {"scaffold": True, "inner": FedAdam(eta=0.05)}),
    "pfedloru, SCAFFOLD, stack": ("pfedloru", lambda: {"scaffold": True, "accumulate_into": "stack"}),
    "rolora, SCAFFOLD": ("rolora", lambda: {"scaffold": True, "accumulate_every": 3}),
    "fedavg, FedAdam": ("fedavg", lambda: {"inner": FedAdam(eta=0.05)}),
    "flexlora, FedAdam, ranks": ("flexlora", lambda: {"inner": FedAdam(eta=0.05), "ranks": RANKS}),
    "fedloru, FedAvgM": ("fedloru", lambda: {"inner": FedAvgM(server_learning_rate=0.7, server_momentum=0.6)}),
    "ffa-lora, accumulated": ("ffa-lora", lambda: {"accumulate_every": 2}),
    "flora, stack": ("flora", lambda: {"accumulate_into": "stack"}),
    "fedex-lora, accumulated": ("fedex-lora", lambda: {"accumulate_every": 2}),
}
KEEPING = [name for name in VARIANTS if ROWS[VARIANTS[name][0]].own or "SCAFFOLD" in name]
ROUNDS = 6


def life(variant, directory, *, kill_at=0, resume=None):
    """One life of a run with new processes on both sides; the clients' disks stay as they are."""
    session._hosted.clear()
    algorithm, more = VARIANTS[variant]

    def at_end(row):
        if row["round"] == kill_at:
            raise Killed

    common = {"fraction_train": 0.5, "checkpoint_every": 2, "run_dir": directory / "run", "resume": resume}
    strategy = make(algorithm, **common, **more())
    grid = WatchedGrid(client_app(NET), 4, watch=Watch(at_end=at_end))
    federate(strategy, grid, ROUNDS, store=directory / "store")
    return strategy


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs that nobody interrupted, by variant."""
    known = {}

    def of(variant):
        if variant not in known:
            directory = tmp_path_factory.mktemp("whole")
            known[variant] = directory, life(variant, directory)
        return known[variant]

    return of


@pytest.mark.parametrize(
    ("variant", "damage"),
    [(variant, False) for variant in VARIANTS]
    + [(variant, True) for variant in dict.fromkeys([*KEEPING, "fedloru", "fedloru, FedAvgM", "flora, stack"])],
)
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, whole, variant, damage):
    """Killed after round 5: the server goes back to round 4, or to an older checkpoint; clients hold later states."""
    directory, expected = whole(variant)
    with pytest.raises(Killed):
        life(variant, tmp_path, kill_at=5)
    run = RunDirectory(tmp_path / "run")
    assert run.latest_checkpoint()[0] == 4
    if damage:
        newest = sorted((tmp_path / "run/checkpoints").glob("*.safetensors"))[-1]
        newest.write_bytes(newest.read_bytes()[:50])
        with pytest.warns(UserWarning, match="cannot be read"):
            strategy = life(variant, tmp_path, resume="auto")
    else:
        strategy = life(variant, tmp_path, resume="auto")
    assert strategy._memory.counted == expected._memory.counted
    if variant == "flora, stack" and damage:
        # Clients are ahead of the server and are sent a base, on which they stack: the same function, not its bits.
        torch.testing.assert_close(strategy.merged_state_dict(), expected.merged_state_dict())
        return
    assert (tmp_path / "run/model.safetensors").read_bytes() == (directory / "run/model.safetensors").read_bytes()
    assert same(dict(strategy.state.trainables), dict(expected.state.trainables))
    assert same(dict(sorted(strategy.state.control.items())), dict(sorted(expected.state.control.items())))
    assert strategy.state.ledger.lineage == expected.state.ledger.lineage
    states = kept(expected, directory / "store")
    assert same_states(kept(strategy, tmp_path / "store"), states)
    own = ROWS[VARIANTS[variant][0]].own
    assert all(set(own) <= set(state or ()) for state in states.values())
    # Catching up may cost bytes, and nothing else.
    costs = {"bytes_up", "bytes_down", "bytes_by_purpose"} if damage or variant in KEEPING else set()
    one, other = (
        [{key: value for key, value in row.items() if key not in costs} for row in timeless(run.read_rounds())]
        for run in (run, RunDirectory(directory / "run"))
    )
    assert one == other


@pytest.mark.parametrize("variant", dict.fromkeys([*ALGORITHMS, *KEEPING]))
def test_a_reply_that_is_rejected_leaves_no_trace(tmp_path, variant):
    """The same model and the same states as where the client failed before it did anything."""
    algorithm, more = VARIANTS[variant]

    def spoil(reply, low_rank):
        if (low_rank.client, low_rank.server_round) == ("1", 2):
            tensors = reply.content["arrays"].to_torch_state_dict()
            list(tensors.values())[-1][...] = float("nan")
            reply.content["arrays"] = ArrayRecord(tensors)
        return reply

    def fail(message, context):
        if context.node_config["partition-id"] == 1 and message.content["config"]["server-round"] == 2:
            raise RuntimeError("no")

    ends = []
    for name, app in (("spoil", client_app(NET, tamper=spoil)), ("fail", client_app(NET, before=fail))):
        strategy, grid = make(algorithm, **more()), WatchedGrid(app, 4)
        federate(strategy, grid, 4, store=tmp_path / name)
        assert [row["clients_failed"] for row in grid.watch.rows] == [0, 1, 0, 0]
        assert ("NaN" if name == "spoil" else "RuntimeError: no") in grid.watch.rows[1]["failures"]["1"]
        assert strategy._memory.counted == dict.fromkeys("0123", 4)
        ends.append((strategy, kept(strategy, tmp_path / name)))
    assert same(ends[0][0].merged_state_dict(), ends[1][0].merged_state_dict())
    assert same(dict(ends[0][0].state.trainables), dict(ends[1][0].state.trainables))
    assert same_states(ends[0][1], ends[1][1])
    assert (ends[0][1]["1"] is not None) == (variant in KEEPING)


@pytest.mark.parametrize("variant", [*KEEPING, "fedloru"])
def test_a_client_that_lost_its_own_state_starts_afresh(tmp_path, variant):
    algorithm, more = VARIANTS[variant]
    models = []
    for lose in (False, True):
        store = tmp_path / str(lose)

        def at_end(row, lose=lose, store=store):
            if lose and row["round"] == 2:
                shutil.rmtree(store / "states", ignore_errors=True)

        grid = WatchedGrid(client_app(NET), 4, watch=Watch(at_end=at_end))
        strategy = make(algorithm, **more())
        federate(strategy, grid, 4, store=store)
        assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 4
        assert all((state is not None) == (variant in KEEPING) for state in kept(strategy, store).values())
        models.append(strategy.merged_state_dict())
    assert same(*models) == (variant not in KEEPING), "what is lost makes a difference where something was kept"


@pytest.mark.parametrize("variant", KEEPING)
def test_clients_do_not_gather_old_states(tmp_path, variant):
    algorithm, more = VARIANTS[variant]
    for directory, most in ((None, 2), (tmp_path / "run", 6)):
        strategy = make(algorithm, run_dir=directory, checkpoint_every=2, **more())
        store = tmp_path / f"store {most}"
        federate(strategy, WatchedGrid(client_app(NET), 4), 7, store=store)
        files = [len(list(path.iterdir())) for path in (store / "states").iterdir()]
        assert len(files) == 4
        assert max(files) <= most


def test_two_runs_that_share_a_store_do_not_mix_up_what_clients_keep(tmp_path):
    models = []
    for _ in range(2):
        strategy = make("pfedloru")
        federate(strategy, WatchedGrid(client_app(NET), 4), 3, store=tmp_path)
        models.append((strategy.merged_state_dict(), kept(strategy, tmp_path)))
    assert same(models[0][0], models[1][0])
    assert same_states(models[0][1], models[1][1])


# --- evaluation -------------------------------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("into", ["merge", "stack"])
def test_evaluation_is_of_the_global_model_and_changes_nothing(algorithm, into):
    if into == "stack" and not (may(algorithm, "stack") and ALGORITHMS[algorithm].factorised):
        return
    more = {"accumulate_into": into} if into == "stack" else {}
    more |= {"ranks": None} if algorithm == "hetlora" else {}
    ends = []
    for fraction in (0.0, 1.0):
        strategy, watch = make(algorithm, fraction_evaluate=fraction, min_evaluate_nodes=1, **more), Watch()
        federate(strategy, WatchedGrid(client_app(NET), 4, watch=watch), 4)
        ends.append((strategy, watch.rows))
    assert same(ends[0][0].merged_state_dict(), ends[1][0].merged_state_dict())
    strategy, rows = ends[1]
    names = {"personal-loss"} if algorithm == "fedsa-lora" else {"loss"}
    names |= {"personal-loss"} if algorithm == "pfedloru" else set()
    assert set(rows[-1]["clients"]) == names
    if "loss" not in names:
        return
    model, losses, counts = NET(), [], []
    merged, w = strategy.merged_state_dict(), "hidden.weight"
    if algorithm in ("fedhm", "flexlora"):  # clients have the best pair of their rank
        beneath = model.state_dict()[w] if algorithm == "flexlora" else torch.zeros(OUT, IN)
        u, s, vh = torch.linalg.svd(merged[w] - beneath)
        merged[w] = beneath + (u[:, :R] * s[:R]) @ vh[:R]
    model.load_state_dict(merged)
    for client in range(4):
        inputs, labels = samples(client, Mlp.shape)
        losses.append(functional.cross_entropy(model(inputs), labels).item())
        counts.append(len(labels))
    expected = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / sum(counts)
    assert rows[-1]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[-1]["clients"]["loss"]["worst_decile"] == pytest.approx(max(losses), rel=1e-5)
    if algorithm == "pfedloru":
        assert rows[-1]["clients"]["personal-loss"]["mean"] < rows[-1]["clients"]["loss"]["mean"]


# --- combinations -----------------------------------------------------------------------------------------------------

ASKED = {
    "inner": lambda: {"inner": FedAvgM(server_learning_rate=0.7, server_momentum=0.5)},
    "scaffold": lambda: {"scaffold": True},
    "ranks": lambda: {"ranks": "1:0.5,2:0.5"},
    "stack": lambda: {"accumulate_into": "stack"},
    "keep": lambda: {"reinit": "keep"},
    "loha": lambda: {"adapter": "loha"},
    "accumulate": lambda: {"accumulate_every": 2},
    "accumulate at": lambda: {"accumulate_at": "1,3"},
    "accumulate when": lambda: {"accumulate_when": "rank", "accumulate_every": 3},
    "loha and stack": lambda: {"adapter": "loha", "accumulate_into": "stack", "accumulate_every": 2},
    "accumulate and stack": lambda: {"accumulate_into": "stack", "accumulate_every": 2},
    "proximal": lambda: {"proximal_mu": 0.3},
    "everything of clients": lambda: {"proximal_mu": 0.3, "scaffold": True},
}


def reason(algorithm, what):
    """Why a combination is refused, or None."""
    strategy = cls(algorithm)
    reasons = dict(strategy.refused)
    if ALGORITHMS[algorithm].factorised:
        reasons |= {"loha": strategy.fixed_form, "accumulate": strategy.accumulation.refused}
        reasons["accumulate at"] = reasons["accumulate"]
        reasons["accumulate and stack"] = reasons["accumulate"]
        reasons["accumulate when"] = reasons["accumulate"] or strategy.accumulation.fixed
        if strategy.accumulation.every == 1:
            reasons |= dict.fromkeys(("inner", "scaffold"), "its factors are drawn anew every round")
    reasons["everything of clients"] = reasons.get("scaffold")
    return reasons.get(what)


@EVERY
@pytest.mark.parametrize("what", ASKED)
def test_a_combination_is_refused_with_its_reason_or_runs(algorithm, what):
    if algorithm == "fedavg" and what not in ("inner", "scaffold", "proximal", "everything of clients"):
        return  # it has no such arguments
    why = reason(algorithm, what)
    if why:
        with pytest.raises(ValueError, match=cls(algorithm).__name__) as refusal:
            make(algorithm, **ASKED[what]())
        assert why in str(refusal.value)
        return
    grid = WatchedGrid(client_app(NET), 2)
    try:
        strategy = make(algorithm, **{**ASKED[what](), "num_clients": 2})
    except ValueError as refusal:
        two_things_together = what in ("loha and stack", "accumulate and stack")
        if not two_things_together or "cannot" not in str(refusal):
            raise
        return
    federate(strategy, grid, 3)
    assert [row["failures"] for row in grid.watch.rows] == [{}] * 3
    assert all(bool(value.isfinite().all()) for value in strategy.merged_state_dict().values())


@EVERY
def test_what_is_refused_is_something_that_can_be_asked(algorithm):
    asked = {"inner", "scaffold", "ranks", "stack", "keep", "feedback", "sparse", "sparse-up"}
    assert set(cls(algorithm).refused) <= asked
    assert all(len(why) > 20 for why in cls(algorithm).refused.values())


def test_an_algorithm_accumulates_by_default_where_it_is_said():
    every = {"fedavg": make("fedavg").schedule.every}
    every |= {name: make(name, accumulate_every=0).schedule.every for name in ALGORITHMS if name != "fedavg"}
    expected = {"fedloru": 10, "pfedloru": 10, "mfedloru": 10, "fedloru-seeded": 1}
    assert every == {algorithm: expected.get(algorithm, 0) for algorithm in ALGORITHMS}
    assert {algorithm: row.every for algorithm, row in ALGORITHMS.items()} == every


# --- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ["flora", "flexlora", "hetlora", "fedhm", "mfedloru"])
def test_a_reply_of_the_wrong_rank_is_dropped_with_its_reason(algorithm):
    """Client 1 sends what client 2 would."""

    def swell(reply, low_rank):
        if low_rank.client != "1" or low_rank.server_round != 2:
            return reply
        tensors = reply.content["arrays"].to_torch_state_dict()
        for key, value in tensors.items():
            if "lora" in key:
                dim = value.shape.index(2)
                tensors[key] = torch.cat([value, value.narrow(dim, 0, 1)], dim)
        reply.content["arrays"] = ArrayRecord(tensors)
        return reply

    grid = WatchedGrid(client_app(NET, tamper=swell), 4)
    federate(make(algorithm, rank=3, ranks=RANKS), grid, 3)
    assert [row["clients_failed"] for row in grid.watch.rows] == [0, 1, 0]
    told = grid.watch.rows[1]["failures"]["1"]
    assert "has shape" in told
    assert "expected" in told


def test_shares_of_ranks_are_exact_and_by_seed():
    def ranks(seed, text="1:0.5,2:0.3,4:0.2", count=10):
        ranks = RankMap(text, 9, num_clients=count, seed=seed)
        return [ranks.of(str(client)) for client in range(count)]

    assert sorted(ranks(0)) == [1] * 5 + [2] * 3 + [4] * 2
    assert sorted(ranks(1, count=100)) == [1] * 50 + [2] * 30 + [4] * 20
    assert ranks(0) == ranks(0) != ranks(1)
    others = RankMap("1:0.5,2:0.5", 9, num_clients=10)
    assert {others.of(f"hospital {i}") for i in range(50)} == {1, 2}, "names that are no numbers, by chance"
    assert (others.highest, others.uniform, RankMap("", 9).highest, RankMap("", 9).uniform) == (2, False, 9, True)


@pytest.mark.parametrize("suffix", ["toml", "json"])
def test_ranks_come_from_a_file_or_from_what_clients_say_they_can_train(tmp_path, suffix):
    path = tmp_path / f"ranks.{suffix}"
    path.write_text('0 = 1\n"1" = 3\ndefault = 2\n' if suffix == "toml" else json.dumps({"0": 1, "1": 3, "default": 2}))
    ranks = RankMap(str(path), 9)
    assert [ranks.of(client) for client in ("0", "1", "2", "else")] == [1, 3, 2, 2]
    assert [ranks.of("1", budget) for budget in (0, 1, 2, 3, 8)] == [3, 1, 2, 3, 3]
    assert ranks.highest == 3

    asked = {}
    configs = own_machines(tmp_path, 4)
    configs[1] = {**configs[1], "max-rank": 2}
    grid = WatchedGrid(client_app(NET, query=True), 4, node_configs=configs)
    federate(make("flora", ranks=str(path), enrol=True), grid, 2)
    for passed in grid.passed:
        if passed.kind == "work":
            asked[passed.node] = passed.header["work"]["rank"]
    assert asked == {0: 1, 1: 2, 2: 2, 3: 2}
    assert [row["clients_failed"] for row in grid.watch.rows] == [0, 0]


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ("4", "'4' is not rank:share"),
        ("4:0.5,8:0.6", r"the shares add up to 1\.1, they must make 1"),
        ("0:1", "rank of at least 1"),
        ("4:0,8:1", "a share between 0 and 1"),
        ("nowhere.toml", "cannot be read"),
        ({"0": 0}, "client '0' has rank 0"),
        ({"0": 2.0}, r"client '0' has rank 2\.0"),
    ],
)
def test_what_is_no_map_of_ranks_is_refused(ranks, told):
    with pytest.raises(ValueError, match=told):
        RankMap(ranks, 4)


@EVERY
def test_a_client_that_can_train_less_than_the_run_asks_for_does_so_or_is_told_why_not(algorithm, tmp_path):
    """Its budget of rank 1 comes with its enrolment; methods that need one rank for all cannot use it."""
    if algorithm == "fedavg":
        return
    configs = [{**config, "max-rank": 1} if i == 1 else config for i, config in enumerate(own_machines(tmp_path, 4))]
    grid = WatchedGrid(client_app(NET, query=True), 4, node_configs=configs)
    strategy = make(algorithm, enrol=True)
    federate(strategy, grid, 2)
    for row in grid.watch.rows:
        if may(algorithm, "ranks"):
            assert row["failures"] == {}
        else:
            assert set(row["failures"]) <= {"1"}
            assert all("rank" in told for told in row["failures"].values())


@EVERY
def test_a_rank_that_is_not_positive_or_above_every_layer_is_refused(algorithm):
    if algorithm == "fedavg":
        return
    for rank, told in ((0, "rank must be at least 1"), (-1, "rank must be at least 1"), (500, "at rank 500")):
        with pytest.raises(PlanError, match=told):
            make(algorithm, rank=rank, ranks=None, targets=None)


def test_control_variates_make_the_optimum_that_of_the_weighted_objective():
    """Two clients pull one number to 0 (9 examples) and to 1 (1 example): with or without SCAFFOLD it ends at 0.1."""

    class One(nn.Module):
        shape = (1,)

        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.full((1,), 0.7))

        def forward(self, x):
            return self.w.expand(len(x))

    app = ClientApp()

    @app.train()
    def train(message, context):
        low_rank = LowRankSession(One, message, context)
        client = int(context.node_config["partition-id"])
        optimizer = torch.optim.SGD(low_rank.model.parameters(), lr=0.2)
        for _ in range(3):
            optimizer.zero_grad()
            loss = 0.5 * (low_rank.model(torch.zeros(1)) - float(client)).square().sum()
            loss.backward()
            optimizer.step()
        return low_rank.reply({"train_loss": float(loss), "num-examples": (9, 1)[client]})

    for scaffold in (False, True):
        strategy = strategies.FedAvg(One, num_clients=2, fraction_evaluate=0.0, scaffold=scaffold)
        federate(strategy, WatchedGrid(app, 2), 60)
        torch.testing.assert_close(strategy.merged_state_dict()["w"], torch.tensor([0.1]), atol=1e-3, rtol=0.0)


def test_rolora_needs_two_rounds_and_goes_on_alternating_where_factors_are_kept():
    with pytest.raises(ValueError, match="takes two to train both halves"):
        make("rolora", accumulate_every=1)
    kept = make("rolora", accumulate_every=3, reinit="keep")
    assert [kept._half(at) for at in range(1, 7)] == ["b", "a", "b", "a", "b", "a"]
    assert [make("rolora", accumulate_every=3)._half(at) for at in range(1, 7)] == ["b", "a", "b", "b", "a", "b"]
