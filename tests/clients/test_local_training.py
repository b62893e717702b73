"""The package's own loop: plain torch, on samples in memory."""

import pytest
import torch
from torch import nn

from fedloru_flwr.clients.training import LocalOptimisation, batches, choose_device, evaluate, train_locally
from fedloru_flwr.data import Samples

CPU = torch.device("cpu")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def how(**more):
    usual = {
        "epochs": 1,
        "batch_size": 4,
        "optimizer": "sgd",
        "learning_rate": 0.5,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "max_grad_norm": 0.0,
    }
    return LocalOptimisation(**{**usual, **more})


def samples(count=7):
    generator = torch.Generator().manual_seed(count)
    return Samples(torch.randn(count, 3, generator=generator), torch.arange(count) % 2)


def linear(seed=1):
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def test_an_epoch_shows_every_sample_once_in_random_order():
    generator = torch.Generator().manual_seed(0)
    first = list(batches(10, 4, generator, no_single=False))
    assert [len(chunk) for chunk in first] == [4, 4, 2]
    assert sorted(torch.cat(first).tolist()) == list(range(10))
    second = list(batches(10, 4, generator, no_single=False))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    again = list(batches(10, 4, torch.Generator().manual_seed(0), no_single=False))
    assert torch.equal(torch.cat(first), torch.cat(again))


@pytest.mark.parametrize(
    ("count", "no_single", "sizes"), [(9, False, [4, 4, 1]), (9, True, [4, 5]), (1, True, [1]), (8, True, [4, 4])]
)
def test_a_last_batch_of_one_joins_the_one_before_where_asked(count, no_single, sizes):
    chunks = list(batches(count, 4, torch.Generator(), no_single=no_single))
    assert [len(chunk) for chunk in chunks] == sizes
    assert sorted(torch.cat(chunks).tolist()) == list(range(count))


def test_one_full_batch_of_sgd_is_one_step_down_the_gradient():
    data, model, expected = samples(), linear(), linear()
    loss = nn.functional.cross_entropy(expected(data.inputs), data.labels)
    loss.backward()
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.5 * parameter.grad
    mean = train_locally(model, data, how(batch_size=7), seeded(3), CPU)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    assert mean == pytest.approx(loss.item())


def test_the_loss_told_is_the_mean_over_the_last_epochs_samples():
    data = samples(5)
    mean = train_locally(linear(), data, how(learning_rate=1e-12, epochs=3, batch_size=2), seeded(3), CPU)
    assert mean == pytest.approx(nn.functional.cross_entropy(linear()(data.inputs), data.labels).item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_seed_decides_the_order_and_nothing_else_does(optimizer):
    def train(seed):
        model = linear()
        train_locally(
            model, samples(), how(optimizer=optimizer, momentum=0.9, epochs=2, batch_size=2), seeded(seed), CPU
        )
        return model.state_dict()

    torch.manual_seed(11)
    one = train(1)
    torch.manual_seed(12)
    same, other = train(1), train(2)
    assert torch.equal(one["weight"], same["weight"])
    assert not torch.equal(one["weight"], other["weight"])


def test_the_gradients_norm_is_clipped():
    def step(limit):
        model = linear()
        train_locally(model, samples(), how(batch_size=7, learning_rate=1.0, max_grad_norm=limit), seeded(), CPU)
        start = linear()
        moved = [(a - b).detach().flatten() for a, b in zip(model.parameters(), start.parameters(), strict=True)]
        return float(torch.cat(moved).norm())

    assert step(0.01) == pytest.approx(0.01, rel=1e-3)
    assert step(0.0) > 0.05
    assert step(100.0) == pytest.approx(step(0.0))


def test_weight_decay_pulls_towards_zero():
    def norm(decay):
        model = linear()
        train_locally(model, samples(), how(weight_decay=decay, epochs=3), seeded(), CPU)
        return float(model.weight.detach().norm())

    assert norm(0.5) < norm(0.0)


def test_frozen_parameters_stay():
    model = linear()
    model.bias.requires_grad_(False)
    train_locally(model, samples(), how(), seeded(), CPU)
    assert torch.equal(model.bias, linear().bias)
    assert not torch.equal(model.weight, linear().weight)


def test_batch_normalisation_trains_where_one_sample_is_left_over():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    assert train_locally(model, samples(9), how(), seeded(), CPU) > 0
    assert model[1].num_batches_tracked == 2, "four and five"


def test_evaluation_counts_right_answers_and_averages_the_loss_over_batches():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model.bias.zero_()
    inputs = torch.tensor([[3.0, 0.0], [0.0, 3.0], [3.0, 0.0], [0.0, 3.0], [3.0, 0.0]])
    data = Samples(inputs, torch.tensor([0, 1, 0, 0, 1]))
    right, wrong = float(torch.log1p(torch.tensor(-3.0).exp())), float(torch.log1p(torch.tensor(3.0).exp()))
    for batch_size in (2, 1024):
        metrics = evaluate(model, data, CPU, batch_size)
        assert metrics["accuracy"] == 3 / 5
        assert metrics["loss"] == pytest.approx((3 * right + 2 * wrong) / 5, rel=1e-5)
    assert not model.training


def test_the_device_is_what_there_is_or_an_error_that_names_it():
    assert choose_device("cpu") == CPU
    assert choose_device("auto").type in ("cuda", "mps", "cpu")
    with pytest.raises(ValueError, match="device = 'abacus' is not available here; use 'auto' or 'cpu'"):
        choose_device("abacus")
    if not torch.cuda.is_available():
        assert choose_device("auto").type in ("mps", "cpu")
        with pytest.raises(ValueError, match="'cuda' is not available"):
            choose_device("cuda")
