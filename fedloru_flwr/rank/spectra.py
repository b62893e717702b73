r"""The stable rank of a symmetric operator, from products alone.

.. math:: \mathrm{srank}(H) = \|H\|_F^2 / \|H\|_2^2

**Spectral norm.** Lanczos with full reorthogonalisation and thick restarts (Wu and Simon 2000, doi
10.1137/S0895479898334605) builds orthonormal ``V (m, n)`` with ``H V^T = V^T T + beta v e_m^T``. An eigenvalue
``theta`` of ``T`` with eigenvector ``y`` lies within ``beta |y_m|`` of one of ``H``.

**Frobenius norm.** With ``P = V^T V`` the projector on what Lanczos has found,

.. math:: \|H\|_F^2 = \|H P\|_F^2 + \|H (I - P)\|_F^2 = \|T\|_F^2 + \beta^2 + (n - m)\,E\,\|H z\|^2

for ``z`` uniform on the unit sphere of the ``n - m`` dimensions that are left (Hutchinson's estimator, 1990): the large
eigenvalues are taken exactly, chance has only the rest, as in Hutch++ (Meyer et al., arXiv 2010.09649). The standard
error is that of the mean over probes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloru_flwr.lowrank import derive_seed, uniform
from fedloru_flwr.rank.operators import LossHessian, SymmetricOperator, check_precision

_RESIDUAL = 1e-3  # of the spectral norm, where Lanczos may stop: the eigenvalue's error is about its square
_LOOK_EVERY = 4  # steps
_LEAST_PROBES = 16  # with fewer, the error of their mean is itself known badly


@dataclass(frozen=True)
class Spectrum:
    """What was found of a symmetric matrix's spectrum.

    Attributes:
        size: ``n``.
        stable_rank: ``||H||_F^2 / ||H||_2^2``, between 1 and the rank; 0 for a matrix of zeros.
        stable_rank_error: root of the squares of its standard error, which at the least number of probes has fifteen
            degrees of freedom, and of what the spectral norm's residual, a bound, may add: a guide to its error.
        frobenius: ``||H||_F``.
        frobenius_error: its standard error; 0 where it was computed without chance.
        spectral: ``||H||_2``, the largest absolute eigenvalue.
        spectral_error: Lanczos's residual: an eigenvalue lies within so much of it.
        largest: the largest eigenvalue.
        smallest: the smallest eigenvalue.
        products: how many products with ``H`` it took.
        probes: how many of them were random probes.
        converged: whether the spectral norm's residual is at most a thousandth of it, and the Frobenius norm's
            standard error within the tolerance.
    """

    size: int
    stable_rank: float
    stable_rank_error: float
    frobenius: float
    frobenius_error: float
    spectral: float
    spectral_error: float
    largest: float
    smallest: float
    products: int
    probes: int
    converged: bool


@dataclass
class _Krylov:
    """What Lanczos has built: ``basis (m, n)``, ``projected (m, m)`` in float64, and the coupling ``beta``."""

    basis: Tensor
    projected: Tensor
    coupling: float
    converged: bool


def spectrum(
    operator: SymmetricOperator,
    *,
    tolerance: float = 0.01,
    steps: int = 32,
    basis: int = 64,
    max_steps: int = 400,
    max_probes: int = 200,
    seed: int = 0,
    on_product: Callable[[], None] = lambda: None,
) -> Spectrum:
    """Measure a matrix's stable rank and what it is made of.

    A matrix of at most ``steps`` rows is formed and diagonalised; a larger one is measured as the module says.

    Args:
        operator: the matrix.
        tolerance: probes are added until the standard error of ``||H||_F^2`` is at most so much of it.
        steps: Lanczos steps at least; more take more of the spectrum away from chance.
        basis: vectors of ``n`` numbers that Lanczos may keep before it restarts: what bounds its memory.
        max_steps: Lanczos steps at most.
        max_probes: probes at most; there are at least sixteen.
        seed: of the starting vector and the probes; the result is a function of it.
        on_product: called after each product, for progress.

    Raises:
        ValueError: a limit makes no sense, the operator's numbers are neither float32 nor float64, or it gives some
            that are not finite.
    """
    check_precision(operator.dtype)
    _check(tolerance, steps, basis, max_steps, max_probes)
    counted = _Counted(operator, on_product)
    if operator.size <= steps:
        eye = torch.eye(operator.size, dtype=operator.dtype, device=operator.device)
        matrix = torch.stack([counted.product(column) for column in eye]).double()
        values = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
        squared, error, probes = float(values.square().sum()), 0.0, 0
        residual, converged = 0.0, True
    else:
        krylov = _lanczos(counted, steps, min(basis, operator.size), max_steps, seed)
        values, vectors = torch.linalg.eigh(krylov.projected)
        residual = krylov.coupling * abs(float(vectors[-1, int(values.abs().argmax())]))
        found = float(krylov.projected.square().sum()) + krylov.coupling**2
        rest, error, probes = _probed(counted, krylov.basis, found, tolerance, max_probes, seed)
        squared = found + rest
        converged = krylov.converged and error <= tolerance * squared
    spectral = float(values.abs().max())
    if not spectral:
        return Spectrum(operator.size, *(0.0,) * 8, counted.count, probes, converged)
    frobenius, stable, unit = math.sqrt(squared), squared / spectral**2, counted.unit
    return Spectrum(
        size=operator.size,
        stable_rank=stable,
        stable_rank_error=math.hypot(error / spectral**2, 2 * stable * residual / spectral),
        frobenius=frobenius * unit,
        frobenius_error=error / (2 * frobenius) * unit,
        spectral=spectral * unit,
        spectral_error=residual * unit,
        largest=float(values.max()) * unit,
        smallest=float(values.min()) * unit,
        products=counted.count,
        probes=probes,
        converged=converged,
    )


def stable_ranks(
    hessian: LossHessian,
    *,
    layers: bool = True,
    tolerance: float = 0.01,
    seed: int = 0,
    on_product: Callable[[], None] = lambda: None,
) -> dict[str, Spectrum]:
    """Measure a Hessian as a whole, under the name ``""``, and each layer's diagonal block under the layer's.

    Args:
        hessian: of a model, see `module_hessian` and `adapter_hessian`.
        layers: whether to measure blocks.
        tolerance: see `spectrum`.
        seed: see `spectrum`.
        on_product: see `spectrum`.
    """
    found = {"": spectrum(hessian, tolerance=tolerance, seed=seed, on_product=on_product)}
    if layers:
        for name, keys in hessian.layers().items():
            block = hessian.restricted(keys)
            found[name] = spectrum(block, tolerance=tolerance, seed=seed, on_product=on_product)
    return found


class _Counted:
    """An operator whose products are counted and checked, in a unit in which squares neither vanish nor overflow.

    Attributes:
        count: of products so far.
        unit: what a 1 stands for: the power of two at the largest number of the first product that is not zero. Nothing
            is rounded by it.
    """

    def __init__(self, operator: SymmetricOperator, on_product: Callable[[], None]) -> None:
        self.operator = operator
        self._on_product = on_product
        self.count = 0
        self.unit = 0.0

    def product(self, vector: Tensor) -> Tensor:
        """``H v``."""
        found = self.operator.product(vector)
        self.count += 1
        self._on_product()
        if not bool(found.isfinite().all()):
            raise ValueError(
                "a product with the Hessian has numbers that are not finite: the model or its loss has diverged, or "
                "the loss cannot be differentiated twice; check the weights, or use float64"
            )
        if not self.unit and (top := float(found.abs().max())):
            self.unit = math.ldexp(0.5, math.frexp(top)[1])
        # By float64's division: the unit's inverse may be no number of the operator's kind.
        return (found.double() / self.unit).to(found.dtype) if self.unit else found


def _check(tolerance: float, steps: int, basis: int, max_steps: int, max_probes: int) -> None:
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, such as 0.01, got {tolerance}")
    if steps < 2 or basis < steps or max_steps < steps:
        raise ValueError(
            f"expected 2 <= steps <= basis and steps <= max_steps, got steps = {steps}, basis = {basis}, max_steps = "
            f"{max_steps}"
        )
    if max_probes < _LEAST_PROBES:
        raise ValueError(f"max_probes must be at least {_LEAST_PROBES}, for a standard error, got {max_probes}")


def _lanczos(counted: _Counted, least: int, most: int, max_steps: int, seed: int) -> _Krylov:
    """Build a basis until the spectral norm is known; a full one restarts from the better half of what it holds."""
    operator = counted.operator
    kept = torch.empty(most, operator.size, dtype=operator.dtype, device=operator.device)
    projected = torch.zeros(most, most, dtype=torch.float64)
    vector = uniform(seed, "lanczos", shape=(operator.size,), bound=1.0).to(operator.device, operator.dtype)
    vector = vector / torch.linalg.vector_norm(vector)
    filled, scale = 0, 0.0
    while True:
        kept[filled] = vector
        filled += 1
        basis = kept[:filled]
        image = counted.product(vector)
        scale = max(scale, float(torch.linalg.vector_norm(image)))
        row = torch.zeros(filled, dtype=torch.float64)
        for _ in range(2):  # the second pass takes away what rounding has left
            part = basis @ image
            image = image - part @ basis
            row += part.double().cpu()
        projected[:filled, filled - 1] = projected[filled - 1, :filled] = row
        coupling = float(torch.linalg.vector_norm(image))
        exhausted = coupling <= 10 * torch.finfo(operator.dtype).eps * scale or filled == operator.size
        if exhausted:
            return _Krylov(basis, projected[:filled, :filled], 0.0, True)
        last = counted.count >= max_steps
        if filled % _LOOK_EVERY == 0 or filled == most or last:
            values, vectors = torch.linalg.eigh(projected[:filled, :filled])
            known = _is_known(values, coupling * vectors[-1].abs())
            if (known and counted.count >= least) or last:
                return _Krylov(basis, projected[:filled, :filled], coupling, known)
            if filled == most:
                filled = _restart(kept, projected, values, vectors)
        vector = image / coupling


def _is_known(values: Tensor, residuals: Tensor) -> bool:
    """Whether the outermost value has settled, and the other end can no longer overtake it."""
    top = int(values.abs().argmax())
    end = 0 if top else len(values) - 1
    settled = float(residuals[top]) <= _RESIDUAL * float(values[top].abs())
    # A spectrum as large below 0 as above it has two ends that never part by more than rounding.
    return settled and float(values[end].abs() + residuals[end]) <= (1 + _RESIDUAL) * float(values[top].abs())


def _restart(kept: Tensor, projected: Tensor, values: Tensor, vectors: Tensor) -> int:
    """Keep the Ritz vectors of the larger half; return how many."""
    count = len(values) // 2
    best = values.abs().argsort(descending=True)[:count]
    kept[:count] = vectors[:, best].T.to(kept.device, kept.dtype) @ kept[: len(values)]
    projected.zero_()
    projected[:count, :count] = torch.diag(values[best])
    return count


def _probed(
    counted: _Counted, basis: Tensor, found: float, tolerance: float, most: int, seed: int
) -> tuple[float, float, int]:
    """``||H (I - P)||_F^2``, its standard error, and how many probes it took."""
    operator = counted.operator
    left = operator.size - len(basis)
    if not left:
        return 0.0, 0.0, 0
    seen: list[float] = []
    while True:
        generator = torch.Generator().manual_seed(derive_seed(seed, "probe", len(seen)))
        probe = torch.randn(operator.size, generator=generator).to(operator.device, operator.dtype)
        for _ in range(2):
            probe = probe - (basis @ probe) @ basis
        image = counted.product(probe / torch.linalg.vector_norm(probe))
        seen.append(left * float(torch.linalg.vector_norm(image, dtype=torch.float64)) ** 2)
        if len(seen) < _LEAST_PROBES:
            continue
        mean = math.fsum(seen) / len(seen)
        variance = math.fsum((one - mean) ** 2 for one in seen) / (len(seen) - 1)
        error = math.sqrt(variance / len(seen))
        if error <= tolerance * (found + mean) or len(seen) >= most:
            return mean, error, len(seen)
