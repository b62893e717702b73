"""What a comparison found, in one object: written to ``results.json``, read back, joined with others."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from fedloru_flwr import atomic
from fedloru_flwr.compare.records import FREE, Record
from fedloru_flwr.compare.spec import Values, describe
from fedloru_flwr.config import ConfigError, RunConfig, Scalar

FILE = "results.json"
FORMAT = 1


@dataclass
class Row:
    """A method at one combination of the axes' values.

    Attributes:
        method: its name.
        at: the axes' values.
        choice: what its grid was decided to.
        runs: by seed, the failed ones included.
        missing: seeds that have not been run.
    """

    method: str
    at: Values
    choice: Values
    runs: dict[int, Record]
    missing: list[int] = field(default_factory=list)

    @property
    def finished(self) -> list[Record]:
        """The runs that ended well."""
        return [record for record in self.runs.values() if record.finished]


@dataclass
class Results:
    """All that tables and report are made of.

    Attributes:
        title: for people.
        origins: where the runs lie and how they were made: ``directory``, ``command`` and ``conf`` of each source.
        seeds: of the final runs.
        targets: accuracies to reach.
        budgets_mb: uplink budgets; None: taken from the data.
        reference: the name of the method that gaps are measured from.
        axes: the values of what is varied.
        labels: the methods' names for people, by name and in their order.
        rows: one a method and combination.
        choices: the tuning grids: ``method``, ``at``, ``by``, ``seeds``, ``tried``, ``values``.
        partitions: how the data were dealt out: ``rows`` (method and number of the combination) and ``counts`` (clients
            by classes).
        complete: nothing is left to run.
        below_best: targets relative to a method's best: ``best_of``, the method's name, and ``minus``.
    """

    title: str
    origins: list[dict[str, str]]
    seeds: list[int]
    targets: list[float]
    budgets_mb: list[float] | None
    reference: str
    axes: dict[str, list[Scalar]]
    labels: dict[str, str]
    rows: list[Row]
    choices: list[dict[str, Any]] = field(default_factory=list)
    partitions: list[dict[str, Any]] = field(default_factory=list)
    complete: bool = True
    below_best: list[dict[str, Any]] = field(default_factory=list)

    def combinations(self) -> list[Values]:
        """The axes' values that rows have, in order of appearance."""
        found: list[Values] = []
        for row in self.rows:
            if row.at not in found:
                found.append(row.at)
        return found

    def write(self, directory: Path) -> None:
        """Write ``results.json``."""
        rows = [
            {**vars(row), "runs": {str(seed): record.as_json() for seed, record in row.runs.items()}}
            for row in self.rows
        ]
        content = {"format": FORMAT, **vars(self), "rows": rows}
        atomic.write_text(directory / FILE, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Self:
        """Read ``results.json``.

        Raises:
            ConfigError: there is none, or it is not of this format.
        """
        path = directory / FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another version of the package wrote it")
            rows = [
                Row(**{**row, "runs": {int(seed): Record.from_json(run) for seed, run in row["runs"].items()}})
                for row in content.pop("rows")
            ]
            return cls(**content, rows=rows)
        except FileNotFoundError:
            raise ConfigError(f"{directory} holds no comparison: it has no {FILE}") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} cannot be read: {error}") from error


def of_run_directories(paths: Sequence[Path]) -> Results:
    """Gather runs that no comparison made: those that differ in nothing but the seed are one row.

    The number of clients is an axis where it varies; other settings that vary are told in the method's name.

    Raises:
        OutputError: a path is no run.
    """
    records = [Record.of_directory(path) for path in paths]
    for record in records:
        if not record.settings:
            raise ConfigError(f"{record.path} does not say with which settings it was run")
    axis = "num-clients"
    varies = len({record.settings[axis] for record in records}) > 1
    silent = {"algorithm", "seed", *FREE, *([axis] if varies else [])}
    labels: dict[str, str] = {}
    rows: dict[tuple[str, object], Row] = {}
    for record in records:
        algorithm = record.settings["algorithm"]
        peers = [other.settings for other in records if other.settings["algorithm"] == algorithm]
        told = {
            key: value
            for key, value in record.settings.items()
            if key not in silent and any(peer.get(key) != value for peer in peers)
        }
        label = ", ".join(filter(None, (str(algorithm), describe(told))))
        labels.setdefault(label, label)
        at: Values = {axis: record.settings[axis]} if varies else {}
        row = rows.setdefault((label, tuple(at.values())), Row(label, at, {}, {}))
        seed = int(record.settings["seed"])
        if seed in row.runs:
            raise ConfigError(f"{record.path} and {row.runs[seed].path} are runs with the same settings: give one")
        row.runs[seed] = record
    return Results(
        title="Runs side by side",
        origins=[{"directory": record.path, "command": "", "conf": ""} for record in records],
        seeds=sorted({seed for row in rows.values() for seed in row.runs}),
        targets=[],
        budgets_mb=None,
        reference=next(iter(labels)),
        axes={axis: sorted({record.settings[axis] for record in records})} if varies else {},
        labels=labels,
        rows=list(rows.values()),
    )


