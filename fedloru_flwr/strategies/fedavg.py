"""Federated averaging, full rank (McMahan et al., arXiv 1602.05629).

``W <- sum_k p_k W_k`` with ``p_k = n_k / sum_j n_j``: every trainable parameter is a dense leaf. A round moves the
whole model down to and up from each participant.
"""

from typing import Unpack

from fedloru_flwr import wire
from fedloru_flwr.lowrank import AccumulationSchedule
from fedloru_flwr.strategies.federated import CommonOptions, FederatedStrategy, ModelSource


class FedAvg(FederatedStrategy):
    """Full-rank FedAvg on this package's loop, wire and books; the baseline low-rank methods are compared with.

    Args:
        model: a factory or an instance, see `FederatedStrategy`.
        seed: the run's seed.
        weighted_by_key: the metric that weighs a reply.
        common: see `FederatedStrategy`.
    """

    algorithm = "fedavg"

    def __init__(
        self,
        model: ModelSource,
        *,
        seed: int = 0,
        weighted_by_key: str = wire.NUM_EXAMPLES,
        **common: Unpack[CommonOptions],
    ) -> None:
        settings = wire.Settings(
            method="plain",
            form="full",
            rank=0,
            alpha=0.0,
            target_modules=(),
            dense_leaves="all",
            seed=seed,
            accumulate_into="merge",
            weighted_by=weighted_by_key,
        )
        super().__init__(model, settings=settings, schedule=AccumulationSchedule.never(), **common)
