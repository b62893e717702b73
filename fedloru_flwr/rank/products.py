r"""The rank of what a model has learned: ``D = W - W_0`` of each layer, and what every ledger entry has added.

With the singular values ``s_1 >= s_2 >= ...`` of ``D (out, in)``:

- stable rank ``||D||_F^2 / ||D||_2^2``;
- effective rank ``exp(-sum_i p_i log p_i)`` with ``p_i = s_i / sum_j s_j`` (Roy and Vetterli, EUSIPCO 2007);
- ``rank_90``: the fewest singular values with 90 % of ``||D||_F^2``.

After ``n`` accumulations ``D = sum_i s_i B_i A_i`` (FedLoRU, arXiv 2409.12371, section 4), a pair of rank
``R = sum_i r_i``: with ``B = Q_b R_b`` and ``A^T = Q_a R_a`` its singular values are those of ``R_b R_a^T (R, R)``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloru_flwr.lowrank import FactorisedLayer, as_pair
from fedloru_flwr.lowrank.compress import core
from fedloru_flwr.lowrank.factors import has_product, single_thread

Scaled = tuple[Mapping[str, Tensor], float]  # an adapter and its scale
_SPANNED = 1e-6  # singular values below this share of the largest are rounding in float32


@dataclass(frozen=True)
class MatrixRank:
    """How many directions a matrix has.

    Attributes:
        singular_values: in float64, largest first.
        frobenius: ``||D||_F``.
        stable_rank: 0 for a matrix of zeros.
        effective_rank: 0 for a matrix of zeros.
        rank_90: see the module.
        numerical_rank: singular values above a millionth of the largest.
    """

    singular_values: tuple[float, ...]
    frobenius: float
    stable_rank: float
    effective_rank: float
    rank_90: int
    numerical_rank: int


@dataclass(frozen=True)
class EntryShare:
    r"""What one entry ``P = s B A`` adds to those before it.

    With ``Pi_c`` and ``Pi_r`` the projectors on what the column spaces, and the row spaces, of the earlier entries span
    together, also where the entries cancel out:

    Attributes:
        frobenius: ``||P||_F``.
        new_columns: ``||(I - Pi_c) P||_F^2 / ||P||_F^2``, the share in output directions that are new; 0 for ``P = 0``.
        new_rows: ``||P (I - Pi_r)||_F^2 / ||P||_F^2``, the share in input directions that are new.
        new: ``||(I - Pi_c) P (I - Pi_r)||_F^2 / ||P||_F^2``, the share that is new on both sides.
        alignment: the cosine between ``P`` and the sum of the earlier ones; below 0 it takes back what they did.
        total: of the sum up to this entry.
    """

    frobenius: float
    new_columns: float
    new_rows: float
    new: float
    alignment: float
    total: MatrixRank


def rank_of_values(values: Tensor) -> MatrixRank:
    """The ranks that singular values ``(k,)``, largest first, stand for."""
    values = values.double()
    squares = values.square()
    total = float(squares.sum())
    if not total:
        return MatrixRank(tuple(values.tolist()), 0.0, 0.0, 0.0, 0, 0)
    shares = values / values.sum()
    entropy = -float((shares * shares.clamp_min(torch.finfo(torch.float64).tiny).log()).sum())
    reached = squares.cumsum(0) >= 0.9 * total * (1 - 1e-12)
    return MatrixRank(
        singular_values=tuple(values.tolist()),
        frobenius=total**0.5,
        stable_rank=total / float(squares[0]),
        effective_rank=float(torch.tensor(entropy, dtype=torch.float64).exp()),
        rank_90=int(reached.int().argmax()) + 1,
        numerical_rank=int((values > _SPANNED * values[0]).sum()),
    )


def matrix_rank(matrix: Tensor) -> MatrixRank:
    """The ranks of a matrix ``(out, in)``; of a tensor of more dimensions, all but the first are joined."""
    with single_thread():
        return rank_of_values(torch.linalg.svdvals(matrix.detach().cpu().flatten(1).double()))


def product_rank(b: Tensor, a: Tensor) -> MatrixRank:
    """The ranks of ``B A`` of ``B (out, R)`` and ``A (R, in)``, formed only where that is the smaller matrix."""
    with single_thread():
        return rank_of_values(torch.linalg.svdvals(core(b.double(), a.double())))


def ledger_ranks(layer: FactorisedLayer, entries: Sequence[Scaled]) -> list[EntryShare]:
    """What each entry adds in one layer, oldest first; entries that say nothing of the layer are left out.

    Args:
        layer: gives the keys and shapes.
        entries: adapters, a one-sided method's ``A`` included, with their scales.
    """
    pairs = []
    for adapter, scale in entries:
        if has_product(layer, adapter):
            a, b = as_pair(layer, adapter)
            pairs.append((b.detach().cpu().double() * scale, a.detach().cpu().double()))
    found = []
    columns = rows = torch.empty(0)
    with single_thread():
        for index, (b, a) in enumerate(pairs):
            if not index:
                columns, rows = b[:, :0], a[:0].T
            before_b = torch.cat([b.new_zeros(len(b), 0), *(one for one, _ in pairs[:index])], dim=1)
            before_a = torch.cat([a.new_zeros(0, a.shape[1]), *(one for _, one in pairs[:index])])
            new_b, new_a = b - columns @ (columns.T @ b), a - (a @ rows) @ rows.T
            own, norm = _norm(b, a), _norm(before_b, before_a)
            inner = float(((b.T @ before_b) * (a @ before_a.T)).sum())
            found.append(
                EntryShare(
                    frobenius=own,
                    new_columns=_share(_norm(new_b, a), own),
                    new_rows=_share(_norm(b, new_a), own),
                    new=_share(_norm(new_b, new_a), own),
                    alignment=inner / (own * norm) if own and norm else 0.0,
                    total=product_rank(torch.cat([before_b, b], dim=1), torch.cat([before_a, a])),
                )
            )
            # Of each entry by itself: in the sum of the entries one may hide what another has done.
            own_columns, own_rows = _basis(b, a)
            columns, rows = _joined(columns, own_columns), _joined(rows, own_rows)
    return found


def _norm(b: Tensor, a: Tensor) -> float:
    return float(torch.linalg.matrix_norm(core(b, a))) if b.numel() and a.numel() else 0.0


def _basis(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal bases ``(out, k)`` and ``(in, k)`` of the column and row space of ``B A``."""
    if b.shape[1] >= min(b.shape[0], a.shape[1]):
        u, s, vh = torch.linalg.svd(b @ a, full_matrices=False)
        columns, rows = u, vh.T
    else:
        left, right = torch.linalg.qr(b), torch.linalg.qr(a.T)
        u, s, vh = torch.linalg.svd(left.R @ right.R.T)
        columns, rows = left.Q @ u, right.Q @ vh.T
    spanned = s > _SPANNED * s[0] if float(s[0]) else torch.zeros_like(s, dtype=torch.bool)
    return columns[:, spanned], rows[:, spanned]


def _joined(basis: Tensor, more: Tensor) -> Tensor:
    """An orthonormal basis ``(n, k)`` of what two of them span together."""
    for _ in range(2):  # the second pass takes away what rounding has left
        more = more - basis @ (basis.T @ more)
    u, s, _ = torch.linalg.svd(more, full_matrices=False)
    return torch.cat([basis, u[:, s > _SPANNED]], dim=1)


def _share(part: float, whole: float) -> float:
    return min((part / whole) ** 2, 1.0) if whole else 0.0
