"""Every algorithm of the registry against itself in plain torch: the models, and what clients keep of their own."""

import math
from collections import defaultdict

import pytest
import references
import torch
from flwr.serverapp.strategy import FedAdam, FedAvgM
from torch.nn import functional
from toy_federation import RATE, STEPS, ConvNet, Mlp, WatchedGrid, client_app, federate, samples, seeded

from fedloru_flwr import strategies
from fedloru_flwr.lowrank import initial_factors, uniform
from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.store import Store

RANK, ALPHA, SEED = 2, 3.0, 5


class Smooth(ConvNet):
    """Without the kinks of rectifiers and maxima, at which the last bit decides about a gradient."""

    def forward(self, x):
        x = functional.avg_pool2d(torch.tanh(self.norm(self.stem(x))), 2)
        return self.head(torch.tanh(self.after(self.hidden(x.flatten(1)))))


NETS = {"mlp": (seeded(Mlp), ("hidden",)), "conv": (seeded(Smooth, 7), ("stem", "hidden"))}
RANKS = {"0": 3, "1": 1, "2": 2, "3": 1, "4": 2, "5": 3}


def momentum():
    return {"inner": FedAvgM(server_learning_rate=0.7, server_momentum=0.6)}, references.Momentum(0.7, 0.6)


def adam():
    eta, tau = 0.05, 0.01
    inner = FedAdam(eta=eta, beta_1=0.8, beta_2=0.9, tau=tau)
    return {"inner": inner}, references.Adam(eta, 0.8, 0.9, tau)


class Case:
    """One comparison: the algorithm, its arguments, its reference and that one's own arguments."""

    def __init__(self, algorithm, reference=references.Reference, server=None, *, args=None, total=0, **more):
        self.algorithm, self.reference, self.server, self.more = algorithm, reference, server, more
        self.args = dict(args or {})
        if "tau" in more and self.args.get("accumulate_every", more["tau"]):
            self.args.setdefault("accumulate_every", more["tau"])
        if total:
            self.args["scaffold"] = True
            self.more["total"] = total
        if "mu" in more:
            self.args["proximal_mu"] = more["mu"]


R, HADA, SIX = references.Reference, references.Hadamard, {"total": 6}
STACK, KEEP, LOHA = {"accumulate_into": "stack"}, {"reinit": "keep"}, {"adapter": "loha"}
CASES = {
    "fedavg": Case("fedavg"),
    "fedavg, FedProx": Case("fedavg", mu=0.8),
    "fedavg, SCAFFOLD": Case("fedavg", **SIX),
    "fedavg, SCAFFOLD and FedAvgM": Case("fedavg", R, momentum, **SIX),
    "fedavg, FedAdam": Case("fedavg", R, adam),
    "fedlora": Case("fedlora"),
    "fedlora, SCAFFOLD and FedProx": Case("fedlora", mu=0.0, **SIX),
    "fedloru": Case("fedloru", tau=2),
    "fedloru, default tau": Case("fedloru", tau=10, args={"accumulate_every": 0}),
    "fedloru, stack": Case("fedloru", tau=2, args=STACK),
    "fedloru, keep": Case("fedloru", tau=2, keep=True, args=KEEP),
    "fedloru, FedProx": Case("fedloru", tau=2, mu=0.8),
    "fedloru, SCAFFOLD": Case("fedloru", tau=3, **SIX),
    "fedloru, SCAFFOLD, stack": Case("fedloru", tau=3, args=STACK, **SIX),
    "fedloru, SCAFFOLD, keep": Case("fedloru", tau=3, keep=True, args=KEEP, **SIX),
    "fedloru, FedAvgM": Case("fedloru", R, momentum, tau=3),
    "fedloru, FedAvgM, keep": Case("fedloru", R, momentum, tau=3, keep=True, args=KEEP),
    "fedloru, FedAdam": Case("fedloru", R, adam, tau=3),
    "fedloru, loha": Case("fedloru", HADA, tau=2, args=LOHA),
    "fedloru-seeded": Case("fedloru-seeded", references.FrozenA, tau=1, args={"accumulate_every": 0}),
    "fedloru-seeded, tau 2": Case("fedloru-seeded", references.FrozenA, tau=2),
    "fedloru-seeded, stack": Case("fedloru-seeded", references.FrozenA, tau=2, args=STACK),
    "fedloru-seeded, SCAFFOLD": Case("fedloru-seeded", references.FrozenA, tau=3, **SIX),
    "pfedloru": Case("pfedloru", references.PFedLoRU, tau=2, args={"personal_rank": 1, "personal_alpha": 0.7}),
    "pfedloru, stack": Case("pfedloru", references.PFedLoRU, tau=2, args={"personal_rank": 1, **STACK}),
    "pfedloru, SCAFFOLD": Case("pfedloru", references.PFedLoRU, tau=3, args={"personal_rank": 3}, **SIX),
    "pfedloru, FedProx": Case("pfedloru", references.PFedLoRU, tau=10, mu=0.8),
    "mfedloru": Case("mfedloru", references.MFedLoRU, tau=2, args={"nested_scale": 0.6, "ranks": RANKS, "rank": 3}),
    "mfedloru, stack": Case("mfedloru", references.MFedLoRU, tau=2, args={"ranks": RANKS, "rank": 3, **STACK}),
    "fedhm": Case("fedhm", references.FedHM),
    "fedhm, ranks": Case("fedhm", references.FedHM, args={"ranks": RANKS}),
    "fedpara": Case("fedpara", HADA),
    "fedpara, tau 2": Case("fedpara", HADA, tau=2),
    "fedpara, keep": Case("fedpara", HADA, tau=2, keep=True, args=KEEP),
    "ffa-lora": Case("ffa-lora", references.FrozenA),
    "ffa-lora, tau 2": Case("ffa-lora", references.FrozenA, tau=2),
    "ffa-lora, keep": Case("ffa-lora", references.FrozenA, tau=2, keep=True, args=KEEP),
    "rolora": Case("rolora", references.RoLoRA),
    "rolora, tau 3": Case("rolora", references.RoLoRA, tau=3),
    "rolora, SCAFFOLD": Case("rolora", references.RoLoRA, tau=3, **SIX),
    "flora": Case("flora", references.FLoRA),
    "flora, ranks": Case("flora", references.FLoRA, args={"ranks": RANKS}),
    "flora, ranks, stack": Case("flora", references.FLoRA, args={"ranks": RANKS, **STACK}),
    "fedex-lora": Case("fedex-lora", references.FedEx),
    "fedex-lora, tau 2": Case("fedex-lora", references.FedEx, tau=2),
    "fedex-lora, tau 2, stack": Case("fedex-lora", references.FedEx, tau=2, args=STACK),
    "flexlora": Case("flexlora", references.FlexLoRA),
    "flexlora, ranks": Case("flexlora", references.FlexLoRA, args={"ranks": RANKS}),
    "hetlora": Case("hetlora", references.HetLoRA, args={"ranks": RANKS}),
    "hetlora, tau 2": Case("hetlora", references.HetLoRA, tau=2, args={"ranks": RANKS}),
    "fedsa-lora": Case("fedsa-lora", references.FedSA),
    "lowrank-ef": Case("lowrank-ef", references.LowRankEF),
}


