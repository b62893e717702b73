"""How a metric spreads over clients."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_LARGEST = 1e100  # above it, sums of squares overflow


def spread(metrics: Sequence[Mapping[str, Any]], without: Collection[str] = ()) -> dict[str, dict[str, float]]:
    """Mean, standard deviation and worst decile over clients of every metric that is one number of a sensible size.

    Each client counts the same. The standard deviation is that of the sample (0 for a single client). The worst decile
    is the mean over the worst tenth of the clients (rounded up): the lowest values, or the highest ones of a loss.

    Args:
        metrics: one mapping a client, all of the same names.
        without: names to leave out.
    """
    spreads = {}
    for name in metrics[0] if metrics else ():
        values = [one[name] for one in metrics]
        if name in without or any(isinstance(value, list) or not abs(value) < _LARGEST for value in values):
            continue
        worst = sorted(values, reverse=name.endswith("loss"))[: math.ceil(len(values) / 10)]
        spreads[name] = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "worst_decile": statistics.fmean(worst),
        }
    return spreads