def join(parts: Sequence[tuple[str, Results]]) -> Results:
    """Put several comparisons side by side.

    What one varies and another does not becomes an axis of both, by the runs' settings. A method that another part
    has under the same name with other settings gets its part's name added.

    Args:
        parts: each with a name that tells it from the others.
    """
    if len(parts) == 1:
        return parts[0][1]
    axes = list(dict.fromkeys(axis for _, part in parts for axis in part.axes))
    joined = dataclasses.replace(
        parts[0][1],
        title=" + ".join(dict.fromkeys(part.title for _, part in parts)),
        origins=[origin for _, part in parts for origin in part.origins],
        seeds=sorted({seed for _, part in parts for seed in part.seeds}),
        targets=sorted({target for _, part in parts for target in part.targets}),
        below_best=[*{json.dumps(one): one for _, part in parts for one in part.below_best}.values()],
        budgets_mb=_joined_budgets([part.budgets_mb for _, part in parts]),
        labels={},
        rows=[],
        choices=[],
        partitions=[],
        complete=all(part.complete for _, part in parts),
    )
    for name, part in parts:
        for row in part.rows:
            row.at = _placed(row, axes)
        theirs = {method: [row for row in part.rows if row.method == method] for method in part.labels}
        for method, rows in theirs.items():
            new = method
            if method in joined.labels and not all(_fits(row, joined.rows) for row in rows):
                new = f"{method} ({name})"
            label = part.labels[method]
            joined.labels.setdefault(new, label if new == method else f"{label} ({name})")
            for row in rows:
                same = next((r for r in joined.rows if (r.method, r.at) == (new, row.at)), None)
                if same is None:
                    joined.rows.append(dataclasses.replace(row, method=new))
                else:
                    same.runs = {**row.runs, **same.runs}
            joined.choices += [{**c, "method": new} for c in part.choices if c["method"] == method]
        joined.partitions += [{**entry, "rows": []} for entry in part.partitions]
    order = {axis: list(dict.fromkeys(row.at[axis] for row in joined.rows)) for axis in axes}
    joined.axes = {axis: sorted(values) if _are_numbers(values) else values for axis, values in order.items()}
    joined.rows.sort(key=lambda row: [joined.axes[axis].index(row.at[axis]) for axis in axes])
    return joined


def _joined_budgets(budgets: Sequence[list[float] | None]) -> list[float] | None:
    known = [one for one in budgets if one is not None]
    return sorted({value for one in known for value in one}) if len(known) == len(budgets) else None


def _placed(row: Row, axes: Sequence[str]) -> Values:
    settings = next((record.settings for record in row.runs.values()), {})
    defaults = RunConfig().as_mapping()
    return {axis: row.at[axis] if axis in row.at else settings.get(axis, defaults[axis]) for axis in axes}


def _fits(row: Row, others: Sequence[Row]) -> bool:
    """Whether the row continues the one of the same method and place: equal settings but for the seed."""
    same = next((other for other in others if (other.method, other.at) == (row.method, row.at)), None)
    if same is None:
        return True
    kinds = {_without_seed(record.settings) for record in [*row.runs.values(), *same.runs.values()]}
    return len(kinds) <= 1


def _without_seed(settings: Mapping[str, Scalar]) -> str:
    return json.dumps({key: value for key, value in sorted(settings.items()) if key not in ("seed", *FREE)})


def _are_numbers(values: Sequence[Scalar]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
