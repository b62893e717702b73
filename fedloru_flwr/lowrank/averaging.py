"""Weighted means that do not depend on the wire's number format."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedloru_flwr.lowrank.factors import at_least_float32


def weighted_mean(replies: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return ``sum_k p_k x_k`` with ``p_k = w_k / sum_j w_j`` for every key, in the order given.

    The sum is formed in float32 whatever the dtype of the replies (float64 stays), and returned so.

    Args:
        replies: one dict of tensors a client, all with the same keys and shapes.
        weights: one positive number a client, usually its number of examples.

    Raises:
        ValueError: if there is no reply, the numbers of replies and weights differ, a weight is not a positive
            number, or keys or shapes differ.
    """
    if not replies or len(replies) != len(weights):
        raise ValueError(f"expected as many weights as replies and at least one, got {len(weights)} and {len(replies)}")
    if any(not math.isfinite(w) or w <= 0 for w in weights):
        raise ValueError(f"weights must be positive numbers, got {list(weights)}")
    first = replies[0]
    for index, reply in enumerate(replies):
        if list(reply) != list(first) or any(reply[key].shape != first[key].shape for key in first):
            raise ValueError(f"reply {index} differs from reply 0 in keys, order or shapes")
    total = math.fsum(weights)
    mean: dict[str, Tensor] = {}
    for key in first:
        accumulated = torch.zeros_like(at_least_float32(first[key]))
        for reply, weight in zip(replies, weights, strict=True):
            accumulated += at_least_float32(reply[key]) * (weight / total)
        mean[key] = accumulated
    return mean
