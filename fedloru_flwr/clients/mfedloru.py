"""mFedLoRU on the client: a client of a smaller budget trains a nested pair (arXiv 2409.12371).

From the received ``A (r, in)``, ``B (out, r)`` it learns ``A + s_A A_d A_u`` and ``B + s_B B_d B_u``, with
``A_d (r, r_k)``, ``A_u (r_k, in)``, ``B_d (out, r_k)``, ``B_u (r_k, r)``, and sends these and its dense leaves:
``r_k (in + out + 2 r)`` numbers a layer instead of ``r (in + out)``.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from fedloru_flwr.clients.method import ClientMethod, Site
from fedloru_flwr.lowrank import orthonormal_rows, uniform
from fedloru_flwr.models.layout import Layout, nested_keys, shapes


class MFedLoRU(ClientMethod):
    """A nested pair where the client's rank is below the shared one; option ``nested_scale`` (``s_A = s_B``)."""

    def _nested(self, site: Site) -> int:
        return site.work.rank if site.plan.layers and 0 < site.work.rank < site.plan.layers[0].rank else 0

    def layout(self, site: Site) -> Layout:
        """The layout of the client's model."""
        scale = site.settings.option("nested_scale", 1.0)
        return replace(site.plan.layout(), nested_rank=self._nested(site), nested_scale=scale)

    def start(self, site: Site) -> dict[str, Tensor]:
        """The received pair and a fresh nested one that adds nothing yet.

        The large parts are zero: ``A_u = 0``, ``B_d = 0``. The small ones, ``A_d (r, r_k)`` and ``B_u (r_k, r)``, are
        ``r_k`` vectors at right angles, of length ``sqrt(r / r_k)``, drawn anew for each client and round. So the first
        step of plain descent moves ``A`` and ``B`` by a projection of what it would move them by without nesting, whose
        mean over the draws is that whole step (for ``s_A = s_B = 1``).
        """
        values = super().start(replace(site, work=replace(site.work, rank=0)))
        if not (inner := self._nested(site)):
            return values
        for layer in site.plan.layers:
            of = dict(shapes(layer, self.layout(site)))
            a_down, a_up, b_down, b_up = nested_keys(layer)
            values |= {key: torch.zeros(of[key], dtype=layer.dtype) for key in (a_up, b_down)}
            for key in (a_down, b_up):
                whole = max(of[key])
                where = ("nested", site.server_round, site.client, key)
                drawn = uniform(site.settings.seed, *where, shape=(inner, whole), bound=1.0)
                vectors = math.sqrt(whole / inner) * orthonormal_rows(drawn).to(layer.dtype)
                values[key] = vectors.T.contiguous() if key == a_down else vectors
        return values

    def trained(self, site: Site) -> tuple[str, ...]:
        """See `ClientMethod.trained`."""
        if not self._nested(site):
            return super().trained(site)
        return (*(key for layer in site.plan.layers for key in nested_keys(layer)), *site.plan.dense_leaves)

    def finish(self, site: Site, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See `ClientMethod.finish`."""
        return {key: values[key] for key in self.trained(site)}, {}
