r"""Low-rank compression with error feedback on the client: full training, a compressed update, a residual.

With ``W`` received and ``W_k`` trained, ``D_k = W_k - W + e_k`` is sent as its best pair of rank ``r``, ``B_k A_k``,
and ``e_k <- D_k - B_k A_k`` is added next time (error feedback: Karimireddy et al., arXiv 1901.09847; low-rank
compression: PowerSGD, arXiv 1905.13727, here with an exact singular value decomposition).
"""

from collections.abc import Mapping

from torch import Tensor

from fedloru_flwr.clients.method import ClientMethod, Site
from fedloru_flwr.lowrank import best_pair, product


class LowRankEF(ClientMethod):
    """Every parameter is trained; the layers' updates are sent as pairs, the rest as it is."""

    keeps_state = True

    def finish(self, site: Site, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `ClientMethod.finish`."""
        compressed = {layer.weight_key for layer in site.plan.layers}
        pairs: dict[str, Tensor] = {}
        kept: dict[str, Tensor] = {}
        for layer in site.plan.layers:
            key = layer.weight_key
            update = values[key] - site.received[key]
            if key in site.state:
                update = update + site.state[key]
            pair = best_pair(layer, update, layer.rank)
            pairs |= pair
            kept[key] = update - product(layer, pair)
        dense = {key: values[key] for key in site.plan.dense_leaves if key not in compressed}
        return {**pairs, **dense}, kept

    def forgive(
        self, site: Site, kept: dict[str, Tensor], sent: Mapping[str, Tensor], arrives: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the codec leaves out of a pair is left out of the update, as what the pair leaves out is."""
        return {
            layer.weight_key: kept[layer.weight_key] + product(layer, sent) - product(layer, arrives)
            for layer in site.plan.layers
        }
