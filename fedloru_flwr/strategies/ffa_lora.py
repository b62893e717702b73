"""FFA-LoRA: ``A`` is frozen and shared by seed, only ``B`` is trained and sent (Sun et al., arXiv 2403.12313).

``B <- sum_k p_k B_k`` averages the products exactly, with half of the bytes: ``r out`` numbers a factorised layer and
the dense leaves, down and up. With ``accumulate_every`` the product is accumulated and ``A`` drawn anew.
"""

from collections.abc import Mapping
from typing import ClassVar

from fedloru_flwr.strategies.lowrank import LowRankStrategy


class FFALoRA(LowRankStrategy):
    """For the arguments see `LowRankStrategy`."""

    algorithm = "ffa-lora"
    form = "one-sided"
    fixed_form = "a Hadamard product has no side that could be frozen"
    refused: ClassVar[Mapping[str, str]] = {"ranks": "averaging needs factors of one shape"}
