"""What a comparison is: a CONF.toml of methods, axes, seeds and tuning grids, checked before anything runs."""

import dataclasses
import itertools
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fedloru_flwr.config import ConfigError, RunConfig, Scalar, name_to_key, read_toml
from fedloru_flwr.suggest import did_you_mean

By = Literal["final_accuracy", "best_accuracy", "personal_accuracy", "bytes_up_to_target"]
BYS: tuple[By, ...] = get_args(By)
Values = dict[str, Scalar]

_TOP = ("title", "seeds", "target-accuracy", "budgets-mb", "reference", "settings", "vary", "methods", "tuning")
_METHOD_ONLY = ("label", "grid")
_BELOW_BEST = ("best-of", "minus")
_TUNING = ("seeds", "by", "settings", "widen", "per")
_KEYS = tuple(name_to_key(field.name) for field in dataclasses.fields(RunConfig))
_FLOATS = tuple(name_to_key(field.name) for field in dataclasses.fields(RunConfig) if field.type is float)
_OWN = {
    "seed": "the top-level key seeds says which seeds are run",
    "output-dir": "the comparison chooses where its runs go: use --output-dir",
    "run-name": "the comparison names its runs",
    "target-accuracy": "runs go to their end; the top-level key says which accuracies are charged",
    "resume": "a comparison always continues what it finds",
}
_NAME = re.compile(r"[\w+.-]+(?: [\w+.-]+)*")


@dataclass(frozen=True)
class Method:
    """A competitor.

    Attributes:
        name: its key in the CONF.
        label: its name for people.
        settings: over those of every run.
        grid: settings to tune, with the values to try; empty where nothing is tuned.
    """

    name: str
    label: str
    settings: Values
    grid: dict[str, tuple[Scalar, ...]]


@dataclass(frozen=True)
class BelowBest:
    """A target that the results set: a method's best mean accuracy over the seeds in any round, less ``minus``.

    Attributes:
        best_of: the method's name.
        minus: between 0 and 1.
    """

    best_of: str
    minus: float


@dataclass(frozen=True)
class Tuning:
    """How a grid's best values are chosen.

    Attributes:
        seeds: the runs' seeds.
        by: what is best.
        settings: over those of the runs that are judged; of an axis: the one place on it where grids are decided.
        widen: go on beyond the edge of a numeric axis while the best is there.
        per: the axes for each of whose values a choice of its own is made.
    """

    seeds: tuple[int, ...]
    by: By
    settings: Values
    widen: bool
    per: tuple[str, ...]


@dataclass(frozen=True)
class Spec:
    """A whole comparison.

    Attributes:
        name: the CONF file's name without its ending.
        title: for people.
        seeds: of the final runs.
        targets: accuracies to reach.
        below_best: targets that a method's results set.
        budgets_mb: uplink budgets, total over the clients; None: they are taken from the results.
        reference: the method that gaps are measured from.
        settings: of every run.
        axes: what is varied.
        methods: the competitors.
        tuning: how grids are decided.
    """

    name: str
    title: str
    seeds: tuple[int, ...]
    targets: tuple[float, ...]
    below_best: tuple[BelowBest, ...]
    budgets_mb: tuple[float, ...] | None
    reference: str
    settings: Values
    axes: dict[str, tuple[Scalar, ...]]
    methods: tuple[Method, ...]
    tuning: Tuning

    def combinations(self, axes: Sequence[str] | None = None) -> list[Values]:
        """Every combination of the values of these axes (all by default), the last one changing fastest."""
        return product({name: self.axes[name] for name in (self.axes if axes is None else axes)})

    def resolved(
        self, method: Method, at: Mapping[str, Scalar], choice: Mapping[str, Scalar], seed: int, *, tuning: bool = False
    ) -> Values:
        """All settings of one run."""
        settings: dict[str, object] = {**self.settings, **at, **method.settings, **choice}
        if tuning:
            settings |= self.tuning.settings
        return RunConfig.from_mapping({**settings, "seed": seed}).as_mapping()


