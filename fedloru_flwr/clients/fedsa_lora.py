"""FedSA-LoRA on the client: ``A`` is shared, ``B`` stays (arXiv 2410.01463)."""

from collections.abc import Mapping

from torch import Tensor

from fedloru_flwr.clients.method import ClientMethod, Site
from fedloru_flwr.clients.task import Phase
from fedloru_flwr.models.layout import Layout


class FedSALoRA(ClientMethod):
    """Both factors are trained; ``A`` and the dense leaves are sent, ``B`` is kept."""

    keeps_state = True

    def start(self, site: Site) -> dict[str, Tensor]:
        """See `ClientMethod.start`."""
        return {**site.received, **self._own(site)}

    def _own(self, site: Site) -> dict[str, Tensor]:
        """The client's ``B``: the one it kept, or zero."""
        fresh = site.plan.fresh(site.settings.seed, 0)
        return {layer.b_key: site.state.get(layer.b_key, fresh[layer.b_key]) for layer in site.plan.layers}

    def phases(self, site: Site, epochs: int) -> tuple[Phase, ...]:
        """See `ClientMethod.phases`."""
        return (Phase(site.plan.trainable_keys, epochs),)

    def trained(self, site: Site) -> tuple[str, ...]:
        """See `ClientMethod.trained`."""
        own = {layer.b_key for layer in site.plan.layers}
        return tuple(key for key in site.plan.trainable_keys if key not in own)

    def finish(self, site: Site, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `ClientMethod.finish`."""
        sent, _ = super().finish(site, values)
        return sent, {layer.b_key: values[layer.b_key] for layer in site.plan.layers}

    def has_global_model(self) -> bool:
        """There is none."""
        return False

    def personal(self, site: Site) -> tuple[Layout, dict[str, Tensor]]:
        """See `ClientMethod.personal`."""
        return self.layout(site), self.start(site)
