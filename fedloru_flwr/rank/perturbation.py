r"""The theorem's setting as a simulation: Hessians of dependent sub-samples as perturbed random matrices.

From a distribution ``N`` points are drawn, and of these ``M < N`` once more: a server's data and a client's. FedLoRU's
Theorem 3.2 (arXiv 2409.12371) says that, as the number ``R`` of parameters grows, the Hessian on ``M`` has the larger
stable rank. What is simulated here is our reading of the paper's description: the paper's own proof was not at hand.

**Additive model.** A point's Hessian is the true one and a perturbation of its own, ``H_i = H + E_i``, with ``E_i``
independent, symmetric and Gaussian, of variance ``sigma^2 / R`` off the diagonal and twice that on it. So

.. math:: H_N = H + \frac{1}{N} \sum_{i \le N} E_i, \qquad H_M = H + \frac{1}{M} \sum_{i \le M} E_i

depend on each other, by the shared points. But ``H_M - H_N`` does not depend on ``H_N``: the two are *decoupled* into
``H_M = H_N + X``, ``X`` of variance ``sigma^2 (1/M - 1/N) / R``, which is how they are drawn here, exactly. With
``s = sigma / sqrt(N)`` and the ``R`` eigenvalues ``t`` of ``H``, of which finitely many are outliers ``theta``:

- ``E ||H_N||_F^2 = sum_t t^2 + s^2 (R + 1)``, exactly;
- with the mean over the bulk, an outlier ``theta`` of ``H`` becomes one of ``H_N`` at
  ``theta + s^2 mean 1 / (theta - t)`` if ``s^2 mean 1 / (theta - t)^2 < 1``, else it is lost in the bulk, whose edge is
  at the ``x`` beyond all ``t`` where ``s^2 mean 1 / (x - t)^2 = 1`` (Capitaine, Donati-Martin, Féral and Février 2011,
  doi 10.1214/EJP.v16-934). For a bulk of zeros: ``theta + s^2 / theta`` if ``|theta| > s``, and the edge ``2 s``.

**Covariance model.** What the additive model leaves out is that a sum of few terms has a low rank. Of the Gauss-Newton
part of a Hessian, ``H_N = (1/N) sum_i x_i x_i^T`` with Gaussian ``x_i`` of covariance ``H``:

- ``E ||H_N||_F^2 = (1 + 1/N) sum_t t^2 + (sum_t t)^2 / N``, exactly;
- with ``gamma = R / N`` and a bulk of ``t = b``, an outlier ``theta = b l`` lies at ``b l (1 + gamma / (l - 1))`` if
  ``l > 1 + sqrt(gamma)``, and the edge at ``b (1 + sqrt(gamma))^2`` (Baik and Silverstein, arXiv math/0408165).
  With ``b = 0`` it lies at ``theta``.

There the stable rank *falls* as the sample gets smaller. Which of the two a network's Hessian resembles is a matter of
measurement, not of this theory.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fedloru_flwr.lowrank import derive_seed

Model = Literal["additive", "covariance"]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Population:
    """The true Hessian's spectrum, and how a point departs from it.

    Attributes:
        size: ``R``, the number of parameters.
        outliers: the eigenvalues ``theta`` apart from the bulk.
        bulk: the other ``R - len(outliers)`` eigenvalues: one number for all of them, or as many numbers.
        sigma: scale of a point's perturbation (additive model).
        model: ``"additive"`` or ``"covariance"``.
    """

    size: int
    outliers: tuple[float, ...] = ()
    bulk: float | tuple[float, ...] = 0.0
    sigma: float = 1.0
    model: Model = "additive"

    def __post_init__(self) -> None:
        if self.model not in ("additive", "covariance"):
            raise ValueError(f"model = {self.model!r} is not known, expected 'additive' or 'covariance'")
        if self.size < 2 or len(self.outliers) >= self.size:
            raise ValueError(f"size must be at least 2 and above the number of outliers, got {self.size}")
        if isinstance(self.bulk, tuple) and len(self.bulk) != self.size - len(self.outliers):
            raise ValueError(
                f"bulk must list {self.size - len(self.outliers)} eigenvalues (size less outliers) or be one number, "
                f"got {len(self.bulk)}"
            )
        if self.sigma < 0 or (self.model == "covariance" and self.spectrum.min() < 0):
            raise ValueError("sigma, and the eigenvalues of a covariance, must be at least 0")

    @property
    def rest(self) -> Matrix:
        """The bulk's eigenvalues ``(R - k,)``."""
        return np.broadcast_to(np.asarray(self.bulk, dtype=np.float64), (self.size - len(self.outliers),))

    @property
    def spectrum(self) -> Matrix:
        """All eigenvalues ``(R,)``, outliers first."""
        return np.concatenate([np.asarray(self.outliers, dtype=np.float64), self.rest])


