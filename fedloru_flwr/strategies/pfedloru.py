"""pFedLoRU: FedLoRU with a personal pair on every client (arXiv 2409.12371, statistical heterogeneity).

The effective weight on client ``k`` is ``W + s B A + s_p B_k A_k``. The global pair and the dense leaves are averaged
and accumulated as in FedLoRU; the personal pair never leaves the client. What travels is FedLoRU's.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from fedloru_flwr.models.plan import PlanError
from fedloru_flwr.strategies.federated import ModelSource
from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy


class PFedLoRU(LowRankStrategy):
    """For the other arguments see `LowRankStrategy`.

    Args:
        model: a factory or an instance, see `FederatedStrategy`.
        personal_rank: rank of the personal pair; 0: that of the global one.
        personal_alpha: ``s_p = personal_alpha / personal_rank``; 0: ``s_p = s``.
        global_epochs: epochs of the global pair; 0: what the personal pair leaves of the local epochs.
        personal_epochs: epochs of the personal pair; 0: a quarter of the local epochs, at least one.
        more: see `LowRankStrategy`.
    """

    algorithm = "pfedloru"
    client_method = "pfedloru"
    has_personal_model = True
    accumulation = Accumulation(every=10)
    fixed_form = "the personal pair is a LoRA pair beside a LoRA pair"
    refused: ClassVar[Mapping[str, str]] = {"ranks": "averaging needs factors of one shape"}

    def __init__(
        self,
        model: ModelSource,
        *,
        personal_rank: int = 0,
        personal_alpha: float = 0.0,
        global_epochs: int = 0,
        personal_epochs: int = 0,
        **more: Any,
    ) -> None:
        for name, value in (
            ("personal_rank", personal_rank),
            ("personal_alpha", personal_alpha),
            ("global_epochs", global_epochs),
            ("personal_epochs", personal_epochs),
        ):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if global_epochs and personal_epochs and global_epochs <= personal_epochs:
            raise ValueError(
                f"global_epochs = {global_epochs} must exceed personal_epochs = {personal_epochs}: the global pair is "
                "what all clients learn together"
            )
        rank, alpha = more.get("rank", 4), more.get("alpha", 4.0)
        if rank < 1:
            raise PlanError(f"rank must be at least 1, got {rank}")
        own_rank = personal_rank or rank
        options = {
            "personal_rank": own_rank,
            "personal_scale": personal_alpha / own_rank if personal_alpha else alpha / rank,
            "global_epochs": global_epochs,
            "personal_epochs": personal_epochs,
        }
        super().__init__(model, options=tuple((name, float(value)) for name, value in options.items()), **more)
        narrow = [layer.name for layer in self.plan.layers if layer.max_rank <= own_rank]
        if narrow:
            raise ValueError(f"personal_rank = {own_rank} is not below the dimensions of {narrow[0]}: lower it")
