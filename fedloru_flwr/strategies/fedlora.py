"""FedLoRA: federated averaging of low-rank factors that are never accumulated (FedLoRU's baseline, arXiv 2409.12371).

``A <- sum_k p_k A_k``, ``B <- sum_k p_k B_k``, dense leaves likewise; the model is ``W_0 + s B A`` for good, of
rank ``r``. A round moves ``r (in + out)`` numbers a factorised layer and the dense leaves, down and up.
"""

from collections.abc import Mapping
from typing import ClassVar

from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy


class FedLoRA(LowRankStrategy):
    """FedLoRU without accumulation; for the arguments see `LowRankStrategy`."""

    algorithm = "fedlora"
    accumulation = Accumulation(refused="FedLoRA that accumulates is FedLoRU: use that")
    refused: ClassVar[Mapping[str, str]] = {
        "ranks": "averaging needs factors of one shape; use HetLoRA, FlexLoRA, FLoRA or mFedLoRU"
    }