def drawn_factors(strategy):
    """Factors as they are drawn from the seed, those of one-sided methods included."""
    plan = strategy.plan
    return lambda draw, rank: plan.whole(plan.fresh(SEED, draw, rank), SEED, draw)


def drawn_by_clients(strategy, args):
    """What the clients' methods draw or choose by themselves, for the references that ask for it."""
    layers, personal_rank = strategy.plan.layers, args.get("personal_rank", RANK)

    def personal(client):
        pairs = initial_factors(layers, SEED, 0, rank=personal_rank, label=f"personal {client}")
        return {key.replace("lora_", "personal_"): value for key, value in pairs.items()}

    def nested(server_round, client, name, rank):
        (layer,) = [one for one in layers if one.name == name]
        vectors = []
        for key in (f"{layer.a_key}_down", f"{layer.b_key}_up"):
            drawn = uniform(SEED, "nested", server_round, str(client), key, shape=(rank, layer.rank), bound=1.0)
            q, r = torch.linalg.qr(drawn.double().T)
            vectors.append((math.sqrt(layer.rank / rank) * q * r.diagonal().sign()).float())
        return vectors[0], vectors[1].T

    return {
        "personal": personal,
        "personal_scale": args["personal_alpha"] / personal_rank if "personal_alpha" in args else ALPHA / RANK,
        "epochs": (1, 1),
        "nested": nested,
        "nested_scale": args.get("nested_scale", 1.0),
        "rank": RANK,
    }


def compare(name, net_name, *, rounds, clients, fraction, store):
    """Run the strategy and its reference on the same clients, and return both."""
    case, (net, layers) = CASES[name], NETS[net_name]
    args, server = dict(case.args), None
    if case.server is not None:
        inner, server = case.server()
        args |= inner
    if case.algorithm != "fedavg":
        args = {"rank": RANK, "alpha": ALPHA * args.get("rank", RANK) / RANK, "target_modules": layers, **args}
    cls, seen = getattr(strategies, ALGORITHMS[case.algorithm].cls), []
    strategy = cls(net, seed=SEED, num_clients=clients, fraction_train=fraction, fraction_evaluate=0.0, **args)
    grid = WatchedGrid(client_app(net, seen=seen), clients)
    federate(strategy, grid, rounds, store=store)
    drawn = defaultdict(list)
    for look in seen:
        drawn[look.server_round].append(look.client)
    drawn = {server_round: sorted(them) for server_round, them in drawn.items()}
    scale = 1.0 if case.algorithm in ("fedhm", "fedavg", "lowrank-ef") else ALPHA / RANK
    reference = case.reference(
        net,
        () if case.algorithm == "fedavg" else layers,
        drawn,
        lambda client: samples(int(client), net.shape),
        drawn_factors(strategy),
        rate=RATE,
        steps=STEPS,
        scale=scale,
        **{
            **drawn_by_clients(strategy, args),
            **({"ranks": RANKS} if "ranks" in args else {"ranks": dict.fromkeys(map(str, range(clients)))}),
            **case.more,
            "server": server,
        },
    ).run()
    return strategy, grid, reference, drawn


