"""One-sided FedLoRU: only ``B`` is trained and sent, ``A`` is drawn from a seed that everybody shares.

The rows of ``A (r, in)`` are orthonormal and drawn anew at every restart. Since all clients share ``A``, averaging
``B_k`` is averaging the products; and since a restart costs nothing, each round may accumulate: ``W <- W + s B A`` adds
a random slice of rank ``r`` a round.

A client sends ``r out`` numbers a factorised layer and the dense leaves. It receives the ``B`` of every accumulation it
has missed, about ``1 / (tau C)`` a contact, or ``W`` where that is smaller; fresh factors are zero and are not sent.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy


class FedLoRUSeeded(LowRankStrategy):
    """For the arguments see `LowRankStrategy`; it accumulates every round where nothing else is said."""

    algorithm = "fedloru-seeded"
    form = "one-sided-orthonormal"
    accumulation = Accumulation(every=1)
    fixed_form = "a Hadamard product has no side that could be drawn"
    refused: ClassVar[Mapping[str, str]] = {
        "ranks": "averaging needs factors of one shape",
        "sparse": "fresh factors are zero and not sent at all, and of what is accumulated everything is",
        "keep": "a product that stays and is accumulated again and again would count many times; use reinit='reset'",
    }

    def _payload(self, work: wire.Work) -> dict[str, Tensor]:
        payload = super()._payload(work)
        if any(bool(payload[key].any()) for key in self.plan.factor_keys):
            return payload
        return {key: value for key, value in payload.items() if key not in self.plan.factor_keys}
