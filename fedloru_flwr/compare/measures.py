"""Numbers from runs: means over seeds, bytes to a target, accuracy at equal bytes, gaps."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedloru_flwr.compare.records import Record
from fedloru_flwr.compare.spec import By

Metric = Literal["accuracy", "personal"]
Way = Literal["up", "all"]  # bytes that clients sent; those and what was sent to them
EXACT_BELOW = 1e-6  # relative aggregation errors up to here are float32 rounding


@dataclass(frozen=True)
class Stat:
    """A mean over seeds, and the sample standard deviation; None for a single seed."""

    mean: float
    std: float | None

    @classmethod
    def of(cls, values: Sequence[float | None]) -> "Stat | None":
        """Of the values that are there; None if none is."""
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None)


@dataclass(frozen=True)
class Curve:
    """A metric over the rounds in which every seed's run was evaluated.

    Attributes:
        rounds: those rounds.
        up: bytes that clients had sent by then, all clients together, mean over seeds.
        down: the same for the server.
        values: the metric over seeds.
    """

    rounds: list[int]
    up: list[float]
    down: list[float]
    values: list[Stat]

    def spent(self, way: Way) -> list[float]:
        """Bytes by the end of each of the rounds."""
        return self.up if way == "up" else [up + down for up, down in zip(self.up, self.down, strict=True)]

    def reaches(self, target: float) -> int | None:
        """The first point whose mean is at least ``target``."""
        return next((i for i, value in enumerate(self.values) if value.mean >= target), None)

    def within(self, budget: float) -> int | None:
        """The last point up to which clients had sent at most ``budget`` bytes."""
        return max((i for i, up in enumerate(self.up) if up <= budget), default=None)


def curve(records: Sequence[Record], metric: Metric) -> Curve:
    """The mean of several seeds' runs."""
    by_round = [
        {
            number: (up, down, value)
            for number, up, down, value in zip(r.rounds, r.up, r.down, getattr(r, metric), strict=True)
            if value is not None
        }
        for r in records
    ]
    shared = sorted(set.intersection(*(set(points) for points in by_round))) if by_round else []
    points = [[run[number] for run in by_round] for number in shared]
    values = [Stat.of([value for _, _, value in point]) for point in points]
    return Curve(
        rounds=shared,
        up=[statistics.fmean(up for up, _, _ in point) for point in points],
        down=[statistics.fmean(down for _, down, _ in point) for point in points],
        values=[value for value in values if value is not None],
    )


def front(lines: Sequence[Curve], way: Way) -> set[int]:
    """Which of the curves end on the Pareto front of metric against bytes; none where there are fewer than two.

    One does if no other has at any of its points at least as high a mean with fewer bytes, or a higher one with as
    many.
    """
    ends = {n: (line.spent(way)[-1], line.values[-1].mean) for n, line in enumerate(lines) if line.values}

    def is_passed(number: int) -> bool:
        spent, mean = ends[number]
        return any(
            (other < spent and value.mean >= mean) or (other <= spent and value.mean > mean)
            for n in ends
            if n != number
            for other, value in zip(lines[n].spent(way), lines[n].values, strict=True)
        )

    return {number for number in ends if not is_passed(number)} if len(ends) > 1 else set()


def error_curve(records: Sequence[Record]) -> list[tuple[int, float]]:
    """Round and aggregation error, mean over layers and seeds, where every seed has one."""
    by_round = [{n: e for n, e in zip(r.rounds, r.error, strict=True) if e is not None} for r in records]
    shared = sorted(set.intersection(*(set(run) for run in by_round))) if by_round else []
    return [(number, statistics.fmean(run[number] for run in by_round)) for number in shared]


def is_exact(errors: Sequence[tuple[int, float]]) -> bool:
    """Whether the aggregation is exact but for rounding."""
    return bool(errors) and max(error for _, error in errors) <= EXACT_BELOW


def last(record: Record, metric: Metric) -> float | None:
    """The metric when the run ended."""
    return next((value for value in reversed(getattr(record, metric)) if value is not None), None)


def best(record: Record, metric: Metric) -> float | None:
    """The best the metric ever was."""
    return max((value for value in getattr(record, metric) if value is not None), default=None)


