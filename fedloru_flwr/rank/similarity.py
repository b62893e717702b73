r"""How alike clients' gradients and updates are, whole and cut down to a rank.

For matrices ``X_k (out, in)`` of clients ``k = 1..K``,

.. math:: c_{jk} = \frac{\langle X_j, X_k \rangle}{\|X_j\|_F \|X_k\|_F}, \quad \langle X, Y \rangle = tr(X^T Y)

With ``X^{(r)}`` the best approximation of rank ``r`` (Eckart and Young), the revised FedLoRU paper (arXiv 2409.12371)
says that the ``X_k^{(r)}`` are more alike than the ``X_k``. Products of factors are never formed where
``<B_j A_j, B_k A_k> = sum((B_j^T B_k) * (A_j A_k^T))`` takes fewer operations.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # B (out, r), A (r, in)


@dataclass(frozen=True)
class Similarity:
    """How alike the vectors of ``K`` clients are.

    Attributes:
        clients: ``K`` with a vector that is not zero.
        mean: of the cosines over all pairs of different clients, in [-1, 1].
        std: their sample standard deviation; pairs share clients, so it is no standard error.
        to_mean: mean over the clients of the cosine between a client's vector and the mean of the others'.
        share: ``sum_k ||X_k^(r)||^2 / sum_k ||X_k||^2``, what the cut leaves; 1 where nothing was cut.
    """

    clients: int
    mean: float
    std: float
    to_mean: float
    share: float


def cosines(gram: Tensor) -> Tensor:
    """The cosines ``c (K, K)`` of a Gram matrix ``(K, K)`` of inner products; 0 where a vector is zero."""
    norms = gram.diagonal().clamp_min(0).sqrt()
    scale = torch.outer(norms, norms)
    return torch.where(scale > 0, gram / scale.clamp_min(torch.finfo(gram.dtype).tiny), torch.zeros_like(gram))


def gram_of_matrices(matrices: Sequence[Tensor]) -> Tensor:
    """``<X_j, X_k>`` in float64, ``(K, K)``, of tensors of one shape."""
    rows = torch.stack([matrix.reshape(-1).double() for matrix in matrices])
    return rows @ rows.T


def gram_of_pairs(pairs: Sequence[Pair]) -> Tensor:
    """``<B_j A_j, B_k A_k>`` in float64, ``(K, K)``, of pairs ``B (out, r)``, ``A (r, in)`` of one rank."""
    b, a = (torch.stack([pair[index].double() for pair in pairs]) for index in (0, 1))
    rank = a.shape[1]
    if rank * rank * (b.shape[1] + a.shape[2]) >= b.shape[1] * a.shape[2]:
        return gram_of_matrices(list(b @ a))
    # Both (K r, K r), block (j, k) being that of the clients j and k.
    left = b.transpose(1, 2).reshape(-1, b.shape[1])
    right = a.reshape(-1, a.shape[2])
    products = (left @ left.T) * (right @ right.T)
    return products.reshape(len(pairs), rank, len(pairs), rank).sum(dim=(1, 3))


def best_pair_of(matrix: Tensor, rank: int) -> Pair:
    """The best approximation of this rank as ``B = U_r S_r`` and ``A = V_r^T``; of the matrix itself if it is smaller.

    Args:
        matrix: ``(out, in)``.
        rank: at least 1.
    """
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return u[:, :rank] * s[:rank], vh[:rank]


def similarity_of(gram: Tensor, whole: float | None = None) -> Similarity | None:
    """What a Gram matrix says of how alike the clients are; None for fewer than two whose vector is not zero.

    Args:
        gram: ``(K, K)``.
        whole: ``sum_k ||X_k||^2`` before the cut; None: nothing was cut.
    """
    there = gram.diagonal() > 0
    kept = gram[there][:, there]
    count = len(kept)
    if count < 2:
        return None
    found = cosines(kept)
    pairs = found[*torch.triu_indices(count, count, offset=1)]
    # The mean of the others: inner products with it, and its norm, are sums over the Gram matrix.
    own = kept.diagonal()
    with_others = kept.sum(dim=1) - own
    others = (kept.sum() - 2 * kept.sum(dim=1) + own).clamp_min(0)
    lengths = (own * others).sqrt()
    to_mean = torch.where(lengths > 0, with_others / lengths.clamp_min(torch.finfo(lengths.dtype).tiny), 0.0)
    return Similarity(
        clients=count,
        mean=float(pairs.mean()),
        std=float(pairs.std()) if len(pairs) > 1 else 0.0,
        to_mean=float(to_mean.mean()),
        share=1.0 if whole is None else float(own.sum()) / whole if whole else 0.0,
    )


def similarities(
    vectors: Sequence[Mapping[str, Tensor]], ranks: Sequence[int] = ()
) -> dict[tuple[str, int], Similarity]:
    """Compare clients' gradients or updates, matrix by matrix and all matrices together, whole and cut.

    Vectors (biases, norms) have no rank and are left out, so that whole and cut are of the same numbers. A
    convolution's kernel is the matrix ``(out, in * prod(kernel))``.

    Args:
        vectors: one dict a client, of tensors by name, all alike.
        ranks: to cut every matrix to.

    Returns:
        By matrix (``""``: all together) and rank (0: not cut). What fewer than two clients have is absent.

    Raises:
        ValueError: fewer than two clients, a rank below 1, or the clients' tensors differ in names or shapes.
    """
    if len(vectors) < 2:
        raise ValueError(f"similarity needs at least two clients, got {len(vectors)}")
    if any(rank < 1 for rank in ranks):
        raise ValueError(f"ranks must be at least 1, got {list(ranks)}; what is not cut is always measured")
    shapes = [{name: tuple(value.shape) for name, value in vector.items()} for vector in vectors]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("clients to compare must have tensors of the same names and shapes")
    names = [name for name, shape in shapes[0].items() if len(shape) >= 2]
    grams: dict[tuple[str, int], Tensor] = {}
    for name in names:
        matrices = [vector[name].flatten(1).double() for vector in vectors]
        grams[name, 0] = gram_of_matrices(matrices)
        if ranks:
            pairs = [best_pair_of(matrix, max(ranks)) for matrix in matrices]
            for rank in ranks:
                grams[name, rank] = gram_of_pairs([(b[:, :rank], a[:rank]) for b, a in pairs])
    return _summaries(grams, names, ranks)


def pair_similarities(clients: Sequence[Mapping[str, Pair]]) -> dict[tuple[str, int], Similarity]:
    """Compare clients' updates that are products, without forming them.

    What a client has changed, from ``B A`` to ``B_k A_k``, is the pair ``[B_k, -B]``, ``[A_k; A]``.

    Args:
        clients: one dict a client, of pairs by layer.

    Returns:
        As `similarities`, of rank 0 alone.

    Raises:
        ValueError: fewer than two clients.
    """
    if len(clients) < 2:
        raise ValueError(f"similarity needs at least two clients, got {len(clients)}")
    names = list(clients[0])
    return _summaries({(name, 0): gram_of_pairs([client[name] for client in clients]) for name in names}, names, ())


def _summaries(
    grams: dict[tuple[str, int], Tensor], names: Sequence[str], ranks: Sequence[int]
) -> dict[tuple[str, int], Similarity]:
    found: dict[tuple[str, int], Similarity] = {}
    if not names:
        return found
    for rank in (0, *ranks):
        total = torch.stack([grams[name, rank] for name in names]).sum(dim=0)
        for name, gram in (("", total), *((name, grams[name, rank]) for name in names)):
            uncut = sum(float(grams[one, 0].trace()) for one in ([name] if name else names))
            one = similarity_of(gram, uncut if rank else None)
            if one is not None and math.isfinite(one.mean):
                found[name, rank] = one
    return found