@dataclass(frozen=True)
class Limit:
    """What the theory gives for a sample of some size.

    Attributes:
        largest: the largest absolute eigenvalue, in the limit; None where it is not known in closed form.
        squared_frobenius: ``E ||H||_F^2``, exact for every size.
        stable_rank: their quotient.
        separated: whether the largest eigenvalue is an outlier; else it is the bulk's edge.
    """

    largest: float | None
    squared_frobenius: float
    stable_rank: float | None
    separated: bool


@dataclass(frozen=True)
class Sampled:
    """What was found on samples of one size.

    Attributes:
        points: the number of points.
        stable_rank: mean over the repetitions.
        stable_rank_error: its standard error.
        largest: largest absolute eigenvalue, mean over the repetitions.
        largest_error: its standard error.
        squared_frobenius: mean over the repetitions.
        limit: what the theory gives.
    """

    points: int
    stable_rank: float
    stable_rank_error: float
    largest: float
    largest_error: float
    squared_frobenius: float
    limit: Limit


@dataclass(frozen=True)
class Simulation:
    """What came of `simulate`.

    Attributes:
        sampled: by sample size, in the order asked for; the last is the whole.
        larger: for each smaller sample the share of repetitions in which its stable rank exceeded the whole's.
        eigenvalues: of the last repetition, largest first, ``(R,)`` for each size.
    """

    sampled: tuple[Sampled, ...]
    larger: tuple[float, ...]
    eigenvalues: tuple[Matrix, ...]


def limit(population: Population, points: int) -> Limit:
    """What the theory gives for the Hessian on ``points`` points; see the module's formulas."""
    t, count = population.spectrum, float(points)
    largest: float | None
    if population.model == "additive":
        variance = population.sigma**2 / count
        squared = float((t**2).sum()) + variance * (population.size + 1)
        largest, separated = _additive_largest(population, variance)
    else:
        squared = (1 + 1 / count) * float((t**2).sum()) + float(t.sum()) ** 2 / count
        largest, separated = _covariance_largest(population, count)
    return Limit(largest, squared, squared / largest**2 if largest else None, separated)


def simulate(
    population: Population,
    points: Sequence[int],
    *,
    repeats: int = 10,
    seed: int = 0,
    on_repeat: Callable[[], None] = lambda: None,
) -> Simulation:
    """Draw nested samples, each part of the next, and measure the Hessians' eigenvalues.

    Args:
        population: what is drawn from.
        points: sample sizes in ascending order; the last is ``N``, the whole.
        repeats: independent repetitions, at least 2.
        seed: of the draws.
        on_repeat: called after each repetition.

    Raises:
        ValueError: the sizes do not ascend from 1, or there are fewer than two repetitions.
    """
    sizes = tuple(points)
    if not sizes or sizes[0] < 1 or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"points must be sample sizes in ascending order, from 1 on, got {list(sizes)}")
    if repeats < 2:
        raise ValueError(f"repeats must be at least 2, for a standard error, got {repeats}")
    found = np.zeros((repeats, len(sizes), population.size))
    for repeat in range(repeats):
        rng = np.random.default_rng(derive_seed(seed, "perturbation", repeat))
        draw = _additive if population.model == "additive" else _covariance
        for index, matrix in enumerate(draw(population, sizes, rng)):
            found[repeat, index] = np.linalg.eigvalsh(matrix)[::-1]
        on_repeat()
    largest = np.abs(found).max(axis=2)
    squared = (found**2).sum(axis=2)
    stable = squared / largest**2
    sampled = tuple(
        Sampled(
            points=size,
            stable_rank=float(stable[:, index].mean()),
            stable_rank_error=float(stable[:, index].std(ddof=1) / math.sqrt(repeats)),
            largest=float(largest[:, index].mean()),
            largest_error=float(largest[:, index].std(ddof=1) / math.sqrt(repeats)),
            squared_frobenius=float(squared[:, index].mean()),
            limit=limit(population, size),
        )
        for index, size in enumerate(sizes)
    )
    larger = tuple(float((stable[:, index] > stable[:, -1]).mean()) for index in range(len(sizes) - 1))
    return Simulation(sampled, larger, tuple(found[-1]))


