"""When to accumulate, and how the learning rate moves over rounds."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Self


@dataclass(frozen=True)
class AccumulationSchedule:
    """Says after which rounds the factors' product is accumulated into the model.

    Attributes:
        every: accumulate after rounds ``every, 2 * every, ...``; 0 for no period.
        at: accumulate after exactly these rounds.
    """

    every: int = 0
    at: frozenset[int] = frozenset()

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
    def never(cls) -> Self:
        """Never accumulate: FedLoRA and full-rank methods."""
        return cls()

    @property
    def accumulates(self) -> bool:
        """Whether there is any round after which it accumulates."""
        return self.every > 0 or bool(self.at)

    def due(self, server_round: int) -> bool:
        """Whether the result of ``server_round`` (from 1) is to be accumulated."""
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
