"""FedHM: the server factorises the whole model, the clients train the factors (Yao et al., arXiv 2111.14655).

The server holds full matrices ``W``. A client of rank ``r_k`` gets each factorised layer's best pair of that rank by
truncated singular value decomposition, ``W ~ B A`` (there is no frozen ``W`` beneath), trains it and sends it back; the
server multiplies back and averages, ``W <- sum_k p_k B_k A_k``. A round moves ``r_k (in + out)`` numbers a factorised
layer and the dense leaves, down and up.
"""

from torch import Tensor

from fedloru_flwr.models.plan import as_sent, plain_state
from fedloru_flwr.strategies.flexlora import ProductStrategy
from fedloru_flwr.strategies.lowrank import Accumulation
from fedloru_flwr.strategies.state import ServerState


class FedHM(ProductStrategy):
    """For the arguments see `LowRankStrategy`; ``alpha`` has no meaning here, the scale is 1."""

    algorithm = "fedhm"
    form = "from-zero"
    accumulation = Accumulation(refused="its server holds the whole model already")
    fixed_form = "decomposition gives pairs"

    def _initial_products(self, state: ServerState) -> dict[str, Tensor]:
        values = plain_state(self._model)
        return {layer.delta_key: as_sent(values[layer.weight_key]) for layer in self.plan.layers}
