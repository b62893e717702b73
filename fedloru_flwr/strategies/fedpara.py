"""FedPara / LoHa: factors whose Hadamard product is the update (Hyeon-Woo et al., arXiv 2108.06098).

The update of a layer is ``s (w1_a w1_b) * (w2_a w2_b)``, of rank up to ``r^2``, beside a frozen ``W`` (LoHa, as in
PEFT). A round moves ``2 r (in + out)`` numbers a factorised layer and the dense leaves, down and up. With
``accumulate_every`` the product is accumulated: an entry is the four parts.
"""

from collections.abc import Mapping
from typing import ClassVar

from fedloru_flwr.strategies.lowrank import LowRankStrategy


class FedPara(LowRankStrategy):
    """For the arguments see `LowRankStrategy`."""

    algorithm = "fedpara"
    form = "hadamard"
    refused: ClassVar[Mapping[str, str]] = {"ranks": "averaging needs factors of one shape"}
