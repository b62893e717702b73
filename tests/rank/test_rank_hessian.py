"""The stable rank of a Hessian from products agrees with that of the matrix, formed densely in float64."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedloru_flwr.models import MLP, SmallCNN, plan_adapter
from fedloru_flwr.rank.operators import adapter_hessian, module_hessian
from fedloru_flwr.rank.spectra import spectrum, stable_ranks

pytestmark = pytest.mark.usefixtures("fresh_process")


def trained(model, inputs, labels, steps=20):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model


@pytest.fixture(scope="module")
def samples():
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(40, 1, 4, 4, generator=generator, dtype=torch.float64),
        torch.randint(4, (40,), generator=generator),
    )


@pytest.fixture(scope="module")
def mlp(samples):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return trained(MLP((1, 4, 4), 4, (6, 5)).double(), *samples)


def dense_by_autograd(model, inputs, labels):
    """The Hessian by torch's own functional API: an oracle that shares nothing with the operator."""
    shapes = [(name, value.shape) for name, value in model.named_parameters()]
    flat = torch.cat([value.detach().reshape(-1) for value in model.parameters()])

    def loss(theta):
        parts = theta.split([math.prod(shape) for _, shape in shapes])
        values = {name: part.reshape(shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        return functional.cross_entropy(torch.func.functional_call(model, values, (inputs,)), labels)

    return torch.autograd.functional.hessian(loss, flat)


def norms(matrix):
    spectral = float(torch.linalg.eigvalsh(matrix).abs().max())
    frobenius = float(torch.linalg.matrix_norm(matrix))
    return frobenius, spectral, frobenius**2 / spectral**2


def agree(found, frobenius, spectral, stable):
    assert found.frobenius == pytest.approx(frobenius, abs=max(0.01 * frobenius, 3 * found.frobenius_error))
    assert found.spectral == pytest.approx(spectral, rel=1e-4)
    assert found.stable_rank == pytest.approx(stable, abs=max(0.01 * stable, 3 * found.stable_rank_error))


def test_frobenius_norm_spectral_norm_and_stable_rank_are_those_of_the_dense_hessian(mlp, samples):
    dense = dense_by_autograd(mlp, *samples)
    hessian = module_hessian(mlp, *samples)
    assert hessian.size == 6 * 16 + 6 + 5 * 6 + 5 + 4 * 5 + 4
    assert torch.allclose(hessian.dense(), dense, atol=1e-12)
    found = spectrum(hessian, tolerance=0.005)
    assert found.converged
    assert 0 < found.probes < 200
    agree(found, *norms(dense))
    values = torch.linalg.eigvalsh(dense)
    assert found.largest == pytest.approx(float(values[-1]), rel=1e-4)
    assert found.smallest == pytest.approx(float(values[0]), rel=1e-2)


def test_every_layers_block_is_measured_like_the_block_of_the_dense_hessian(mlp, samples):
    dense = dense_by_autograd(mlp, *samples)
    found = stable_ranks(module_hessian(mlp, *samples), tolerance=0.005)
    assert list(found) == ["", "layers.0", "layers.1", "layers.2"]
    start = 0
    for name, size in (("layers.0", 102), ("layers.1", 35), ("layers.2", 24)):
        assert found[name].size == size
        agree(found[name], *norms(dense[start : start + size, start : start + size]))
        start += size
    assert found["layers.2"].probes == 0, "a small block is diagonalised"


def test_the_errors_that_are_reported_are_those_that_are_made(mlp, samples):
    hessian = module_hessian(mlp, *samples)
    _, _, stable = norms(hessian.dense())
    scores = []
    for seed in range(20):
        found = spectrum(hessian, steps=4, tolerance=0.2, seed=seed)
        scores.append((found.stable_rank - stable) / found.stable_rank_error)
    assert 0.5 < math.sqrt(sum(score**2 for score in scores) / 20) < 1.6
    assert max(map(abs, scores)) < 4


def test_a_restarted_basis_finds_the_same(mlp, samples):
    hessian = module_hessian(mlp, *samples)
    frobenius, spectral, stable = norms(hessian.dense())
    found = spectrum(hessian, steps=8, basis=8, tolerance=0.01)
    assert found.products - found.probes > 8
    agree(found, frobenius, spectral, stable)


def test_chunks_that_bound_memory_give_the_same_products_and_gradient(mlp, samples):
    whole, cut = module_hessian(mlp, *samples), module_hessian(mlp, *samples, max_bytes=12_000)
    vector = torch.randn(whole.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(whole.product(vector), cut.product(vector), atol=1e-12)
    assert 1 <= cut._chunk < 40 == whole._chunk
    mlp.zero_grad()
    functional.cross_entropy(mlp(samples[0]), samples[1]).backward()
    for name, value in mlp.named_parameters():
        assert torch.allclose(cut.gradient()[name], value.grad, atol=1e-12)


@pytest.mark.parametrize(
    "uneven",
    [
        {"weight": torch.tensor([1.0, 5.0, 0.2, 2.0], dtype=torch.float64)},
        {"ignore_index": 2},
    ],
    ids=["class-weights", "ignored"],
)
def test_a_loss_that_is_no_plain_mean_is_refused_in_chunks_and_right_in_one(mlp, samples, uneven):
    loss = nn.CrossEntropyLoss(**uneven)
    with pytest.raises(ValueError, match=r"plain mean of one term a sample.*raise max_bytes = 12000"):
        module_hessian(mlp, *samples, loss=loss, max_bytes=12_000).gradient()
    whole = module_hessian(mlp, *samples, loss=loss)
    mlp.zero_grad()
    loss(mlp(samples[0]), samples[1]).backward()
    for name, value in mlp.named_parameters():
        assert torch.allclose(whole.gradient()[name], value.grad, atol=1e-12)


def test_a_convolutional_network_in_float32_on_other_losses(samples):
    inputs = functional.interpolate(samples[0], size=8).float()
    targets = torch.nn.functional.one_hot(samples[1], 4).float()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = SmallCNN((1, 8, 8), 4, width=1)
    single = module_hessian(model, inputs, targets, loss=functional.mse_loss)
    double = module_hessian(model.double(), inputs, targets, loss=functional.mse_loss)
    found = spectrum(single, tolerance=0.01)
    agree(found, *norms(double.dense()))


def test_the_adapters_hessian_is_that_of_the_factors(mlp, samples):
    plan = plan_adapter(mlp, 2, 4.0, "layers.0,layers.1")
    generator = torch.Generator().manual_seed(2)
    state = {name: value.detach() for name, value in mlp.named_parameters()}
    values = {
        key: 0.3 * torch.randn(shape, generator=generator, dtype=torch.float64)
        for layer in plan.layers
        for key, shape in ((layer.a_key, layer.a_shape()), (layer.b_key, layer.b_shape()))
    }
    values |= {name: state[name] for name in plan.dense_leaves}
    hessian = adapter_hessian(mlp, plan, values, {name: state[name] for name in plan.base}, *samples)
    assert hessian.keys == plan.factor_keys

    sizes = [values[key].numel() for key in plan.factor_keys]

    def loss(theta):
        parts = dict(zip(plan.factor_keys, theta.split(sizes), strict=True))
        merged = dict(state)
        for layer in plan.layers:
            a, b = (parts[key].reshape(values[key].shape) for key in (layer.a_key, layer.b_key))
            merged[layer.weight_key] = state[layer.weight_key] + 2.0 * b @ a
        return functional.cross_entropy(torch.func.functional_call(mlp, merged, (samples[0],)), samples[1])

    theta = torch.cat([values[key].reshape(-1) for key in plan.factor_keys])
    dense = torch.autograd.functional.hessian(loss, theta)
    assert torch.allclose(hessian.dense(), dense, atol=1e-10)
    found = stable_ranks(hessian, tolerance=0.01)
    assert list(found) == ["", "layers.0", "layers.1"]
    agree(found[""], *norms(dense))


class Matrix:
    device = torch.device("cpu")

    def __init__(self, matrix):
        self.matrix, self.size, self.dtype = matrix, len(matrix), matrix.dtype

    def product(self, vector):
        return self.matrix @ vector


def test_an_identity_has_full_stable_rank_and_a_matrix_of_zeros_none():
    found = spectrum(Matrix(torch.eye(100, dtype=torch.float64)))
    assert found.stable_rank == pytest.approx(100)
    assert found.spectral == pytest.approx(1)
    assert spectrum(Matrix(torch.zeros(100, 100, dtype=torch.float64))).stable_rank == 0
    assert spectrum(Matrix(torch.zeros(3, 3, dtype=torch.float64))).frobenius == 0


def test_a_negative_eigenvalue_may_be_the_largest():
    diagonal = torch.linspace(-1, 2, 200, dtype=torch.float64)
    diagonal[0] = -5
    found = spectrum(Matrix(torch.diag(diagonal)), tolerance=0.01)
    assert found.spectral == pytest.approx(5)
    assert found.smallest == pytest.approx(-5)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 2.0**-73), (torch.float32, 2.0**73), (torch.float64, 2.0**-560)]
)
def test_the_stable_rank_does_not_depend_on_the_scale(dtype, scale):
    diagonal = torch.linspace(-1, 2, 200, dtype=dtype)
    one, other = (spectrum(Matrix(torch.diag(factor * diagonal)), tolerance=0.05) for factor in (1.0, scale))
    assert one.stable_rank == pytest.approx(float(diagonal.double().square().sum()) / 4, rel=0.2)
    assert (other.stable_rank, other.stable_rank_error) == (one.stable_rank, one.stable_rank_error)
    assert (other.spectral, other.smallest) == (scale * one.spectral, scale * one.smallest)
    assert (other.frobenius, other.frobenius_error) == (scale * one.frobenius, scale * one.frobenius_error)
    (small, tiny) = (spectrum(Matrix(torch.diag(factor * diagonal[:9]))) for factor in (1.0, scale))
    assert (tiny.stable_rank, tiny.spectral) == (small.stable_rank, scale * small.spectral)


