r"""Which rank, which ``tau``, which layers: a proposal from a short full-rank pilot, and what it rests on.

The pilot is FedAvg on the same data, clients and network for ``T`` rounds, whose models ``W_t`` are kept. For a layer,

.. math:: e(r, \tau) = \frac{\sum_t \|(W_{t + \tau} - W_t)^{(r)}\|_F^2}{\sum_t \|W_{t + \tau} - W_t\|_F^2}

is the share of what full-rank training does in ``tau`` rounds that fits into a pair of rank ``r``: what FedLoRU's
pair has to hold between two accumulations. It falls with ``tau`` and rises with ``r``.

A layer that never moved says nothing and is left out. A period of more than half the pilot would be seen once alone, so
that ``tau`` is at most ``T / 2``.

- **Layers** of a rank and a period: those whose factors have at most half their weight's numbers, and whose own ``e``
  is at least ``layer_target``. The others stay dense.
- **Rank and tau**: the cheapest point with ``e(r, tau) >= target`` over these layers, each weighing as much as it
  moves. A contact costs ``r`` up, ``r`` down, and the ``1 / (C tau)`` entries of rank ``r`` that the client has missed,
  ``C`` being the share of the clients in a round: ``r (2 + 1 / (C tau)) (out + in)`` numbers a layer, ``2 out in`` for
  a dense one.

Beside it stands, without a rule that uses it, how much of the update is common to the clients: with the mean updates
``M_1, M_2`` of two halves of them, ``<M_1^{(r)}, M_2> / <M_1, M_2>``, to which what the halves do not share adds
nothing on average. All of it is a heuristic of this package: the paper (arXiv 2409.12371) gives no rule.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedloru_flwr.rank.similarity import best_pair_of

RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
PERIODS = (1, 2, 3, 5, 10, 20, 50)
TARGET, LAYER_TARGET = 0.8, 0.6


@dataclass(frozen=True)
class Evidence:
    """What a pilot says of one layer.

    Attributes:
        layer: the module's name.
        shape: ``(out_features, in_features)``.
        moved: ``sum_t ||W_{t+1} - W_t||_F^2``.
        held: ``e(r, tau)`` by rank and period.
        common: by rank the share of the common update that the cut keeps; absent where halves have nothing in common.
    """

    layer: str
    shape: tuple[int, int]
    moved: float
    held: Mapping[tuple[int, int], float]
    common: Mapping[int, float]

    def fits(self, rank: int) -> bool:
        """Whether factors of this rank have at most half the weight's numbers, and fewer rows than it has."""
        return rank < min(self.shape) and 2 * rank * sum(self.shape) <= self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Advice:
    """A proposal.

    Attributes:
        rank: ``r``.
        every: ``tau``.
        layers: to factorise.
        reached: the layers' ``e(r, tau)`` together.
        cost: numbers that a contact moves, up and down, all layers together.
        met: whether the target was met; else this is the point that comes nearest.
        evidence: of all layers that could be looked at, and moved.
    """

    rank: int
    every: int
    layers: tuple[str, ...]
    reached: float
    cost: float
    met: bool
    evidence: tuple[Evidence, ...]

    @property
    def dense_cost(self) -> int:
        """Numbers that a contact moves where all of these layers are dense."""
        return sum(2 * one.shape[0] * one.shape[1] for one in self.evidence)

    @property
    def moved(self) -> float:
        """The share of all layers' movement, in squared norm, that is of those to factorise."""
        total = sum(one.moved for one in self.evidence)
        return sum(one.moved for one in self.evidence if one.layer in self.layers) / total


def evidence_of(
    layer: str,
    weights: Sequence[Tensor],
    halves: Sequence[tuple[Tensor, Tensor]] = (),
    ranks: Sequence[int] = RANKS,
    periods: Sequence[int] = PERIODS,
) -> Evidence:
    """Measure one layer along a pilot.

    Args:
        layer: its name.
        weights: ``W_0, W_1, ..., W_T``, ``(out, in)`` each or a convolution's.
        halves: mean updates of two disjoint groups of clients, from the same weights, at some rounds.
        ranks: to look at; those the layer cannot have are left out.
        periods: to look at; at most ``T / 2``, so that each is seen twice at least, or 1.

    Raises:
        ValueError: there are fewer than two weights.
    """
    if len(weights) < 2:
        raise ValueError(f"layer {layer!r}: a pilot needs the weights of at least two rounds, got {len(weights)}")
    matrices = [weight.detach().flatten(1).double() for weight in weights]
    shape = (matrices[0].shape[0], matrices[0].shape[1])
    possible = [rank for rank in ranks if rank < min(shape)]
    seen = [period for period in periods if period == 1 or 2 * period <= len(weights) - 1]
    held: dict[tuple[int, int], float] = {}
    moved = 0.0
    for period in seen:
        # Stretches that do not overlap.
        starts = range(0, len(matrices) - period, period)
        squares = torch.stack(
            [torch.linalg.svdvals(matrices[start + period] - matrices[start]).square() for start in starts]
        ).sum(dim=0)
        total = float(squares.sum())
        moved = total if period == 1 else moved
        for rank in possible:
            held[rank, period] = float(squares[:rank].sum()) / total if total else 1.0
    common: dict[int, float] = {}
    pairs = [tuple(half.detach().flatten(1).double() for half in both) for both in halves]
    whole = sum(float((one * other).sum()) for one, other in pairs)
    if whole > 0:
        for rank in possible:
            kept = 0.0
            for one, other in pairs:
                for mine, yours in ((one, other), (other, one)):
                    b, a = best_pair_of(mine, rank)
                    kept += float(((b @ a) * yours).sum()) / 2
            common[rank] = kept / whole
    return Evidence(layer, shape, moved, held, common)


