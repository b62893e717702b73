"""pFedLoRU on the client: a global pair that is shared, and a personal pair that never leaves (arXiv 2409.12371).

The effective weight is ``W + s B A + s_p B_p A_p``. In a round the global pair (and the dense leaves) are trained
first, with the personal pair frozen, then the personal pair with the others frozen.
"""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from fedloru_flwr.clients.method import ClientMethod, Site
from fedloru_flwr.clients.task import Phase
from fedloru_flwr.lowrank import initial_factors
from fedloru_flwr.models.layout import Layout, personal_keys


class PFedLoRU(ClientMethod):
    """Two pairs a layer; options ``personal_rank``, ``personal_scale``, ``global_epochs``, ``personal_epochs``."""

    keeps_state = True

    def layout(self, site: Site) -> Layout:
        """The layout of the client's model."""
        rank = int(site.settings.option("personal_rank"))
        return replace(super().layout(site), personal_rank=rank, personal_scale=site.settings.option("personal_scale"))

    def start(self, site: Site) -> dict[str, Tensor]:
        """See `ClientMethod.start`."""
        return {**super().start(site), **self._own(site)}

    def _own(self, site: Site) -> dict[str, Tensor]:
        """The personal pairs: those kept, or fresh ones, whose product is zero."""
        keys = {key for layer in site.plan.layers for key in personal_keys(layer)}
        kept = {key: value for key, value in site.state.items() if key in keys}
        if kept:
            return kept
        rank = int(site.settings.option("personal_rank"))
        fresh = initial_factors(site.plan.layers, site.settings.seed, 0, rank=rank, label=f"personal {site.client}")
        pairs = {layer: (fresh[layer.a_key], fresh[layer.b_key]) for layer in site.plan.layers}
        return {
            key: part for layer, pair in pairs.items() for key, part in zip(personal_keys(layer), pair, strict=True)
        }

    def phases(self, site: Site, epochs: int) -> tuple[Phase, ...]:
        """``global_epochs`` of the global pair, then ``personal_epochs`` of the personal one.

        Where they are not given, three quarters of the epochs (rounded up, the personal pair having at least one).
        """
        personal = int(site.settings.option("personal_epochs")) or max(1, epochs // 4)
        shared = int(site.settings.option("global_epochs")) or max(1, epochs - personal)
        own = tuple(key for layer in site.plan.layers for key in personal_keys(layer))
        return (Phase(self.trained(site), shared), Phase(own, personal))

    def finish(self, site: Site, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `ClientMethod.finish`."""
        sent, _ = super().finish(site, values)
        return sent, {key: values[key] for layer in site.plan.layers for key in personal_keys(layer)}

    def personal(self, site: Site) -> tuple[Layout, dict[str, Tensor]]:
        """See `ClientMethod.personal`."""
        return self.layout(site), self.start(site)
