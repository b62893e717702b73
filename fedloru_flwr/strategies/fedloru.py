"""FedLoRU: federated low-rank updates, accumulated into a full-rank model (arXiv 2409.12371, algorithm 1).

Each round the clients train ``A`` and ``B`` with ``W`` frozen and the server averages them,
``A <- sum_k p_k A_k``, ``B <- sum_k p_k B_k``; every ``tau`` rounds ``W <- W + s B A`` on the server and every client,
and the factors restart. After ``T`` rounds the model is ``W_0 + s sum_i B_i A_i``, of rank up to ``r floor(T / tau)``.

A round moves ``r (in + out)`` numbers a factorised layer and the dense leaves, down and up; an accumulation costs no
message of its own, but each client receives every entry once, at its next contact.
"""

from collections.abc import Sequence
from typing import Literal, Unpack

from fedloru_flwr import wire
from fedloru_flwr.lowrank import AccumulationSchedule
from fedloru_flwr.models.plan import TargetModules
from fedloru_flwr.strategies.federated import CommonOptions, FederatedStrategy, ModelSource, low_rank_settings
from fedloru_flwr.strategies.state import Reinit


class FedLoRU(FederatedStrategy):
    """The paper's algorithm.

    Args:
        model: a factory or an instance, see `FederatedStrategy`.
        rank: ``r``, at least 1.
        alpha: LoRA's alpha; the scale is ``s = alpha / r``.
        accumulate_every: ``tau``, in rounds, at least 1.
        accumulate_at: accumulate after exactly these rounds instead: numbers, or a text such as ``"50,100"``.
        reinit: ``"reset"`` draws fresh factors with a product of zero, so that an accumulation does not change the
            function (exact); ``"keep"`` carries on with the old ones, whose product then counts twice (what the
            authors' published command does).
        accumulate_into: how clients hold the past: ``"merge"`` folds entries into ``W``; ``"stack"`` leaves ``W``
            untouched and keeps them as one frozen adapter, as quantised bases need. The same function.
        target_modules: layers to factorise, see `plan_adapter`; None chooses.
        dense_leaves: ``"all"``, ``"none"`` or names: what else is trained.
        seed: the run's seed.
        weighted_by_key: the metric that weighs a reply.
        common: see `FederatedStrategy`.
    """

    algorithm = "fedloru"

    def __init__(
        self,
        model: ModelSource,
        *,
        rank: int = 4,
        alpha: float = 4.0,
        accumulate_every: int = 10,
        accumulate_at: Sequence[int] | str | None = None,
        reinit: Reinit = "reset",
        accumulate_into: Literal["merge", "stack"] = "merge",
        target_modules: TargetModules = None,
        dense_leaves: str | Sequence[str] = "all",
        seed: int = 0,
        weighted_by_key: str = wire.NUM_EXAMPLES,
        **common: Unpack[CommonOptions],
    ) -> None:
        settings = low_rank_settings(rank, alpha, target_modules, dense_leaves, seed, accumulate_into, weighted_by_key)
        if accumulate_at:
            listed = accumulate_at.split(",") if isinstance(accumulate_at, str) else accumulate_at
            schedule = AccumulationSchedule.listed(int(part) for part in listed)
        else:
            schedule = AccumulationSchedule.periodic(accumulate_every)
        super().__init__(model, settings=settings, schedule=schedule, reinit=reinit, **common)
