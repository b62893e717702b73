"""RoLoRA: ``A`` and ``B`` are trained in alternate rounds (Chen et al., arXiv 2502.01755).

In odd rounds ``B`` is trained with ``A`` frozen, in even rounds ``A`` with ``B`` frozen; the frozen half is the same on
all clients, so that averaging the other averages the products exactly. Both halves go down (a client may have missed
the last round), one half comes up.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from fedloru_flwr import wire
from fedloru_flwr.lowrank import AccumulationSchedule, When
from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy


class RoLoRA(LowRankStrategy):
    """For the arguments see `LowRankStrategy`; after an accumulation ``B`` is trained first again."""

    algorithm = "rolora"
    accumulation = Accumulation(fixed="which half of a pair a round trains is counted from the last accumulation")
    fixed_form = "a Hadamard product has four parts; RoLoRA alternates between the two of a pair"
    refused: ClassVar[Mapping[str, str]] = {"ranks": "averaging needs factors of one shape"}

    def _schedule(self, every: int, at: Sequence[int] | str | None, when: When) -> AccumulationSchedule:
        if every == 1:
            raise ValueError("RoLoRA cannot accumulate every round: it takes two to train both halves of a pair")
        return super()._schedule(every, at, when)

    def _half(self, server_round: int) -> wire.Half:
        # B first, also after a restart: while it is zero, A gets no gradient.
        first = 1 if self.reinit == "keep" else self.schedule.cycle(server_round, server_round)[0]
        return "b" if (server_round - first) % 2 == 0 else "a"
