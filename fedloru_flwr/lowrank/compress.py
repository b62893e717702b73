r"""A sum of products as one pair, and the best pair of a smaller rank for it.

What a run has learnt of a layer is ``D = sum_i s_i B_i A_i``, known by its factors. The best approximation of rank
``r`` in the Frobenius norm keeps the ``r`` largest singular values (Eckart and Young). They are found from the factors:
with ``B = Q_B R_B`` and ``A^T = Q_A R_A``, ``B A = Q_B (R_B R_A^T) Q_A^T``, so that the decomposition is of a small
matrix.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedloru_flwr.lowrank.factors import Adapter, FactorisedLayer, as_pair, concatenate, single_thread


def has_zero_product(layer: FactorisedLayer, adapter: Mapping[str, Tensor]) -> bool:
    """Whether an adapter's product is zero because one of its tensors is, as after a restart."""
    keys = (layer.delta_key, *layer.hadamard_keys, layer.a_key, layer.b_key)
    return any(not bool(adapter[key].any()) for key in keys if key in adapter)


def join(layer: FactorisedLayer, adapters: Sequence[tuple[Mapping[str, Tensor], float]]) -> Adapter | None:
    """Return ``sum_i s_i B_i A_i`` of one layer as one pair of scale 1, or None where all products are zero.

    The rank is the sum of the ranks of the products that are not zero, at most the layer's own; see `concatenate`.

    Args:
        layer: gives the keys and shapes.
        adapters: pairs of an adapter and its scale ``s_i``; one that has nothing of this layer must not be among them.
    """
    there = [(adapter, scale) for adapter, scale in adapters if not has_zero_product(layer, adapter)]
    return concatenate(there, [layer]) if there else None


def core(b: Tensor, a: Tensor) -> Tensor:
    """A matrix with the singular values of ``B A``, of ``B (out, R)`` and ``A (R, in)``."""
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        return b @ a
    left, right = (torch.linalg.qr(one, mode="r").R for one in (b, a.T))
    small: Tensor = left @ right.T
    return small


def stable_rank(layer: FactorisedLayer, adapter: Mapping[str, Tensor]) -> float:
    """``||D||_F^2 / ||D||_2^2`` of an adapter's product, between 1 and its rank; 0 where the product is zero."""
    a, b = as_pair(layer, adapter)
    with single_thread():
        squares = torch.linalg.svdvals(core(b.detach().cpu().double(), a.detach().cpu().double())).square()
    return float(squares.sum() / squares[0]) if squares[0] else 0.0


def compress(layer: FactorisedLayer, adapter: Mapping[str, Tensor], rank: int) -> tuple[Adapter, float]:
    r"""Return the best pair of rank ``min(rank, its own)`` for an adapter's product, and the relative error.

    With the singular values ``S`` of the product and ``U``, ``V`` its singular vectors, ``B = U_r sqrt(S_r)`` and
    ``A = sqrt(S_r) V_r^T``; the error is ``||D - B A||_F / ||D||_F = sqrt(sum_{i>r} S_i^2 / sum_i S_i^2)``. Computed in
    float64; from the factors' QR decompositions where their rank is below the layer's, else from the product itself.

    Args:
        layer: gives the keys and shapes.
        adapter: a pair, a Hadamard product or a bare product.
        rank: at least 1.

    Returns:
        A pair ``A (r, in, *kernel)``, ``B (out, r, 1, ...)`` in the number format of the adapter (at least float32),
        and the error: 0 where no singular value was left out.

    Raises:
        ValueError: if ``rank`` is below 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    a, b = as_pair(layer, adapter)
    with single_thread():
        if len(a) >= layer.max_rank:
            u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
        else:
            q_b, r_b = torch.linalg.qr(b.double())
            q_a, r_a = torch.linalg.qr(a.double().T)
            u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
            u, vh = q_b @ u, vh @ q_a.T
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    pair = {
        layer.a_key: (root[:, None] * vh[:kept]).to(a.dtype).reshape(layer.a_shape(kept)),
        layer.b_key: (u[:, :kept] * root).to(b.dtype).reshape(layer.b_shape(kept)),
    }
    whole = float(torch.linalg.vector_norm(s))
    return pair, float(torch.linalg.vector_norm(s[kept:])) / whole if whole > 0 else 0.0


def relative_difference(exact: Tensor, other: Tensor) -> float:
    """``||X - Y||_F / ||X||_F`` in float64, where ``X`` is zero ``||Y||_F``; tensors of one shape."""
    x, y = exact.detach().cpu().double(), other.detach().cpu().double()
    norm = float(torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x - y)) / (norm or 1.0)