def spread(records: Sequence[Record], metric: str) -> tuple[Stat, Stat, Stat] | None:
    """Mean, standard deviation and worst decile over the clients, each over seeds."""
    found = [record.spread[metric] for record in records if record.spread.get(metric)]
    stats = [Stat.of([numbers.get(name) for numbers in found]) for name in ("mean", "std", "worst_decile")]
    mean, std, worst = stats
    return None if mean is None or std is None or worst is None else (mean, std, worst)


def learned(records: Sequence[Record]) -> dict[str, list[Stat | None]]:
    """The rank of what was learned, by matrix.

    Stable rank, effective rank and rank of 90 % at the end; of the ledger's entries their number, the mean share that
    is new and the mean alignment of those after the first, and the mean aggregation error of all.
    """
    found = {}
    for layer in dict.fromkeys(row["layer"] for record in records for row in record.ranks if row["kind"] == "learned"):
        own = [[row for row in record.ranks if row["layer"] == layer] for record in records if record.ranks]
        ends = [next((row for row in rows if row["kind"] == "learned"), {}) for rows in own]
        entries = [[row for row in rows if row["kind"] == "ledger"] for rows in own]
        found[layer] = [
            *(
                Stat.of([end.get(f"total_{key}") for end in ends])
                for key in ("stable_rank", "effective_rank", "rank_90")
            ),
            Stat.of([len(rows) or None for rows in entries]),
            *(Stat.of([_mean([row[key] for row in rows[1:]]) for rows in entries]) for key in ("new", "alignment")),
            Stat.of([_mean([row.get("aggregation_error") for row in rows]) for rows in entries]),
        ]
    return found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def paired_gap(records: dict[int, Record], reference: dict[int, Record]) -> Stat | None:
    """Final accuracy minus that of the reference's run of the same seed, over seeds."""
    gaps = []
    for seed in records:
        ours = last(records[seed], "accuracy")
        theirs = last(reference[seed], "accuracy") if seed in reference else None
        gaps.append(None if ours is None or theirs is None else ours - theirs)
    return Stat.of(gaps)


def score(groups: Sequence[Sequence[Record]], by: By, target: float | None) -> tuple[float, ...] | None:
    """How good a candidate of a grid is; the larger, the better. None if a run failed or nothing was measured.

    Args:
        groups: for each combination of axes it is judged on, the runs of the tuning seeds.
        by: what counts. A method without a global model is judged by its personal accuracy instead; and one without
            personal models, by the mean over the clients of the global model's accuracy.
        target: for ``bytes_up_to_target``, whose score is minus the bytes, then the final accuracy.
    """
    if not all(record.finished for group in groups for record in group):
        return None
    metric: Metric = "personal" if by == "personal_accuracy" else "accuracy"
    if metric == "accuracy" and all(last(r, "accuracy") is None for group in groups for r in group):
        metric = "personal"
    pick = best if by == "best_accuracy" else last
    values = [pick(record, metric) for group in groups for record in group]
    if by == "personal_accuracy" and not any(value is not None for value in values):
        values = [record.spread.get("accuracy", {}).get("mean") for group in groups for record in group]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    accuracy = statistics.fmean(known)
    if by != "bytes_up_to_target" or target is None:
        return (accuracy,)
    spent = []
    for group in groups:
        line = curve(group, metric)
        at = line.reaches(target)
        spent.append(math.inf if at is None else line.up[at])
    return (-statistics.fmean(spent), accuracy)


def automatic_budgets(totals: Sequence[float]) -> list[float]:
    """The three smallest in MB of: a quarter of the smallest total uplink, that total, the median, the largest.

    Rounded up to two digits, so that the method a total belongs to is within it.
    """
    if not totals:
        return []
    least = min(totals)
    wanted = (least / 4, least, statistics.median(totals), max(totals))
    return sorted({_rounded_up(value / 1e6) for value in wanted if value > 0})[:3]


def _rounded_up(value: float) -> float:
    step = 10.0 ** (math.floor(math.log10(value)) - 1)
    # The division is off by rounding for values that are round already.
    return float(f"{math.ceil(value / step - 1e-9) * step:.6g}")
