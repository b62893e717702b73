"""The rank of what a model has learned, against dense numpy."""

import numpy as np
import pytest
import torch

from fedloru_flwr.lowrank import FactorisedLayer
from fedloru_flwr.rank.products import ledger_ranks, matrix_rank, product_rank, rank_of_values

LAYER = FactorisedLayer("fc", "linear", (6, 9), 2)
CONVOLUTION = FactorisedLayer("conv", "conv2d", (6, 3, 3, 3), 2)


def entries(layer, count, rank=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            {
                layer.a_key: torch.randn(layer.a_shape(rank), generator=generator),
                layer.b_key: torch.randn(layer.b_shape(rank), generator=generator),
            },
            0.5 + index,
        )
        for index in range(count)
    ]


def dense(layer, entry):
    adapter, scale = entry
    a, b = layer.as_matrices(adapter[layer.a_key].double(), adapter[layer.b_key].double())
    return scale * (b @ a).numpy()


def test_ranks_of_known_singular_values():
    found = rank_of_values(torch.tensor([2.0, 2.0, 1.0, 0.0]))
    assert found.frobenius == pytest.approx(3.0)
    assert found.stable_rank == pytest.approx(9 / 4)
    shares = np.array([0.4, 0.4, 0.2])
    assert found.effective_rank == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))
    assert found.rank_90 == 3
    assert found.numerical_rank == 3
    assert rank_of_values(torch.tensor([3.0, 1.0])).rank_90 == 1
    assert matrix_rank(torch.eye(4)).effective_rank == pytest.approx(4.0)
    assert matrix_rank(torch.zeros(3, 4)).stable_rank == 0.0


@pytest.mark.parametrize("rank", [1, 3, 6, 20])
def test_a_products_singular_values_are_those_of_the_dense_product(rank):
    generator = torch.Generator().manual_seed(rank)
    b, a = torch.randn(6, rank, generator=generator), torch.randn(rank, 9, generator=generator)
    expected = np.linalg.svd((b.double() @ a.double()).numpy(), compute_uv=False)
    found = np.array(product_rank(b, a).singular_values)
    assert np.allclose(found, expected[: len(found)])
    assert np.allclose(expected[len(found) :], 0, atol=1e-12)


def projector(matrix):
    """On its column space."""
    u, s, _ = np.linalg.svd(matrix, full_matrices=False)
    spanned = u[:, s > 1e-6 * s[0]]
    return spanned @ spanned.T


@pytest.mark.parametrize("layer", [LAYER, CONVOLUTION], ids=["linear", "convolution"])
def test_what_each_entry_adds_is_what_dense_projections_say(layer):
    made = entries(layer, 4)
    matrices = [dense(layer, entry) for entry in made]
    for index, (found, own) in enumerate(zip(ledger_ranks(layer, made), matrices, strict=True)):
        before = sum(matrices[:index], np.zeros_like(own))
        columns = projector(np.concatenate([np.zeros((len(own), 1)), *matrices[:index]], axis=1))
        rows = projector(np.concatenate([np.zeros((own.shape[1], 1)), *(one.T for one in matrices[:index])], axis=1))
        eye_c, eye_r = np.eye(len(columns)), np.eye(len(rows))
        whole = np.linalg.norm(own) ** 2
        assert found.frobenius**2 == pytest.approx(whole)
        assert found.new_columns == pytest.approx(np.linalg.norm((eye_c - columns) @ own) ** 2 / whole, abs=1e-9)
        assert found.new_rows == pytest.approx(np.linalg.norm(own @ (eye_r - rows)) ** 2 / whole, abs=1e-9)
        both = np.linalg.norm((eye_c - columns) @ own @ (eye_r - rows)) ** 2
        assert found.new == pytest.approx(both / whole, abs=1e-9)
        aligned = (before * own).sum() / (np.linalg.norm(before) * np.linalg.norm(own)) if index else 0.0
        assert found.alignment == pytest.approx(aligned, abs=1e-9)
        expected = np.linalg.svd(before + own, compute_uv=False)
        assert found.total.stable_rank == pytest.approx((expected**2).sum() / expected[0] ** 2)
        assert found.total.numerical_rank == min(2 * (index + 1), 6)


def test_an_entry_that_repeats_adds_nothing_and_one_that_takes_back_points_against():
    first, scale = entries(LAYER, 1)[0]
    again, back = ledger_ranks(LAYER, [(first, scale), (first, 2.0), (first, -1.0)])[1:]
    assert again.new_columns == pytest.approx(0, abs=1e-12)
    assert again.new == pytest.approx(0, abs=1e-12)
    assert again.alignment == pytest.approx(1)
    assert again.total.numerical_rank == 2
    assert back.alignment == pytest.approx(-1)


@pytest.mark.parametrize("layer", [LAYER, CONVOLUTION], ids=["linear", "convolution"])
def test_new_is_what_no_earlier_entry_had_whatever_their_sum_hides(layer):
    (first, scale), (second, _) = entries(layer, 2, rank=1)
    shared = {layer.a_key: first[layer.a_key], layer.b_key: second[layer.b_key]}
    third = ledger_ranks(layer, [(first, scale), (shared, scale), (first, scale)])[2]
    assert (third.new_columns, third.new_rows, third.new) == pytest.approx((0, 0, 0), abs=1e-12)
    after_nothing = ledger_ranks(layer, [(first, scale), (first, -scale), (first, scale), (second, scale)])
    assert after_nothing[1].total.frobenius == pytest.approx(0, abs=1e-12)
    assert (after_nothing[2].new_columns, after_nothing[2].new_rows) == pytest.approx((0, 0), abs=1e-12)
    assert after_nothing[3].new > 0.1


def test_an_entry_of_zeros_and_a_layer_without_factors():
    first, scale = entries(LAYER, 1)[0]
    nothing = {key: torch.zeros_like(value) for key, value in first.items()}
    (start, zero) = ledger_ranks(LAYER, [(first, scale), (nothing, 1.0)])
    assert (start.new, zero.new, zero.alignment, zero.frobenius) == (pytest.approx(1), 0.0, 0.0, 0.0)
    assert zero.total.stable_rank == pytest.approx(start.total.stable_rank)
    assert ledger_ranks(CONVOLUTION, [(first, scale)]) == []
