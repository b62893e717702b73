"""What a client does around its training: from the tensors it received to those it trains, and on to those it sends.

Pure functions of what is at hand, so that it does not matter how the training between them is carried out: by a user's
own loop on a model of one client, or on many clients at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import import_module

from torch import Tensor

from fedloru_flwr import wire
from fedloru_flwr.clients.task import Phase
from fedloru_flwr.models.layout import Layout
from fedloru_flwr.models.plan import AdapterPlan


@dataclass(frozen=True)
class Site:
    """What a client has at hand in one round.

    Attributes:
        plan: of the model.
        settings: what all clients share.
        work: what this client is to do.
        received: the arrays that came with the order.
        server_round: the round.
        client: its identity.
        state: what it kept of its own after its last reply that counted; empty for none.
    """

    plan: AdapterPlan
    settings: wire.Settings
    work: wire.Work
    received: Mapping[str, Tensor]
    server_round: int
    client: str
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def known(self) -> dict[str, Tensor]:
        """What the server knows too, before training: what it sent, and fresh factors where it sent none."""
        return self.plan.with_fresh(self.received, self.settings.seed, self.work.draw, self.work.rank or None)

    @property
    def lost_state(self) -> bool:
        """Whether it kept something of its own that is gone."""
        return bool(self.work.run) and self.work.counted > 0 and not self.state


class ClientMethod:
    """Factors or dense leaves as they come, trained and sent back: FedAvg, FedLoRA, FedLoRU and most others.

    A one-sided method's ``A`` is drawn from the seed, and so is the adapter where the server did not send it since it
    is fresh. In rounds of one half (RoLoRA) only that half of each pair is trained and sent.
    """

    keeps_state = False

    def layout(self, site: Site) -> Layout:
        """What the client's model holds."""
        return site.plan.layout(site.work.rank or None)

    def start(self, site: Site) -> dict[str, Tensor]:
        """The model's values before training."""
        return site.plan.whole(site.known, site.settings.seed, site.work.draw)

    def trained(self, site: Site) -> tuple[str, ...]:
        """What is trained, and sent, in the order of the Trainables."""
        keys = site.plan.trainable_keys
        return (
            keys if site.work.half == "both" else tuple(key for key in keys if not wire.is_frozen(key, site.work.half))
        )

    def phases(self, site: Site, epochs: int) -> tuple[Phase, ...]:
        """The stretches of training, the first of them of the global model."""
        return (Phase(self.trained(site), epochs),)

    def finish(self, site: Site, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What is sent and what is kept, after training."""
        return {key: values[key] for key in self.trained(site)}, {}

    def forgive(
        self, site: Site, kept: dict[str, Tensor], sent: Mapping[str, Tensor], arrives: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is kept where a codec has changed what is sent to what ``arrives``."""
        return kept

    def has_global_model(self) -> bool:
        """Whether what the server holds is a whole model."""
        return True

    def personal(self, site: Site) -> tuple[Layout, dict[str, Tensor]] | None:
        """The client's personal model: its layout and values; None where there is none."""
        return None


_METHODS = {
    "plain": "method:ClientMethod",
    "pfedloru": "pfedloru:PFedLoRU",
    "mfedloru": "mfedloru:MFedLoRU",
    "fedsa-lora": "fedsa_lora:FedSALoRA",
    "lowrank-ef": "lowrank_ef:LowRankEF",
}


@cache
def client_method(name: str) -> ClientMethod:
    """The method of this name.

    Raises:
        WireError: if there is none: the server is of another version.
    """
    if name not in _METHODS:
        raise wire.WireError(f"unknown method {name[:80]!r}: install the same version of fedloru-flwr everywhere")
    module, _, cls = _METHODS[name].partition(":")
    method: ClientMethod = getattr(import_module(f"fedloru_flwr.clients.{module}"), cls)()
    return method
