"""FedEx-LoRA: the factors are averaged, and what that misses goes into ``W`` (Singhal et al., arXiv 2410.09432).

``A = sum_k p_k A_k``, ``B = sum_k p_k B_k`` and ``W <- W + s (sum_k p_k B_k A_k - B A)`` after every round: exact.

A client sends ``r (in + out)`` numbers a factorised layer and the dense leaves. It receives as much, and the residual
of every round it has missed: ``(n + 1) r (in + out)`` numbers with ``n`` participants, or the layer's product where
that is smaller, or ``W`` where that is smaller still.
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from fedloru_flwr.lowrank import Adapter, residual, stacked
from fedloru_flwr.strategies.federated import Received
from fedloru_flwr.strategies.lowrank import LowRankStrategy
from fedloru_flwr.strategies.state import Outcome


class FedExLoRA(LowRankStrategy):
    """For the arguments see `LowRankStrategy`."""

    algorithm = "fedex-lora"
    fixed_form = "residuals are of pairs"
    needs_each_reply = "FedEx-LoRA's residual is made of the factors of all"
    refused: ClassVar[Mapping[str, str]] = {
        "ranks": "averaging needs factors of one shape",
        "inner": "the residual makes the mean of the products exact, which would undo what a server optimiser or a "
        "robust or noisy aggregation does to the factors",
    }

    def _settle(self, mean: Mapping[str, Tensor], replies: Sequence[Received]) -> Outcome:
        weights = [reply.weight for reply in replies]
        missing: Adapter = {}
        applied: Adapter = {}
        for layer in self.plan.layers:
            gap = residual(layer, [reply.tensors for reply in replies], weights, mean)
            missing |= gap
            applied |= stacked(layer, [mean, gap], [1.0, 1.0])
        return Outcome(dict(mean), applied=applied, entries=((missing, self.plan.scale),))