def advise(
    evidence: Sequence[Evidence], fraction: float, *, target: float = TARGET, layer_target: float = LAYER_TARGET
) -> Advice:
    """Propose rank, period and layers; see the module for the rule.

    Args:
        evidence: one a layer.
        fraction: ``C``, the share of the clients that trains in a round.
        target: share of the movement that has to fit.
        layer_target: a layer's own share, below which it stays dense.

    Raises:
        ValueError: no layer suits factors at any rank and period.
    """
    evidence = [one for one in evidence if one.moved]
    points = sorted({point for one in evidence for point in one.held})
    options = []
    for rank, every in points:
        able = [one for one in evidence if one.fits(rank) and one.held.get((rank, every), 0.0) >= layer_target]
        moved = sum(one.moved for one in able)
        if moved:
            reached = sum(one.moved * one.held[rank, every] for one in able) / moved
            dense = sum(2 * one.shape[0] * one.shape[1] for one in evidence if one not in able)
            cost = dense + rank * (2 + 1 / (fraction * every)) * sum(sum(one.shape) for one in able)
            options.append((reached, cost, rank, every, able))
    if not options:
        raise ValueError(
            "no layer suits factors: of each, they would have more than half the weight's numbers, or hold less than "
            f"{100 * layer_target:.0f} % of its movement, or nothing moved; train it with algorithm = 'fedavg', or "
            "give the pilot more rounds"
        )
    good = [option for option in options if option[0] >= target]
    # The cheapest that is good enough; the later of equals accumulates less often.
    best = min(good, key=lambda o: (o[1], -o[3])) if good else max(options, key=lambda o: (o[0], -o[1]))
    reached, cost, rank, every, able = best
    layers = tuple(one.layer for one in able)
    return Advice(rank, every, layers, reached, cost, bool(good), tuple(evidence))


def as_markdown(advice: Advice, scale: float, origin: str) -> str:
    """The proposal as settings, and the evidence.

    Args:
        advice: the proposal.
        scale: ``alpha / rank`` to keep.
        origin: what was looked at, in words.
    """
    ranks = sorted({rank for one in advice.evidence for rank, _ in one.held})
    lines = [
        "# Proposed settings",
        "",
        "```toml",
        *(f"{key} = {_toml(value)}" for key, value in settings(advice, scale).items()),
        "```",
        "",
        f"{origin} With rank {advice.rank} and an accumulation every {advice.every} round{'s' * (advice.every > 1)}, "
        f"{100 * advice.reached:.0f} % of what full-rank training does between two accumulations fits into the "
        f"factors (squared norm, target {100 * TARGET:.0f} %: {'met' if advice.met else 'NOT met'}).",
        "",
        f"A contact moves {advice.cost:,.0f} numbers of these layers, up and down, catching up included; all of them "
        f"dense, {advice.dense_cost:,} ({advice.dense_cost / advice.cost:.2g} times as many). The layers to factorise "
        f"have {100 * advice.moved:.0f} % of the movement. The pilot is too short to say anything of more than "
        f"{max(every for one in advice.evidence for _, every in one.held)} rounds between accumulations.",
        "",
        f"## Share that fits, e(r, {advice.every})",
        "",
        "Of each layer's movement over so many rounds, what the best matrix of rank r holds. In brackets: of the "
        "update that two halves of the clients have in common.",
        "",
        "| layer | out x in | moved | " + " | ".join(f"r = {rank}" for rank in ranks) + " | proposed |",
        "|---|---|---:|" + "---:|" * len(ranks) + "---|",
    ]
    total = sum(one.moved for one in advice.evidence) or 1.0
    for one in advice.evidence:
        cells = [_cell(one, rank, advice.every) for rank in ranks]
        verdict = "factorise" if one.layer in advice.layers else _why_dense(one, advice)
        size = f"{one.shape[0]} x {one.shape[1]}"
        lines.append("| " + " | ".join([one.layer, size, f"{one.moved / total:.2f}", *cells, verdict]) + " |")
    periods = sorted({every for one in advice.evidence for _, every in one.held})
    lines += [
        "",
        f"## Share that fits at rank {advice.rank}, by rounds between accumulations",
        "",
        "| layer | " + " | ".join(f"tau = {every}" for every in periods) + " |",
        "|---|" + "---:|" * len(periods),
    ]
    for one in advice.evidence:
        held = [one.held.get((advice.rank, every)) for every in periods]
        told = ["\u2013" if value is None else f"{value:.2f}" for value in held]
        lines.append("| " + " | ".join([one.layer, *told]) + " |")
    return "\n".join(lines) + "\n"


def settings(advice: Advice, scale: float) -> dict[str, int | float | str]:
    """The proposal as settings of a run."""
    return {
        "algorithm": "fedloru",
        "rank": advice.rank,
        "alpha": float(scale * advice.rank),
        "accumulate-every": advice.every,
        "target-modules": ",".join(advice.layers),
    }


def _cell(one: Evidence, rank: int, every: int) -> str:
    if (rank, every) not in one.held:
        return "\u2013"
    told = f"{one.held[rank, every]:.2f}"
    return f"{told} ({one.common[rank]:.2f})" if rank in one.common else told


def _why_dense(one: Evidence, advice: Advice) -> str:
    if not one.fits(advice.rank):
        return "dense: factors would not halve it"
    return "dense: too little fits"


def _toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)
