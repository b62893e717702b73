"""The random-matrix simulation against closed forms in special cases."""

import math
import runpy
from pathlib import Path

import numpy as np
import pytest

from fedloru_flwr.rank.perturbation import Population, limit, simulate

pytestmark = pytest.mark.usefixtures("fresh_process")


def test_without_an_outlier_the_edge_is_twice_the_scale_and_the_stable_rank_a_quarter_of_the_size():
    of = limit(Population(size=400, sigma=3.0), points=9)
    assert of.largest == pytest.approx(2.0)
    assert of.squared_frobenius == pytest.approx(401.0)
    assert of.stable_rank == pytest.approx(401 / 4)
    assert not of.separated


@pytest.mark.parametrize(("bulk", "sigma"), [(1e8, 1e-5), (1.0, 1e-20), (0.0, 1e-100), (-3.0, 0.25)])
def test_the_edge_of_a_bulk_is_twice_the_scale_above_it_however_small_beside_it(bulk, sigma):
    from fedloru_flwr.rank.perturbation import _edge

    found = _edge(np.full(50, bulk), sigma**2)
    assert found == pytest.approx(bulk + 2 * sigma, rel=1e-15, abs=0)
    spread = np.array([0.0, -1.0, -2.0])
    assert _edge(1e8 + spread, 1e-4) - 1e8 == pytest.approx(_edge(spread, 1e-4), abs=3e-8)


def test_an_outlier_above_the_threshold_moves_out_by_its_inverse_and_one_below_is_lost():
    above = limit(Population(size=400, outliers=(3.0,), sigma=1.0), points=1)
    assert above.largest == pytest.approx(3 + 1 / 3)
    assert above.separated
    assert above.squared_frobenius == pytest.approx(9 + 401)
    below = limit(Population(size=400, outliers=(0.9,), sigma=1.0), points=1)
    assert below.largest == pytest.approx(2.0)
    assert not below.separated
    negative = limit(Population(size=400, outliers=(1.5, -4.0), sigma=1.0), points=1)
    assert negative.largest == pytest.approx(4.25)


def test_a_bulk_that_is_itself_a_semicircle_adds_its_variance():
    # Free convolution of semicircles: variances add, so the edge is 2 sqrt(v + s^2).
    x = np.linspace(-2, 2, 200001)
    density = np.cumsum(np.sqrt(np.clip(4 - x**2, 0, None)))
    quantiles = np.interp((np.arange(2000) + 0.5) / 2000, density / density[-1], x)
    of = limit(Population(size=2000, bulk=tuple(quantiles.tolist()), sigma=1.5), points=1)
    assert of.largest == pytest.approx(2 * math.sqrt(1 + 1.5**2), rel=1e-3)


def test_the_additive_simulation_approaches_its_limits():
    population = Population(size=300, outliers=(4.0, -1.0), sigma=10.0)
    found = simulate(population, [20, 200], repeats=6, seed=1)
    for one in found.sampled:
        assert one.limit.separated
        assert one.largest == pytest.approx(one.limit.largest, rel=0.06)
        assert one.squared_frobenius == pytest.approx(one.limit.squared_frobenius, rel=0.03)
        assert one.stable_rank == pytest.approx(one.limit.stable_rank, rel=0.12)
    small, whole = found.sampled
    assert small.stable_rank > whole.stable_rank
    assert found.larger == (1.0,)


def test_dependent_samples_share_what_theory_says_they_share():
    # Off the diagonal: Var H_M = sigma^2 / (M R), and Cov(H_M, H_N) = Var H_N, since H_M - H_N is independent of H_N.
    from fedloru_flwr.rank.perturbation import _additive

    population = Population(size=60, sigma=1.0)
    rng = np.random.default_rng(0)
    small, whole = [], []
    for _ in range(40):
        one, other = _additive(population, [4, 16], rng)
        upper = np.triu_indices(60, 1)
        small.append(one[upper])
        whole.append(other[upper])
    small, whole = np.concatenate(small), np.concatenate(whole)
    assert small.var() == pytest.approx(1 / (4 * 60), rel=0.03)
    assert whole.var() == pytest.approx(1 / (16 * 60), rel=0.03)
    assert (small * whole).mean() == pytest.approx(1 / (16 * 60), rel=0.05)


