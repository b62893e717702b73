"""FLoRA: the clients' factors are stacked, so that the mean of their products is exact (Wang et al., arXiv 2409.05976).

``W <- W + s sum_k p_k B_k A_k`` after every round, with ``B = [p_1 B_1, p_2 B_2, ...]`` and ``A = [A_1; A_2; ...]``;
then everybody starts from fresh factors, which are drawn from the seed and not sent. Clients may have different ranks.

A client sends ``r_k (in + out)`` numbers a factorised layer and the dense leaves. It receives the stacks of every round
it has missed, ``sum_k r_k (in + out)`` each (or the layer's product where that is smaller), or ``W`` where that is
smaller.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.lowrank import Adapter, stacked
from fedloru_flwr.lowrank.aggregation import shares
from fedloru_flwr.strategies.federated import Received
from fedloru_flwr.strategies.judging import distance
from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy
from fedloru_flwr.strategies.state import Outcome, ServerState


class FLoRA(LowRankStrategy):
    """For the arguments see `LowRankStrategy`."""

    algorithm = "flora"
    accumulation = Accumulation(refused="its stacked products go into the model after every round as it is")
    fixed_form = "stacks are of pairs"
    needs_each_reply = "FLoRA stacks the factors of all"
    refused: ClassVar[Mapping[str, str]] = {
        "inner": "FLoRA stacks factors and averages nothing but dense leaves",
        "scaffold": "the factors are drawn anew every round, so that they never have control variates",
        "keep": "the factors restart after every round",
        "sparse": "its factors are never sent down, only drawn",
    }

    def _initial_state(self) -> ServerState:
        """Only dense leaves are averaged; the factors are as drawn."""
        state = super()._initial_state()
        return replace(state, trainables={key: state.trainables[key] for key in self.plan.dense_leaves})

    def _reply_like(self, work: wire.Work) -> dict[str, Tensor]:
        factors = self.plan.fresh(self.seed, 0, work.rank or None)
        return {**factors, **self.state.trainables}

    def _common_form(self, work: wire.Work, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: tensors[key] for key in self.state.trainables}

    def _update_norm(self, work: wire.Work, common: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> float:
        drawn = self.plan.fresh(self.seed, self.state.draw, work.rank or None)
        factors = distance({key: sent[key] for key in self.plan.factor_keys}, drawn)
        return math.hypot(super()._update_norm(work, common, sent), factors)

    def _adapter_of(self, received: Received) -> Mapping[str, Tensor]:
        return {key: received.tensors[key] for key in self.plan.factor_keys}

    def _settle(self, mean: Mapping[str, Tensor], replies: Sequence[Received]) -> Outcome:
        p = shares([reply.weight for reply in replies])
        stack: Adapter = {}
        for layer in self.plan.layers:
            stack |= stacked(layer, [reply.tensors for reply in replies], p)
        return Outcome(dict(mean), applied=stack, entries=((stack, self.plan.scale),), restart=True)
