"""FlexLoRA: the mean of the products, split for every client's rank by singular value decomposition (arXiv 2402.11505).

The server holds ``D = sum_k p_k B_k A_k`` in full; a client of rank ``r_k`` gets ``D``'s best pair of that rank. It
sends and receives ``r_k (in + out)`` numbers a factorised layer and the dense leaves. The aggregation is exact; what a
client's rank cannot hold of ``D`` is lost on the way to it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.lowrank import Adapter, best_pair, product
from fedloru_flwr.models.plan import as_sent
from fedloru_flwr.strategies.federated import Received
from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy
from fedloru_flwr.strategies.state import Outcome, ServerState


class ProductStrategy(LowRankStrategy):
    """A method whose server holds products and gives each client a pair of its rank."""

    refused: ClassVar[Mapping[str, str]] = {
        "scaffold": "a client's factors are other variables after every decomposition, so that control variates of "
        "them would mean nothing",
        "feedback": "a client's factors are other variables after every decomposition, to which what was left out of "
        "the last ones does not belong",
        "sparse": "every client receives pairs of its own rank, newly decomposed, of which no change can be told",
        "stack": "there are no accumulated entries to stack",
        "keep": "there is nothing to accumulate, hence no restart",
    }

    def _initial_products(self, state: ServerState) -> dict[str, Tensor]:
        """The products before round 1, by `FactorisedLayer.delta_key`."""
        return {layer.delta_key: torch.zeros_like(as_sent(state.base[layer.weight_key])) for layer in self.plan.layers}

    def _initial_state(self) -> ServerState:
        state = super()._initial_state()
        dense = {key: state.trainables[key] for key in self.plan.dense_leaves}
        return replace(state, trainables={**self._initial_products(state), **dense})

    def _payload(self, work: wire.Work) -> dict[str, Tensor]:
        """Each layer's best pair of the client's rank; fresh factors, which are drawn, while the product is zero."""
        state, rank = self.state.trainables, work.rank or self.settings.rank
        dense = {key: state[key] for key in self.plan.dense_leaves}
        if not any(bool(state[layer.delta_key].any()) for layer in self.plan.layers):
            return dense
        pairs: Adapter = {}
        for layer in self.plan.layers:
            pairs |= best_pair(layer, state[layer.delta_key], rank)
        return {**pairs, **dense}

    def _reply_like(self, work: wire.Work) -> dict[str, Tensor]:
        dense = {key: self.state.trainables[key] for key in self.plan.dense_leaves}
        return {**self.plan.fresh(self.seed, 0, work.rank or None), **dense}

    def _common_form(self, work: wire.Work, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        products = {layer.delta_key: product(layer, tensors) for layer in self.plan.layers}
        return {**products, **{key: tensors[key] for key in self.plan.dense_leaves}}

    def _adapter_of(self, received: Received) -> Mapping[str, Tensor]:
        return {key: received.tensors[key] for key in self.plan.factor_keys}

    def _settle(self, mean: Mapping[str, Tensor], replies: Sequence[Received]) -> Outcome:
        return Outcome(dict(mean), applied=dict(mean))


class FlexLoRA(ProductStrategy):
    """For the arguments see `LowRankStrategy`."""

    algorithm = "flexlora"
    accumulation = Accumulation(refused="its server holds the whole product already")
    fixed_form = "decomposition gives pairs"