def test_without_perturbation_every_sample_is_the_truth():
    found = simulate(Population(size=30, outliers=(2.0,), bulk=1.0, sigma=0.0), [1, 5], repeats=2)
    for one in found.sampled:
        assert one.stable_rank == pytest.approx((4 + 29) / 4)
        assert one.limit.stable_rank == pytest.approx((4 + 29) / 4)
    assert found.eigenvalues[0][0] == pytest.approx(2.0)


def test_the_covariance_model_follows_marchenko_and_pastur_and_turns_the_claim_around():
    population = Population(size=200, bulk=1.0, model="covariance")
    found = simulate(population, [50, 200, 800], repeats=4, seed=2)
    for one in found.sampled:
        gamma = 200 / one.points
        assert one.limit.largest == pytest.approx((1 + math.sqrt(gamma)) ** 2)
        assert one.largest == pytest.approx(one.limit.largest, rel=0.06)
        assert one.squared_frobenius == pytest.approx(200 * (1 + gamma) + 200 / one.points, rel=0.04)
    ranks = [one.stable_rank for one in found.sampled]
    assert ranks == sorted(ranks), "fewer points, lower stable rank"
    assert found.larger == (0.0, 0.0)


def test_a_spiked_covariance():
    of = limit(Population(size=100, outliers=(10.0,), bulk=2.0, model="covariance"), points=400)
    assert of.largest == pytest.approx(10 * (1 + 0.25 / 4))
    assert of.separated
    lost = limit(Population(size=100, outliers=(2.2,), bulk=2.0, model="covariance"), points=400)
    assert lost.largest == pytest.approx(2 * 1.5**2)
    single = limit(Population(size=100, outliers=(10.0,), model="covariance"), points=400)
    assert single.largest == 10.0
    listed = Population(size=4, bulk=(1.0, 2.0, 3.0, 4.0), model="covariance")
    assert limit(listed, 10).stable_rank is None


def test_the_same_seed_gives_the_same_numbers():
    population = Population(size=40, outliers=(2.0,))
    one, other = (simulate(population, [5, 10], repeats=2, seed=3) for _ in range(2))
    assert one.sampled == other.sampled


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"size": 1}, "size must be"),
        ({"size": 3, "outliers": (1.0, 2.0, 3.0)}, "size must be"),
        ({"size": 4, "bulk": (1.0, 2.0)}, "must list 4 eigenvalues"),
        ({"size": 4, "sigma": -1.0}, "at least 0"),
        ({"size": 4, "bulk": -1.0, "model": "covariance"}, "at least 0"),
        ({"size": 4, "model": "sum"}, "'sum' is not known"),
    ],
)
def test_a_population_that_makes_no_sense_is_refused(settings, told):
    with pytest.raises(ValueError, match=told):
        Population(**settings)


def test_sizes_that_make_no_sense_are_refused():
    population = Population(size=10)
    with pytest.raises(ValueError, match="ascending"):
        simulate(population, [10, 5])
    with pytest.raises(ValueError, match="repeats must be at least 2"):
        simulate(population, [5, 10], repeats=1)


def test_the_example_leaves_tables_and_pictures_that_hold_the_limits(tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "examples" / "rank" / "random_matrices.py"
    example = runpy.run_path(str(path))
    monkeypatch.setitem(example["show"].__globals__, "SIZE", 60)
    monkeypatch.setitem(example["show"].__globals__, "POINTS", (20, 400))
    for _ in range(2):  # a second run starts anew
        example["main"](tmp_path)
    text = (tmp_path / "table.md").read_text()
    assert text.count("## ") == 3
    additive = text.split("## ")[1].splitlines()
    wanted = limit(Population(60, (5.0, 3.0, 2.0), sigma=10.0), 20)
    cells = [cell.strip() for cell in additive[4].strip("|").split("|")]
    assert (cells[0], cells[2], cells[4]) == ("20", f"{wanted.stable_rank:.2f}", f"{wanted.largest:.3f}")
    titles = ("additive-noise", "sample-covariance", "sample-covariance-with-outliers")
    names = {f"{title}-{what}.svg" for title in titles for what in ("stable-rank", "spectra")}
    assert {file.name for file in tmp_path.iterdir()} == {"table.md", *names}
