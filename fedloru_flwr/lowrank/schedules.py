"""When to accumulate, and how the learning rate moves over rounds."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

When = Literal["", "loss", "rank"]
LEAST_APART = 2  # rounds between two accumulations that are decided as training goes
_GAIN = 0.02  # what makes a measure better than it was, relative to what it was


@dataclass(frozen=True)
class AccumulationSchedule:
    """Says after which rounds the factors' product is accumulated into the model.

    Attributes:
        every: accumulate after rounds ``every, 2 * every, ...``; 0 for no period.
        at: accumulate after exactly these rounds.
        when: accumulate as soon as this has plateaued instead, `LEAST_APART` to ``every`` rounds after the last time:
            the clients' training loss (`loss_has_plateaued`) or how much of the rank is used (`rank_has_plateaued`).
    """

    every: int = 0
    at: frozenset[int] = frozenset()
    when: When = ""

    @classmethod
    def periodic(cls, tau: int) -> Self:
        """Accumulate every ``tau`` rounds (``tau >= 1``)."""
        if tau < 1:
            raise ValueError(f"accumulate-every must be at least 1 round, got {tau}; FedLoRA never accumulates")
        return cls(every=tau)

    @classmethod
    def listed(cls, rounds: Iterable[int]) -> Self:
        """Accumulate at the listed rounds, all at least 1."""
        at = frozenset(rounds)
        if not at or min(at) < 1:
            raise ValueError(f"accumulate-at must list rounds of at least 1, got {sorted(at)}")
        return cls(at=at)

    @classmethod
    def adaptive(cls, when: When, most: int) -> Self:
        """Accumulate when a measure has plateaued, at most ``most`` rounds apart."""
        if when not in _HAS_PLATEAUED:
            raise ValueError(f"accumulate-when must be {' or '.join(map(repr, _HAS_PLATEAUED))}, got {when!r}")
        if most <= LEAST_APART:
            raise ValueError(
                f"accumulate-when = {when!r} chooses between {LEAST_APART} rounds and accumulate-every, which must be "
                f"at least {LEAST_APART + 1}, got {most}"
            )
        return cls(every=most, when=when)

    @classmethod
    def never(cls) -> Self:
        """Never accumulate: FedLoRA and full-rank methods."""
        return cls()

    @property
    def accumulates(self) -> bool:
        """Whether there is any round after which it accumulates."""
        return self.every > 0 or bool(self.at)

    def most_often(self) -> "AccumulationSchedule":
        """Itself; of one that is decided as training goes, the period it can come down to."""
        return AccumulationSchedule.periodic(LEAST_APART) if self.when else self

    def due(self, server_round: int, progress: Sequence[float] = ()) -> bool:
        """Whether the result of ``server_round`` (from 1) is to be accumulated.

        Args:
            server_round: the round.
            progress: where ``when`` is set, its measure after each round with a result since the last accumulation,
                this one included.
        """
        if self.when:
            apart = len(progress)
            return apart >= LEAST_APART and (apart >= self.every or _HAS_PLATEAUED[self.when](progress))
        return server_round in self.at or (self.every > 0 and server_round % self.every == 0)

    def cycle(self, server_round: int, num_rounds: int) -> tuple[int, int]:
        """The first and last round of the stretch without accumulation that ``server_round`` belongs to."""
        first = server_round
        while first > 1 and not self.due(first - 1):
            first -= 1
        last = server_round
        while last < num_rounds and not self.due(last):
            last += 1
        return first, last


def loss_has_plateaued(losses: Sequence[float]) -> bool:
    """Whether there was a gain and two rounds in a row were no better than what was before them.

    With the training losses ``l_1 .. l_n`` of the rounds since the last accumulation, ``n >= 3``::

        min(l_1 .. l_{n-2}) < (1 - 0.02) l_1    and    min(l_{n-1}, l_n) > (1 - 0.02) min(l_1 .. l_{n-2})

    Ratios do not depend on the loss's unit; the second round is for the noise of who was drawn, and the gain for fresh
    factors, whose product is zero and which are slow to begin.
    """
    if len(losses) < 3:
        return False
    best = min(losses[:-2])
    return best < (1 - _GAIN) * losses[0] and min(losses[-2:]) > (1 - _GAIN) * best


def rank_has_plateaued(used: Sequence[float]) -> bool:
    """Whether the factors use most of their rank, or no more of it than before.

    With ``u_i`` the stable rank ``||B A||_F^2 / ||B A||_2^2`` after the i-th round since the last accumulation,
    relative to the rank that the factors can have, mean over the layers (between 0 and 1)::

        u_n > 3 / 4    or    max(u_{n-1}, u_n) < (1 + 0.02) max(u_1 .. u_{n-2})

    the latter for ``n >= 3``. A scale of the factors changes nothing. Factors of rank 1 always use it all.
    """
    return used[-1] > 0.75 or (len(used) > 2 and max(used[-2:]) < (1 + _GAIN) * max(used[:-2]))


_HAS_PLATEAUED = {"loss": loss_has_plateaued, "rank": rank_has_plateaued}


@dataclass(frozen=True)
class LearningRateSchedule:
    r"""The learning rate as a function of the round.

    With ``x = (t - t_first) / (t_last - t_first + 1)`` over the whole run, or over the rounds between two
    accumulations where ``restart`` is set:

    - ``constant``: ``eta``
    - ``cosine``: ``eta * (1 + cos(pi x)) / 2``
    - ``step``: ``eta * 0.1 ** floor(3 x)``, that is divided by ten after each third

    Attributes:
        kind: the shape.
        rate: ``eta``, the rate it starts from.
        restart: start anew after each accumulation.
    """

    kind: Literal["constant", "cosine", "step"]
    rate: float
    restart: bool = False

    def __call__(self, server_round: int, num_rounds: int, accumulation: AccumulationSchedule) -> float:
        """The rate of ``server_round`` (from 1) in a run of ``num_rounds``."""
        first, last = accumulation.cycle(server_round, num_rounds) if self.restart else (1, num_rounds)
        x = (server_round - first) / (last - first + 1)
        if self.kind == "cosine":
            return self.rate * (1 + math.cos(math.pi * x)) / 2
        if self.kind == "step":
            return self.rate * 0.1 ** math.floor(3 * x)
        return self.rate
