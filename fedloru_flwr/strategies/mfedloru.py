"""mFedLoRU: FedLoRU for clients of different budgets (arXiv 2409.12371, model heterogeneity).

The shared pair has rank ``r``. A client of a smaller rank ``r_k`` trains a nested pair, ``A + s_A A_d A_u`` and ``B +
s_B B_d B_u`` with the received ``A``, ``B`` frozen, and sends ``r_k (in + out + 2 r)`` numbers a layer; the server
takes its factors as ``A_k = A + s_A A_d A_u``, ``B_k = B + s_B B_d B_u``, averages and accumulates as FedLoRU does.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.lowrank import unnest
from fedloru_flwr.models.layout import nested_keys, shapes
from fedloru_flwr.strategies.federated import ModelSource
from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy


class MFedLoRU(LowRankStrategy):
    """For the other arguments see `LowRankStrategy`.

    Args:
        model: a factory or an instance, see `FederatedStrategy`.
        nested_scale: ``s_A = s_B``.
        more: see `LowRankStrategy`; ``ranks`` says who trains at which rank, at most ``rank``.
    """

    algorithm = "mfedloru"
    client_method = "mfedloru"
    accumulation = Accumulation(every=10)
    fixed_form = "the nested pairs are of LoRA's factors"
    refused: ClassVar[Mapping[str, str]] = {
        "scaffold": "clients of a smaller rank train other variables than the rest, whose control variates do not mix",
        "sparse-up": "a nested pair is sent as it is, not as what has changed: what is left out of it would be lost",
    }
    shared_rank_from_map = False

    def __init__(self, model: ModelSource, *, nested_scale: float = 1.0, **more: Any) -> None:
        if not nested_scale > 0:
            raise ValueError(f"nested_scale must be above 0, got {nested_scale}")
        super().__init__(model, options=(("nested_scale", float(nested_scale)),), **more)
        if self.ranks.highest > self.settings.rank:
            raise ValueError(
                f"ranks: a client has rank {self.ranks.highest}, above the shared rank = {self.settings.rank}: raise "
                "rank, or lower the client's"
            )
        odd = [layer.name for layer in self.plan.layers if layer.kind == "embedding"]
        if odd:
            raise ValueError(f"target-modules: {odd[0]} is an embedding, which cannot have a nested pair: leave it out")

    def _is_nested(self, work: wire.Work) -> bool:
        return 0 < work.rank < self.settings.rank

    def _reply_like(self, work: wire.Work) -> dict[str, Tensor]:
        whole = super()._reply_like(work)
        if not self._is_nested(work):
            return whole
        layout = replace(self.plan.layout(), nested_rank=work.rank)
        like: dict[str, Tensor] = {}
        for layer in self.plan.layers:
            of = dict(shapes(layer, layout))
            dtype = whole[layer.a_key].dtype
            like |= {key: torch.empty(of[key], dtype=dtype) for key in nested_keys(layer)}
        return like | {key: whole[key] for key in self.plan.dense_leaves}

    def _common_form(self, work: wire.Work, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not self._is_nested(work):
            return super()._common_form(work, tensors)
        scale = self.settings.option("nested_scale", 1.0)
        pairs: dict[str, Tensor] = {}
        for layer in self.plan.layers:
            pairs |= unnest(layer, self.state.trainables, tensors, scale)
        return pairs | {key: tensors[key] for key in self.plan.dense_leaves}
