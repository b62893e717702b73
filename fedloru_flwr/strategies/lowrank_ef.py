r"""Full local training whose update is compressed to rank ``r``, with error feedback.

The server sends ``W``; a client trains all of it and sends the best pair of rank ``r`` of ``W_k - W + e_k`` for each
factorised layer, keeping ``e_k``, what the pair leaves out, for next time. ``W <- W + sum_k p_k B_k A_k``. A client
receives the whole model and sends ``r (in + out)`` numbers a factorised layer and the dense leaves.

Sources: PowerSGD (arXiv 1905.13727) for the compression, here with an exact singular value decomposition; Karimireddy
et al. (arXiv 1901.09847) for error feedback.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.lowrank import FactorisedLayer, initial_factors, product
from fedloru_flwr.strategies.federated import Received
from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy
from fedloru_flwr.strategies.state import Outcome


class LowRankEF(LowRankStrategy):
    """For the arguments see `LowRankStrategy`; ``alpha`` has no meaning here, the scale is 1."""

    algorithm = "lowrank-ef"
    form = "compressed"
    client_method = "lowrank-ef"
    accumulation = Accumulation(refused="its updates go into the model after every round as it is")
    fixed_form = "the compressed update is a pair"
    refused: ClassVar[Mapping[str, str]] = {
        "scaffold": "control variates are of what is trained, all of it, and would undo the compression",
        "ranks": "it compresses every client's update to the same rank",
        "stack": "there are no accumulated entries to stack",
        "keep": "there is nothing to accumulate, hence no restart",
    }

    def _dense(self) -> dict[str, Tensor]:
        compressed = {layer.weight_key for layer in self.plan.layers}
        return {key: value for key, value in self.state.trainables.items() if key not in compressed}

    def _reply_like(self, work: wire.Work) -> dict[str, Tensor]:
        return {**initial_factors(self.plan.layers, self.seed, 0), **self._dense()}

    def _common_form(self, work: wire.Work, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        layer_of = {layer.weight_key: layer for layer in self.plan.layers}
        return {
            key: value + product(layer_of[key], tensors) if key in layer_of else tensors[key]
            for key, value in self.state.trainables.items()
        }

    def _adapter_of(self, received: Received) -> Mapping[str, Tensor]:
        return {key: received.tensors[key] for layer in self.plan.layers for key in _keys(layer)}

    def _settle(self, mean: Mapping[str, Tensor], replies: Sequence[Received]) -> Outcome:
        gained = {
            layer.delta_key: mean[layer.weight_key] - self.state.trainables[layer.weight_key]
            for layer in self.plan.layers
        }
        return Outcome(dict(mean), applied=gained)


def _keys(layer: FactorisedLayer) -> tuple[str, str]:
    return layer.a_key, layer.b_key
