"""Each algorithm against itself in plain torch, which imports nothing of the package."""

from collections import defaultdict

import pytest
import torch
from torch.func import functional_call
from torch.nn import functional
from toy_federation import RATE, STEPS, ConvNet, WatchedGrid, client_app, federate, samples, seeded

from fedloru_flwr.strategies import FedAvg, FedLoRA, FedLoRU

ROUNDS, TAU, RANK, ALPHA = 7, 2, 2, 3.0
FACTORISED = ("stem", "hidden")


def product(factors, name, like):
    return (factors[f"{name}.lora_B"].flatten(1) @ factors[f"{name}.lora_A"].flatten(1)).reshape(like.shape)


def plain_run(net, layers, factors, restarts, drawn, tau, keep):
    """``A, B, dense <- sum_k p_k (...)``; every ``tau`` rounds ``W <- W + s B A``. Returns the merged model."""
    state, scale = net().state_dict(), ALPHA / RANK
    weights = [f"{name}.weight" for name in layers]
    for server_round in range(1, ROUNDS + 1):
        examples, trained = [], []
        for client in sorted(drawn[server_round]):
            model, local = net(), {key: value.clone().requires_grad_() for key, value in factors.items()}
            model.load_state_dict(state)
            leaves = [parameter for name, parameter in model.named_parameters() if name not in weights]
            inputs, labels = samples(client, net.shape)
            for _ in range(STEPS):
                effective = {w: state[w] + scale * product(local, w[:-7], state[w]) for w in weights}
                loss = functional.cross_entropy(functional_call(model, effective, (inputs,)), labels)
                parameters = [*local.values(), *leaves]
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter -= RATE * gradient
            examples.append(len(labels))
            trained.append({**model.state_dict(), **{key: value.detach() for key, value in local.items()}})
        shares = [count / sum(examples) for count in examples]
        for key in [k for k in state if k not in weights and state[k].is_floating_point()]:
            state[key] = sum(share * one[key] for share, one in zip(shares, trained, strict=True))
        factors = {key: sum(s * one[key] for s, one in zip(shares, trained, strict=True)) for key in factors}
        if tau and server_round % tau == 0:
            for weight in weights:
                state[weight] = state[weight] + scale * product(factors, weight[:-7], state[weight])
            factors = factors if keep else restarts[server_round]
    return {k: v + scale * product(factors, k[:-7], v) if k in weights else v for k, v in state.items()}


def fedloru(**more):
    return lambda net, **common: FedLoRU(
        net, rank=RANK, alpha=ALPHA, target_modules=FACTORISED, accumulate_every=TAU, **more, **common
    )


ALGORITHMS = {
    "fedavg": (lambda net, **common: FedAvg(net, **common), (), 0, False),
    "fedlora": (
        lambda net, **common: FedLoRA(net, rank=RANK, alpha=ALPHA, target_modules=FACTORISED, **common),
        FACTORISED,
        0,
        False,
    ),
    "fedloru, reset, merge": (fedloru(), FACTORISED, TAU, False),
    "fedloru, reset, stack": (fedloru(accumulate_into="stack"), FACTORISED, TAU, False),
    "fedloru, keep, merge": (fedloru(reinit="keep"), FACTORISED, TAU, True),
    "fedloru, keep, stack": (fedloru(reinit="keep", accumulate_into="stack"), FACTORISED, TAU, True),
}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_algorithm_gives_the_numbers_of_its_plain_reference(name):
    make, layers, tau, keep = ALGORITHMS[name]
    net, seen, restarts = seeded(ConvNet), [], {}
    strategy = make(net, seed=5, num_clients=6, fraction_train=0.5, fraction_evaluate=0.0)
    first = {k: v.clone() for k, v in strategy.state.trainables.items() if "lora_" in k}

    def note(server_round, _):
        restarts[server_round] = {k: v.clone() for k, v in strategy.state.trainables.items() if k in first}

    federate(strategy, WatchedGrid(client_app(net, seen=seen), 6), ROUNDS, evaluate_fn=note)
    drawn = defaultdict(list)
    for look in seen:
        drawn[look.server_round].append(int(look.client))
    assert {len(clients) for clients in drawn.values()} == {3}, "half of six take part"
    assert len({tuple(sorted(clients)) for clients in drawn.values()}) > 3, "not always the same ones"

    expected = plain_run(net, layers, first, restarts, drawn, tau, keep)
    merged = strategy.merged_state_dict()
    assert list(merged) == list(expected)
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=1e-4, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    moved = max(float((merged[key] - start).abs().max()) for key, start in net().state_dict().items())
    assert moved > 0.05, "the comparison is of something that was learned"
    assert strategy.state.ledger.version == (ROUNDS // tau if tau else 0)


def test_keep_counts_a_product_twice_and_reset_once():
    """With ``keep`` the function jumps at an accumulation by exactly ``s B A``; with ``reset`` it does not."""
    net, models = seeded(ConvNet), {}
    for reinit in ("reset", "keep"):
        strategy = fedloru(reinit=reinit)(net, seed=5, num_clients=3, fraction_evaluate=0.0)
        federate(strategy, WatchedGrid(client_app(net), 3), TAU)
        models[reinit] = strategy.merged_state_dict()
        entry = strategy.state.ledger.entries[0].adapter
    jump = ALPHA / RANK * product(entry, "hidden", models["keep"]["hidden.weight"])
    torch.testing.assert_close(models["keep"]["hidden.weight"], models["reset"]["hidden.weight"] + jump)
    assert float(jump.abs().max()) > 1e-3
