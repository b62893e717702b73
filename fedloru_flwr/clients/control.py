r"""SCAFFOLD's control variates on a client (Karimireddy et al., arXiv 1910.06378), on what it trains and sends.

Each step's gradient gains ``c - c_k``. After the round ``c_k <- g_k``, the mean of the round's gradients as the loss
gave them; for plain SGD that is the paper's option II, ``c_k - c + (x - y_k) / (K eta)``, and it is defined for
momentum, clipping and any other optimiser too. The client sends ``g_k - c_k``.

A control variate of a factor belongs to that factor: where the factors have been drawn anew since, it counts as zero.
Those of dense leaves carry on.

A client whose ``c_k`` is lost, with its disk, goes on from ``c``, the mean of all: the server's sum stays off by what
its ``c_k`` differed from the mean.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedloru_flwr.clients.method import Site
from fedloru_flwr.wire import CONTROL


def _name(site: Site, key: str) -> str:
    """Under which name the client keeps a control variate."""
    return f"{CONTROL}{key}" if key in site.plan.dense_leaves else f"{CONTROL}{site.work.draw}/{key}"


def _own(site: Site, key: str) -> Tensor | None:
    return site.state.get(_name(site, key))


def _before(site: Site, key: str, extras: Mapping[str, Tensor]) -> Tensor | None:
    """``c_k`` as the client has it, or in place of one that is lost ``c``; None for zero."""
    own = _own(site, key)
    return extras[f"{CONTROL}{key}"] if own is None and site.lost_state else own


def correction(site: Site, keys: Sequence[str], extras: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``c - c_k`` for what is trained; a client without a ``c_k`` has zero.

    Raises:
        ValueError: if the order lacks a control variate, or has one of another shape.
    """
    corrections = {}
    for key in keys:
        shared = extras.get(f"{CONTROL}{key}")
        if shared is None or shared.shape != site.received.get(key, shared).shape:
            raise ValueError(f"the order has no control variate for {key}, or one of another shape")
        own = _before(site, key, extras)
        corrections[key] = shared if own is None else shared - own
    return corrections


def new_control(
    site: Site, keys: Sequence[str], gradients: Mapping[str, Tensor], extras: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What is sent, ``g_k - c_k`` of what was trained, and what is kept: every ``c_k`` that is still good."""
    sent, kept = {}, {}
    for key in site.plan.trainable_keys:
        own = _own(site, key)
        if own is not None:
            kept[_name(site, key)] = own
    for key in keys:
        own = _before(site, key, extras)
        new = gradients.get(key)
        if new is None:  # nothing flowed there
            new = torch.zeros_like(extras[f"{CONTROL}{key}"])
        kept[_name(site, key)] = new
        sent[f"{CONTROL}{key}"] = new if own is None else new - own
    return sent, kept