def assert_close(got, expected, start, tolerance=1e-5):
    """Equal, but for rounding, in relation to how far the tensors have moved."""
    assert list(got) == list(expected)
    moved = sum(float((expected[key].double() - start[key]).square().sum()) for key in expected) ** 0.5
    apart = {key: float((got[key].double() - expected[key]).norm()) for key in expected}
    assert moved > 0.05, "the comparison is of something that was learned"
    assert max(apart.values()) <= tolerance * moved, apart


@pytest.mark.parametrize("name", CASES)
def test_an_algorithm_gives_the_numbers_of_its_plain_reference(name, tmp_path):
    net = NETS["conv"][0]
    strategy, grid, reference, drawn = compare(name, "conv", rounds=4, clients=6, fraction=0.5, store=tmp_path)
    assert {len(clients) for clients in drawn.values()} == {3}
    assert len({tuple(clients) for clients in drawn.values()}) > 2, "not always the same ones"
    assert [row["clients_failed"] for row in grid.watch.rows] == [0] * 4
    assert_close(strategy.merged_state_dict(), reference.model, net().state_dict())
    assert_own_states(strategy, reference, tmp_path)


def assert_own_states(strategy, reference, store):
    """What the clients keep is what the reference's clients keep: personal pairs, residuals, control variates."""
    kept = {
        client: Store(store).state(strategy._memory.token, client, at)
        for client, at in strategy._memory.counted.items()
    }
    keeps = strategy.algorithm in ("pfedloru", "fedsa-lora", "lowrank-ef") or strategy.scaffold
    for client, own in reference.own.items():
        for key, value in own.items():
            torch.testing.assert_close(kept[client][key], value, rtol=1e-4, atol=1e-5)
            assert float(value.norm()) > 0
    for client, own in reference.c_of.items():
        held = {name.rpartition("/")[2]: v for name, v in kept[client].items() if name.startswith("control/")}
        if strategy.reinit == "reset":  # of factors that have restarted since, the client may hold what is not used
            fresh = f"control/{strategy.state.draw}/"
            held = {
                name.rpartition("/")[2]: value
                for name, value in kept[client].items()
                if name.startswith(fresh) or (name.startswith("control/") and name.count("/") == 1)
            }
        assert set(held) == set(own)
        for key, value in own.items():
            torch.testing.assert_close(held[key], value, rtol=1e-4, atol=1e-5)
    for key, value in reference.sums.items():
        torch.testing.assert_close(strategy.state.control[key], value, rtol=1e-4, atol=1e-4)
    assert set(strategy.state.control) == set(reference.sums)
    assert keeps or set(kept.values()) <= {None}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_at_full_participation_on_a_perceptron_too(algorithm, tmp_path):
    names = [name for name, case in CASES.items() if case.algorithm == algorithm]
    assert names, "a new algorithm needs a reference"
    strategy, _, reference, drawn = compare(names[0], "mlp", rounds=3, clients=3, fraction=1.0, store=tmp_path)
    assert set(map(tuple, drawn.values())) == {("0", "1", "2")}
    assert_close(strategy.merged_state_dict(), reference.model, NETS["mlp"][0]().state_dict())
    assert_own_states(strategy, reference, tmp_path)


@pytest.mark.parametrize("algorithm", ["fedavg", "fedloru"])
def test_control_variates_of_factors_start_from_zero_after_a_restart_and_those_of_dense_leaves_carry_on(algorithm):
    args = {} if algorithm == "fedavg" else {"rank": RANK, "accumulate_every": 2}
    cls, net, after = getattr(strategies, ALGORITHMS[algorithm].cls), NETS["mlp"][0], {}
    strategy = cls(net, num_clients=3, fraction_evaluate=0.0, scaffold=True, **args)
    federate(
        strategy, WatchedGrid(client_app(net), 3), 3, evaluate_fn=lambda r, _: after.update({r: strategy.state.control})
    )
    factors = set(strategy.plan.factor_keys)
    assert set(after[1]) == set(after[3]) == set(strategy.plan.trainable_keys)
    assert set(after[2]) == set(after[1]) - factors
    assert len(after[2]) >= 3
    for key in after[2]:
        assert not torch.equal(after[1][key], after[2][key])
