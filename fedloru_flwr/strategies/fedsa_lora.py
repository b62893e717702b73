"""FedSA-LoRA: only ``A`` is shared, ``B`` stays on the client (Guo et al., arXiv 2410.01463).

Clients train both factors; ``A <- sum_k p_k A_k``, dense leaves likewise, and every client keeps its own ``B_k``. A
round moves ``r in`` numbers a factorised layer and the dense leaves, down and up. There is no global model, so that it
is judged by its clients' personal models; the run's ``model.safetensors`` is ``W`` with the averaged dense leaves.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from fedloru_flwr.strategies.lowrank import Accumulation, LowRankStrategy
from fedloru_flwr.strategies.state import ServerState


class FedSALoRA(LowRankStrategy):
    """For the arguments see `LowRankStrategy`."""

    algorithm = "fedsa-lora"
    client_method = "fedsa-lora"
    accumulation = Accumulation(refused="every client has a product of its own")
    fixed_form = "a Hadamard product has no side that could be shared"
    refused: ClassVar[Mapping[str, str]] = {
        "ranks": "averaging needs factors of one shape",
        "sparse": "a part of what clients train is their own, and the changes told are of all that everybody holds",
        "scaffold": "a client's own B has no counterpart on the server that could correct it",
    }
    has_global_model = False
    has_personal_model = True

    def _initial_state(self) -> ServerState:
        state = super()._initial_state()
        own = {layer.b_key for layer in self.plan.layers}
        return replace(state, trainables={key: value for key, value in state.trainables.items() if key not in own})
