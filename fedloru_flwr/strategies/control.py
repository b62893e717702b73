"""SCAFFOLD's control variates on the server.

The paper weighs clients equally, in the model's mean as well; here both weigh by examples, so that the optimum is that
of the weighted objective.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fedloru_flwr import wire


def with_changes(
    total: Mapping[str, Tensor], changes: Iterable[tuple[float, Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """The sum ``sum_k n_k c_k`` with ``n_k (c_k' - c_k)`` of a round's clients.

    Args:
        total: the sum before; a key that is missing is zero.
        changes: ``n_k`` and what the client sent, by the names of the wire; or the sum of the ``n_k`` and the mean.
    """
    after = dict(total)
    for examples, change in changes:
        for name, value in change.items():
            key, gained = name.removeprefix(wire.CONTROL), examples * value
            after[key] = after[key] + gained if key in after else gained
    return after


def mean(
    total: Mapping[str, Tensor], examples: Mapping[str, float], clients: int, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """``c = sum_k n_k c_k / sum_k n_k``, by the names of the wire.

    Args:
        total: ``sum_k n_k c_k``; a key that is missing is zero.
        examples: ``n_k`` of the clients heard of.
        clients: how many there are. Those not heard of have ``c_k = 0`` and count with the mean ``n_k``.
        like: what is trained, for keys and shapes.
    """
    known = list(examples.values())
    whole = max(clients, len(known), 1) * sum(known) / len(known) if known else 1.0
    return {
        f"{wire.CONTROL}{key}": (total[key] if key in total else torch.zeros_like(value)) / whole
        for key, value in like.items()
    }