def product(axes: Mapping[str, Sequence[Scalar]]) -> list[Values]:
    """Every combination of values by name."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def describe(values: Mapping[str, object]) -> str:
    """``num-clients = 20, rank = 4``."""
    return ", ".join(f"{key} = {_shown(value)}" for key, value in values.items())


def read_spec(path: Path) -> Spec:
    """Read and check a comparison's CONF.toml.

    Raises:
        ConfigError: names file, table, key, value and what is allowed.
    """
    return parse_spec(read_toml(path), path.stem, str(path))


def parse_spec(content: Mapping[str, Any], name: str, source: str) -> Spec:
    """Check the content of a comparison's CONF.toml; ``source`` is what errors call it.

    Raises:
        ConfigError: see `read_spec`.
    """
    return _Reader(source).spec(content, name)


class _Reader:
    """Reads tables and says, in every error, in which file and table."""

    def __init__(self, source: str) -> None:
        self._source = source

    def spec(self, content: Mapping[str, Any], name: str) -> Spec:
        self._known(content, _TOP, "")
        settings = self._settings(content.get("settings", {}), "settings")
        axes = self._axes(content.get("vary", {}), "vary")
        self._apart(settings, "settings", axes, "vary")
        tables = self._table(content.get("methods", {}), "methods")
        if not tables:
            raise self._fault("", "there is no method: add a table such as [methods.fedloru]")
        methods = tuple(self._method(key, table, axes) for key, table in tables.items())
        labels = [method.label for method in methods]
        for label in labels:
            if labels.count(label) > 1:
                raise self._fault("methods", f"{labels.count(label)} methods have the label {label!r}")
        seeds = self._seeds(content.get("seeds", [0]), "")
        targets = content.get("target-accuracy", [])
        targets = targets if isinstance(targets, list) else [targets]
        budgets = content.get("budgets-mb")
        reference = content.get("reference", methods[0].name)
        if reference not in tables:
            told = f"reference = {reference!r} is not a method: {', '.join(tables)}"
            raise self._fault("", told + did_you_mean(reference, tables))
        title = content.get("title", name)
        if not isinstance(title, str):
            raise self._fault("", f"title = {title!r} must be a text")
        spec = Spec(
            name=name,
            title=title,
            seeds=seeds,
            targets=self._numbers("target-accuracy", [one for one in targets if not isinstance(one, dict)], high=1.0),
            below_best=tuple(dict.fromkeys(self._below_best(one, tables) for one in targets if isinstance(one, dict))),
            budgets_mb=None if budgets is None else self._numbers("budgets-mb", budgets),
            reference=reference,
            settings=settings,
            axes=axes,
            methods=methods,
            tuning=self._tuning(content.get("tuning", {}), seeds, axes, methods),
        )
        if spec.tuning.by == "bytes_up_to_target" and not spec.targets:
            told = "by = 'bytes_up_to_target' needs target-accuracy"
            told += " to have a number: a target below a method's best is known after the runs" if targets else ""
            raise self._fault("tuning", told)
        self._check_runs(spec)
        return spec

    def _method(self, name: str, table: object, axes: Mapping[str, object]) -> Method:
        where = f"methods.{name}"
        content = self._table(table, where)
        if not _NAME.fullmatch(name):
            raise self._fault(
                where, f"the name {name!r} may have letters, digits, '_', '+', '-', '.' and single blanks"
            )
        label = content.get("label", name)
        if not isinstance(label, str) or not label.strip():
            raise self._fault(where, f"label = {label!r} must be a text")
        settings = self._settings(
            {key: value for key, value in content.items() if key not in _METHOD_ONLY}, where, _METHOD_ONLY
        )
        grid = self._axes(content.get("grid", {}), f"{where}.grid")
        self._apart(settings, where, axes, "vary")
        self._apart(grid, f"{where}.grid", axes, "vary")
        self._apart(grid, f"{where}.grid", settings, where)
        return Method(name, label.strip(), settings, grid)

    def _tuning(
        self, table: object, seeds: tuple[int, ...], axes: Mapping[str, object], methods: Sequence[Method]
    ) -> Tuning:
        content = self._table(table, "tuning")
        self._known(content, _TUNING, "tuning")
        settings = self._settings(content.get("settings", {}), "tuning.settings")
        by, widen = content.get("by", BYS[0]), content.get("widen", True)
        per = content.get("per", [axis for axis in axes if axis not in settings])
        if by not in BYS:
            raise self._fault("tuning", f"by = {by!r} is not one of {', '.join(BYS)}{did_you_mean(by, BYS)}")
        if not isinstance(widen, bool):
            raise self._fault("tuning", f"widen = {widen!r} must be true or false")
        if not isinstance(per, list):
            raise self._fault("tuning", f"per = {per!r} must be a list of axes of [vary]")
        for axis in per:
            if axis not in axes:
                told = f"per names {axis!r}, which is no axis of [vary]: {', '.join(axes) or 'there are none'}"
                raise self._fault("tuning", told + did_you_mean(axis, axes))
        self._apart(settings, "tuning.settings", per, "tuning.per")
        for method in methods:
            self._apart(settings, "tuning.settings", method.grid, f"methods.{method.name}.grid")
        chosen = self._seeds(content["seeds"], "tuning") if "seeds" in content else seeds[:1]
        return Tuning(chosen, by, settings, widen, tuple(axis for axis in axes if axis in per))

    def _check_runs(self, spec: Spec) -> None:
        """Check the settings of every run, and name the table that a wrong one comes from."""
        for method in spec.methods:
            for at, choice in itertools.product(spec.combinations(), product(method.grid)):
                for tuning in (False, True) if method.grid else (False,):
                    try:
                        settings = spec.resolved(method, at, choice, spec.seeds[0], tuning=tuning)
                    except ConfigError as error:
                        raise self._of_run(str(error), spec, method, at, tuning) from None
                    if settings["dataset"] == "clients":
                        told = "dataset = 'clients' is for a deployment; a comparison simulates the clients"
                        raise self._of_run(told, spec, method, at, tuning)

    def _of_run(self, message: str, spec: Spec, method: Method, at: Mapping[str, Scalar], tuning: bool) -> ConfigError:
        key = message.split(" = ")[0]
        tables: dict[str, Mapping[str, object]] = {
            "tuning.settings": spec.tuning.settings if tuning else {},
            f"methods.{method.name}.grid": method.grid,
            f"methods.{method.name}": method.settings,
            "vary": at,
            "settings": spec.settings,
        }
        where = next((table for table, values in tables.items() if key in values), f"methods.{method.name}")
        return self._fault(where, message + (f" (at {describe(at)})" if at and where != "vary" else ""))

    def _settings(self, table: object, where: str, also: Sequence[str] = ()) -> Values:
        content = self._table(table, where)
        self._own(content, where)
        self._known(content, (*_KEYS, *also), where)
        for key, value in content.items():
            if not isinstance(value, bool | int | float | str):
                raise self._fault(where, f"{key} = {value!r} must be a plain value, got a {type(value).__name__}")
        return dict(content)

    def _axes(self, table: object, where: str) -> dict[str, tuple[Scalar, ...]]:
        content = self._table(table, where)
        self._own(content, where)
        self._known(content, _KEYS, where)
        axes = {}
        for key, values in content.items():
            if not isinstance(values, list) or not values:
                raise self._fault(where, f"{key} = {values!r} must be a list of values, such as [{_shown(values)}]")
            if not all(isinstance(value, bool | int | float | str) for value in values):
                raise self._fault(where, f"{key} = {values!r} must list plain values")
            if len(set(values)) < len(values):
                raise self._fault(where, f"{key} = {values!r} lists a value twice")
            axes[key] = tuple(float(value) if key in _FLOATS and type(value) is int else value for value in values)
        return axes

    def _seeds(self, value: object, where: str) -> tuple[int, ...]:
        if not isinstance(value, list) or not value or not all(type(seed) is int and seed >= 0 for seed in value):
            raise self._fault(where, f"seeds = {value!r} must be a list of whole numbers from 0 on, such as [0, 1, 2]")
        if len(set(value)) < len(value):
            raise self._fault(where, f"seeds = {value!r} lists a seed twice")
        return tuple(value)

    def _numbers(self, key: str, values: object, high: float = float("inf")) -> tuple[float, ...]:
        if not isinstance(values, list) or not all(type(v) in (int, float) and 0 < v <= high for v in values):
            allowed = "above 0" + (f" and at most {high:g}" if high < float("inf") else "")
            raise self._fault("", f"{key} = {values!r} must be numbers {allowed}")
        return tuple(sorted({float(value) for value in values}))

    def _below_best(self, content: Mapping[str, Any], methods: Mapping[str, object]) -> BelowBest:
        self._known(content, _BELOW_BEST, "target-accuracy")
        method, minus = content.get("best-of"), content.get("minus", 0)
        if not isinstance(method, str) or method not in methods:
            told = f"best-of = {method!r} is not a method: {', '.join(methods)}"
            raise self._fault("target-accuracy", told + did_you_mean(str(method), methods))
        if type(minus) not in (int, float) or not 0 <= minus < 1:
            raise self._fault("target-accuracy", f"minus = {minus!r} must be a number of at least 0 and below 1")
        return BelowBest(method, float(minus))

    def _own(self, content: Mapping[str, Any], where: str) -> None:
        for key, why in _OWN.items():
            if key in content:
                raise self._fault(where, f"{key} = {content[key]!r} cannot be set here: {why}")

    def _apart(self, one: Mapping[str, Any], its: str, other: Container[str], place: str) -> None:
        for key in one:
            if key in other:
                raise self._fault(its, f"{key} = {_shown(one[key])} stands in [{place}] too: give it in one of them")

    def _table(self, value: object, where: str) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            raise self._fault("", f"{where} = {value!r} must be a table: [{where}]")
        return value

    def _known(self, content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
        for key in content:
            if key not in known:
                raise self._fault(where, f"unknown key {key!r}{did_you_mean(key, known)}")

    def _fault(self, where: str, message: str) -> ConfigError:
        return ConfigError(f"{self._source}: [{where}] {message}" if where else f"{self._source}: {message}")


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return repr(list(value)) if isinstance(value, tuple) else f"{value}"