def _symmetric_noise(size: int, rng: np.random.Generator) -> Matrix:
    """Gaussian, symmetric, of variance ``1 / R`` off the diagonal and ``2 / R`` on it."""
    drawn = rng.standard_normal((size, size))
    return np.asarray((drawn + drawn.T) / math.sqrt(2 * size))


def _additive(population: Population, sizes: Sequence[int], rng: np.random.Generator) -> list[Matrix]:
    """From the whole down: each smaller sample is the next larger one and an independent perturbation."""
    matrix = np.diag(population.spectrum)
    variance, found = 0.0, []
    for size in reversed(sizes):
        wanted = population.sigma**2 / size
        matrix = matrix + math.sqrt(wanted - variance) * _symmetric_noise(population.size, rng)
        variance = wanted
        found.append(matrix)
    return found[::-1]


def _covariance(population: Population, sizes: Sequence[int], rng: np.random.Generator) -> list[Matrix]:
    """From the smallest up: each larger sample has further points."""
    scale = np.sqrt(population.spectrum)
    total, drawn, found = np.zeros((population.size, population.size)), 0, []
    for size in sizes:
        points = rng.standard_normal((size - drawn, population.size)) * scale
        total = total + points.T @ points
        drawn = size
        found.append(total / size)
    return found


def _additive_largest(population: Population, variance: float) -> tuple[float, bool]:
    rest = population.rest
    top = _edge(rest, variance)
    bottom = _edge(-rest, variance)
    candidates = [(top, False), (bottom, False)]
    for theta in population.outliers:
        gaps = theta - rest
        outside = theta > rest.max() or theta < rest.min()
        if outside and variance * float((1 / gaps**2).mean()) < 1:
            candidates.append((abs(theta + variance * float((1 / gaps).mean())), True))
    return max(candidates)


def _edge(rest: Matrix, variance: float) -> float:
    """The upper edge of the perturbed bulk: ``x + s^2 mean 1 / (x - t)`` where ``s^2 mean 1 / (x - t)^2 = 1``."""
    highest = float(rest.max())
    if not variance:
        return highest
    # By the distance from the highest: beside a large one, a small scale would be lost in rounding.
    below = highest - rest
    low, high = 0.0, math.sqrt(variance)  # there the mean is at most 1 / s^2
    for _ in range(200):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (
            (middle, high) if float(((math.sqrt(variance) / (middle + below)) ** 2).mean()) > 1 else (low, middle)
        )
    return highest + (high + variance * float((1 / (high + below)).mean()))


def _covariance_largest(population: Population, count: float) -> tuple[float | None, bool]:
    if isinstance(population.bulk, tuple):
        return None, False
    bulk, gamma = population.bulk, population.size / count
    candidates = [(bulk * (1 + math.sqrt(gamma)) ** 2, False)]
    for theta in population.outliers:
        if bulk == 0:
            candidates.append((theta, True))
        elif (ratio := theta / bulk) > 1 + math.sqrt(gamma):
            candidates.append((theta * (1 + gamma / (ratio - 1)), True))
    return max(candidates)
