import pytest
import torch

from fedloru_flwr.lowrank import (
    FactorisedLayer,
    as_pair,
    compress,
    has_zero_product,
    join,
    product,
    relative_difference,
    stable_rank,
)

LAYERS = [
    FactorisedLayer("fc", "linear", (6, 9), 2),
    FactorisedLayer("conv", "conv2d", (8, 3, 3, 3), 2),
    FactorisedLayer("embedding", "embedding", (20, 5), 2, transposed=True),
]


def pair(layer, rank, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.a_key: torch.randn(layer.a_shape(rank), generator=generator),
        layer.b_key: torch.randn(layer.b_shape(rank), generator=generator),
    }


def test_the_best_pair_of_a_diagonal_product_keeps_the_largest_values():
    layer = FactorisedLayer("fc", "linear", (3, 3), 3)
    adapter = {"fc.lora_A": torch.eye(3), "fc.lora_B": torch.diag(torch.tensor([3.0, 4.0, 12.0]))}
    best, error = compress(layer, adapter, 1)
    torch.testing.assert_close(product(layer, best), torch.diag(torch.tensor([0.0, 0.0, 12.0])))
    assert error == pytest.approx(5 / 13)
    assert compress(layer, adapter, 2)[1] == pytest.approx(3 / 13)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.kind)
@pytest.mark.parametrize("own", [2, 4, 12])
def test_the_error_is_that_of_the_dense_decomposition_and_zero_at_full_rank(layer, own):
    adapter = pair(layer, own)
    dense = product(layer, adapter)
    singular = torch.linalg.svdvals(layer.as_matrix(dense).double())
    for rank in (1, 2, 5, 100):
        best, error = compress(layer, adapter, rank)
        kept = min(rank, own, layer.max_rank)
        assert best[layer.a_key].shape == layer.a_shape(kept)
        assert best[layer.b_key].shape == layer.b_shape(kept)
        expected = float(singular[kept:].norm() / singular.norm())
        assert error == pytest.approx(expected, abs=1e-6)
        assert relative_difference(dense, product(layer, best)) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.kind)
def test_eight_entries_are_joined_exactly_and_compressed_with_their_error(layer):
    entries = [(pair(layer, 2, seed), 0.5 + seed) for seed in range(8)]
    joined = join(layer, entries)
    total = sum(scale * product(layer, one).double() for one, scale in entries)
    assert joined[layer.b_key].shape[1] == min(16, layer.max_rank)
    assert relative_difference(total, product(layer, joined)) < 1e-6
    whole, error = compress(layer, joined, 16)
    assert error == 0
    assert relative_difference(total, product(layer, whole)) < 1e-5


def test_products_that_are_zero_are_left_out_and_nothing_is_left_of_nothing():
    layer = LAYERS[0]
    fresh = {layer.a_key: torch.randn(2, 9), layer.b_key: torch.zeros(6, 2)}
    assert has_zero_product(layer, fresh)
    assert join(layer, [(fresh, 1.0), (fresh, 2.0)]) is None
    joined = join(layer, [(fresh, 1.0), (pair(layer, 2), 2.0)])
    assert joined[layer.a_key].shape == (2, 9)
    assert has_zero_product(layer, {layer.delta_key: torch.zeros(6, 9)})


def test_a_hadamard_product_is_compressed_as_the_pair_it_is():
    layer = LAYERS[0]
    shapes = [(6, 2), (2, 9), (6, 2), (2, 9)]
    adapter = {key: torch.randn(shape) for key, shape in zip(layer.hadamard_keys, shapes, strict=True)}
    assert as_pair(layer, adapter)[0].shape == (4, 9)
    best, error = compress(layer, adapter, 4)
    assert error < 1e-12
    torch.testing.assert_close(product(layer, best), product(layer, adapter))


def test_a_product_of_zero_has_no_error_and_a_rank_below_one_is_refused():
    layer = LAYERS[0]
    zero = {layer.a_key: torch.zeros(2, 9), layer.b_key: torch.zeros(6, 2)}
    assert compress(layer, zero, 1)[1] == 0
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        compress(layer, zero, 0)


def test_the_stable_rank_is_that_of_the_product():
    layer = FactorisedLayer("fc", "linear", (3, 3), 3)
    adapter = {"fc.lora_A": torch.eye(3), "fc.lora_B": torch.diag(torch.tensor([3.0, 4.0, 12.0]))}
    assert stable_rank(layer, adapter) == pytest.approx(169 / 144)
    assert stable_rank(layer, {**adapter, "fc.lora_B": torch.zeros(3, 3)}) == 0.0
    for layer in LAYERS:
        values = torch.linalg.svdvals(layer.as_matrix(product(layer, pair(layer, 2))).double())
        assert stable_rank(layer, pair(layer, 2)) == pytest.approx(float((values / values[0]).square().sum()), rel=1e-5)