def test_a_spectrum_as_large_below_zero_as_above_settles():
    diagonal = torch.linspace(-1, 1, 100, dtype=torch.float64)
    found = spectrum(Matrix(torch.diag(diagonal)), tolerance=0.05)
    assert found.converged
    assert found.products - found.probes < 50, "to wait until one end is surely the larger takes 60"
    assert found.spectral == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(ValueError, match=r"expected float32 or float64; convert the model first"):
        module_hessian(nn.Linear(2, 2).to(dtype), torch.ones(3, 2), torch.zeros(3, dtype=torch.long))
    with pytest.raises(ValueError, match="expected float32 or float64"):
        spectrum(Matrix(torch.eye(50, dtype=dtype)))


def test_progress_is_told_of_every_product(mlp, samples):
    told = []
    found = spectrum(module_hessian(mlp, *samples), tolerance=0.1, on_product=lambda: told.append(1))
    assert len(told) == found.products


def test_what_cannot_be_measured_is_refused_with_a_remedy(mlp, samples):
    inputs, labels = samples
    with pytest.raises(ValueError, match="same number of samples"):
        module_hessian(mlp, inputs, labels[:3])
    with pytest.raises(ValueError, match="'nowhere' matches none"):
        module_hessian(mlp, inputs, labels, parameters=["nowhere"])
    with pytest.raises(ValueError, match="no trainable parameter"):
        module_hessian(nn.Linear(2, 2).requires_grad_(False), inputs, labels)
    with pytest.raises(ValueError, match="leave its reduction"):
        module_hessian(mlp, inputs, labels, loss=nn.CrossEntropyLoss(reduction="none")).gradient()
    with pytest.raises(ValueError, match="not finite"):
        spectrum(Matrix(torch.full((50, 50), math.nan, dtype=torch.float64)))
    with pytest.raises(ValueError, match="tolerance must be"):
        spectrum(Matrix(torch.eye(50, dtype=torch.float64)), tolerance=0.0)


def test_dropout_and_batch_statistics_are_off_and_the_model_is_left_as_it_was():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 2)).double()
        inputs, labels = torch.randn(10, 3).double(), torch.randint(2, (10,))
    hessian = module_hessian(model, inputs, labels)
    dense = dense_by_autograd(model.eval(), inputs, labels)
    model.train()
    assert torch.allclose(hessian.dense(), dense, atol=1e-12)
    assert model.training
    assert int(model[1].num_batches_tracked) == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_gives_the_same(mlp, samples):
    there = module_hessian(mlp, *samples, device=torch.device("cuda"))
    here = spectrum(module_hessian(mlp, *samples), tolerance=0.01)
    assert spectrum(there, tolerance=0.01).stable_rank == pytest.approx(here.stable_rank, rel=1e-6)
