"""HetLoRA: factors of different ranks, by padding and truncation (Cho et al., arXiv 2401.06432).

The shared pair has the largest rank ``r``. A client of rank ``r_k`` gets the first ``r_k`` rows of ``A`` and columns of
``B``, and its reply is filled up with zeros before it is averaged with the others. It sends and receives ``r_k (in +
out)`` numbers a factorised layer and the dense leaves. Replies weigh by their numbers of examples; the paper's pruning
of ranks during training and its weighting by the factors' norms are not part of this.
"""

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.lowrank import cut, pad
from fedloru_flwr.strategies.lowrank import LowRankStrategy


class HetLoRA(LowRankStrategy):
    """For the arguments see `LowRankStrategy`."""

    algorithm = "hetlora"
    fixed_form = "padding is of pairs"
    refused: ClassVar[Mapping[str, str]] = {
        "scaffold": "clients of different ranks train other variables, whose control variates do not mix",
        "sparse": "clients of different ranks receive other tensors, of which no common change can be told",
    }

    def _cut(self, work: wire.Work, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rank = work.rank or self.settings.rank
        pairs = {key: value for layer in self.plan.layers for key, value in cut(layer, tensors, rank).items()}
        return {**pairs, **{key: tensors[key] for key in self.plan.dense_leaves}}

    def _payload(self, work: wire.Work) -> dict[str, Tensor]:
        return self._cut(work, super()._payload(work))

    def _reply_like(self, work: wire.Work) -> dict[str, Tensor]:
        return self._payload(work)

    def _common_form(self, work: wire.Work, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        rank = self.settings.rank
        pairs = {key: value for layer in self.plan.layers for key, value in pad(layer, tensors, rank).items()}
        return {**pairs, **{key: tensors[key] for key in self.plan.dense_leaves}}
