"""FedLoRA: federated averaging of low-rank factors that are never accumulated (FedLoRU's baseline, arXiv 2409.12371).

``A <- sum_k p_k A_k``, ``B <- sum_k p_k B_k``, dense leaves likewise; the model is ``W_0 + s B A`` for good, of
rank ``r``. A round moves ``r (in + out)`` numbers a factorised layer and the dense leaves, down and up.
"""

from collections.abc import Sequence
from typing import Unpack

from fedloru_flwr import wire
from fedloru_flwr.lowrank import AccumulationSchedule
from fedloru_flwr.models.plan import TargetModules
from fedloru_flwr.strategies.federated import CommonOptions, FederatedStrategy, ModelSource, low_rank_settings


class FedLoRA(FederatedStrategy):
    """FedLoRU without accumulation.

    Args:
        model: a factory or an instance, see `FederatedStrategy`.
        rank: ``r``, at least 1.
        alpha: LoRA's alpha; the scale is ``s = alpha / r``.
        target_modules: layers to factorise, see `plan_adapter`; None chooses.
        dense_leaves: ``"all"``, ``"none"`` or names: what else is trained.
        seed: the run's seed.
        weighted_by_key: the metric that weighs a reply.
        common: see `FederatedStrategy`.
    """

    algorithm = "fedlora"

    def __init__(
        self,
        model: ModelSource,
        *,
        rank: int = 4,
        alpha: float = 4.0,
        target_modules: TargetModules = None,
        dense_leaves: str | Sequence[str] = "all",
        seed: int = 0,
        weighted_by_key: str = wire.NUM_EXAMPLES,
        **common: Unpack[CommonOptions],
    ) -> None:
        settings = low_rank_settings(rank, alpha, target_modules, dense_leaves, seed, "merge", weighted_by_key)
        super().__init__(model, settings=settings, schedule=AccumulationSchedule.never(), **common)
