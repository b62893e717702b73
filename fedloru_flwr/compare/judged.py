"""The results, measured: what every table and chart reads."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from fedloru_flwr.compare import measures
from fedloru_flwr.compare.measures import Curve, Metric, Stat, Way
from fedloru_flwr.compare.results import Results, Row
from fedloru_flwr.compare.spec import Values


@dataclass(frozen=True)
class AtBudget:
    """The metric at a budget.

    Attributes:
        value: over seeds.
        untrained: not even one round is within the budget.
        whole: the whole run is.
    """

    value: Stat
    untrained: bool
    whole: bool


class Reached(NamedTuple):
    """When a curve first reached a target: the round, and the bytes that all clients together had exchanged by then."""

    round: int
    up: float
    down: float

    @property
    def shown(self) -> tuple[float, float, float, float]:
        """Round, bytes up, bytes down, bytes in all."""
        return self.round, self.up, self.down, self.up + self.down


class Target(NamedTuple):
    """An accuracy to reach.

    Attributes:
        name: for people.
        key: for the columns of the CSV.
        value: None where the method whose best it is relative to has none.
    """

    name: str
    key: str
    value: float | None


class Judged:
    """One row's measures, over the seeds whose runs finished."""

    def __init__(self, row: Row, label: str) -> None:
        self.row = row
        self.label = label
        self.runs = row.finished

    @cached_property
    def accuracy(self) -> Curve:
        """Of the global model."""
        return measures.curve(self.runs, "accuracy")

    @cached_property
    def personal(self) -> Curve:
        """Of the clients' own models."""
        return measures.curve(self.runs, "personal")

    def curve(self, metric: Metric) -> Curve:
        """One of the two."""
        return self.accuracy if metric == "accuracy" else self.personal

    def final(self, metric: Metric) -> Stat | None:
        """When the runs ended."""
        return Stat.of([measures.last(record, metric) for record in self.runs])

    def best(self, metric: Metric) -> Stat | None:
        """The best the runs ever were."""
        return Stat.of([measures.best(record, metric) for record in self.runs])

    @cached_property
    def up(self) -> float | None:
        """Bytes that all clients sent together, mean over seeds."""
        return statistics.fmean(record.up[-1] for record in self.runs) if self.runs else None

    @cached_property
    def down(self) -> float | None:
        """Bytes that the server sent."""
        return statistics.fmean(record.down[-1] for record in self.runs) if self.runs else None

    @cached_property
    def clients(self) -> int | None:
        """The number of clients."""
        return int(self.runs[0].settings["num-clients"]) if self.runs else None

    @cached_property
    def seconds(self) -> float | None:
        """A run took, mean over seeds."""
        return statistics.fmean(record.seconds for record in self.runs) if self.runs else None

    @cached_property
    def errors(self) -> list[tuple[int, float]]:
        """Aggregation error by round."""
        return measures.error_curve(self.runs)

    def at_budget(self, budget_mb: float, metric: Metric) -> AtBudget | None:
        """The last evaluation within an uplink budget."""
        line = self.curve(metric)
        at = line.within(budget_mb * 1e6)
        if at is None:
            return None
        return AtBudget(line.values[at], line.up[at] == 0, at == len(line.up) - 1)

    def reached(self, target: float | None, metric: Metric) -> Reached | None:
        """When the mean curve first reaches a target."""
        line = self.curve(metric)
        at = None if target is None else line.reaches(target)
        return None if at is None else Reached(line.rounds[at], line.up[at], line.down[at])


class Comparison:
    """All rows, measured, by combination of the axes' values."""

    def __init__(self, results: Results) -> None:
        self.results = results
        self.combinations = results.combinations()
        self.groups = [
            [Judged(row, results.labels[row.method]) for row in results.rows if row.at == at]
            for at in self.combinations
        ]

    @property
    def judged(self) -> list[Judged]:
        """All rows."""
        return [one for group in self.groups for one in group]

    def has(self, metric: Metric) -> bool:
        """Whether any run was measured so."""
        return any(one.curve(metric).values for one in self.judged)

    def budgets(self, group: int) -> list[float]:
        """The uplink budgets of a combination, in MB."""
        if self.results.budgets_mb is not None:
            return self.results.budgets_mb
        return measures.automatic_budgets([one.up for one in self.groups[group] if one.up])

    def targets(self, group: int, metric: Metric) -> list[Target]:
        """The targets of a combination."""
        found = [Target(f"{value:g}", f"{value:g}", value) for value in self.results.targets]
        for one in self.results.below_best:
            method, minus = one["best_of"], one["minus"]
            means = [
                stat.mean for row in self.groups[group] if row.row.method == method for stat in row.curve(metric).values
            ]
            label = self.results.labels.get(method, method)
            name = f"{label}'s best" + (f" - {minus:g}" if minus else "")
            found.append(Target(name, f"{method}_best-{minus:g}", max(means) - minus if means else None))
        return found

    def front(self, group: int, metric: Metric, way: Way) -> set[int]:
        """Which rows of a combination are on the Pareto front."""
        return measures.front([one.curve(metric) for one in self.groups[group]], way)

    def reference(self, group: int) -> Judged | None:
        """The row that gaps of a combination are measured from."""
        return next((one for one in self.groups[group] if one.row.method == self.results.reference), None)


def winners(values: Sequence[float | None], *, low: bool = False) -> set[int]:
    """Which of the values are best; none where fewer than two are there."""
    known = [value for value in values if value is not None]
    if len(known) < 2:
        return set()
    top = min(known) if low else max(known)
    return {number for number, value in enumerate(values) if value == top}


def same_but(at: Values, axis: str) -> Values:
    """The other axes' values."""
    return {name: value for name, value in at.items() if name != axis}
