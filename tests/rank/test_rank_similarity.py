"""Similarity of clients against dense numpy."""

import numpy as np
import pytest
import torch

from fedloru_flwr.rank.similarity import best_pair_of, gram_of_pairs, pair_similarities, similarities


def cosine(one, other):
    return float((one * other).sum() / (np.linalg.norm(one) * np.linalg.norm(other)))


def cut(matrix, rank):
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def clients(count=4):
    rng = np.random.default_rng(0)
    common = rng.standard_normal((6, 10))
    return [
        {"fc.weight": common + rng.standard_normal((6, 10)), "conv.weight": rng.standard_normal((3, 2, 2, 2))}
        for _ in range(count)
    ]


def as_tensors(dicts):
    return [
        {name: torch.from_numpy(value) for name, value in one.items()} | {"fc.bias": torch.ones(6)} for one in dicts
    ]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_cosines_whole_and_cut_are_those_of_the_dense_matrices(rank):
    made = clients()
    found = similarities(as_tensors(made), ranks=(1, 2))
    flat = {}
    for name in ("fc.weight", "conv.weight"):
        matrices = [one[name].reshape(len(one[name]), -1) for one in made]
        flat[name] = [matrix if rank == 0 else cut(matrix, rank) for matrix in matrices]
        pairs = [cosine(flat[name][i], flat[name][j]) for i in range(4) for j in range(i)]
        assert found[name, rank].mean == pytest.approx(np.mean(pairs), abs=1e-12)
        assert found[name, rank].std == pytest.approx(np.std(pairs, ddof=1), abs=1e-12)
        to_mean = [
            cosine(flat[name][i], np.mean([flat[name][j] for j in range(4) if j != i], axis=0)) for i in range(4)
        ]
        assert found[name, rank].to_mean == pytest.approx(np.mean(to_mean), abs=1e-12)
        kept = sum((matrix**2).sum() for matrix in flat[name]) / sum((matrix**2).sum() for matrix in matrices)
        assert found[name, rank].share == pytest.approx(kept)
    joined = [np.concatenate([flat[name][k].reshape(-1) for name in flat]) for k in range(4)]
    pairs = [cosine(joined[i], joined[j]) for i in range(4) for j in range(i)]
    assert found["", rank].mean == pytest.approx(np.mean(pairs), abs=1e-12)
    assert {name for name, _ in found} == {"", "fc.weight", "conv.weight"}, "a bias has no rank"


@pytest.mark.parametrize("size", [4, 40])
def test_products_of_factors_are_compared_without_forming_them(size):
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(size, 3, generator=generator), torch.randn(3, size + 1, generator=generator)) for _ in range(5)
    ]
    dense = np.stack([(b.double() @ a.double()).numpy().reshape(-1) for b, a in pairs])
    assert np.allclose(gram_of_pairs(pairs).numpy(), dense @ dense.T)
    found = pair_similarities([{"fc": pair} for pair in pairs])
    expected = [cosine(dense[i], dense[j]) for i in range(5) for j in range(i)]
    assert found["fc", 0].mean == pytest.approx(np.mean(expected), abs=1e-10)


def test_the_best_pair_is_the_truncated_decomposition():
    matrix = np.random.default_rng(1).standard_normal((5, 7))
    b, a = best_pair_of(torch.from_numpy(matrix), 2)
    assert np.allclose((b @ a).numpy(), cut(matrix, 2))
    assert best_pair_of(torch.from_numpy(matrix), 9)[1].shape == (5, 7)


def test_equal_clients_are_alike_and_zeros_are_left_out():
    one = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    found = similarities([one, one, {"w": torch.zeros(2, 2)}])
    assert found["w", 0].clients == 2
    assert found["w", 0].mean == pytest.approx(1.0)
    assert found["w", 0].std == 0.0
    assert similarities([one, {"w": torch.zeros(2, 2)}]) == {}


def test_what_cannot_be_compared_is_refused():
    one = {"w": torch.ones(2, 2)}
    with pytest.raises(ValueError, match="at least two clients, got 1"):
        similarities([one])
    with pytest.raises(ValueError, match="ranks must be at least 1"):
        similarities([one, one], ranks=[0])
    with pytest.raises(ValueError, match="same names and shapes"):
        similarities([one, {"w": torch.ones(2, 3)}])
    with pytest.raises(ValueError, match="at least two clients, got 0"):
        pair_similarities([])
