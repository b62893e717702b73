"""Which runs a comparison needs, from its spec and the results there are: a pure function, asked anew after each run.

So nothing has to be remembered of an interrupted comparison but its finished runs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedloru_flwr.compare.measures import score
from fedloru_flwr.compare.records import Record, fingerprint
from fedloru_flwr.compare.spec import Method, Spec, Values, describe, product
from fedloru_flwr.config import ConfigError

MAX_WIDENINGS = 3

Results = Mapping[str, Record]


@dataclass(frozen=True)
class Wanted:
    """A run that is needed.

    Attributes:
        method: whose.
        at: where on the axes.
        choice: the values of the method's grid.
        seed: the run's.
        tuning: it chooses among a grid; else it is judged.
        settings: all of them.
        key: their fingerprint.
    """

    method: str
    at: Values
    choice: Values
    seed: int
    tuning: bool
    settings: Values
    key: str

    @property
    def name(self) -> str:
        """For people."""
        told = describe({**self.at, **self.choice, "seed": self.seed})
        return f"{self.method}, {told}" + (" (tuning)" if self.tuning else "")


@dataclass(frozen=True)
class Tried:
    """A candidate of a grid: its values, what it scored (the larger, the better), whether the grid was widened."""

    values: Values
    score: tuple[float, ...] | None
    widened: bool


@dataclass(frozen=True)
class Choice:
    """What came of a grid.

    Attributes:
        method: whose grid.
        at: the axes' values that the choice is for.
        tried: in the order of trial.
        values: the best; None while undecided, or if nothing could be measured.
        decided: whether all runs are there.
    """

    method: str
    at: Values
    tried: tuple[Tried, ...]
    values: Values | None
    decided: bool


@dataclass
class Plan:
    """What is needed, as far as it is known.

    Attributes:
        runs: each run once, those that choose first.
        finals: the judged runs of each row, by (method, number of the combination) and seed.
        choices: one for each grid and each combination of the axes it is chosen for.
        undecided: how many more runs are to be judged once choices have been made.
    """

    runs: dict[str, Wanted] = field(default_factory=dict)
    finals: dict[tuple[str, int], dict[int, Wanted]] = field(default_factory=dict)
    choices: list[Choice] = field(default_factory=list)
    undecided: int = 0


class Planner:
    """Plans one comparison.

    Args:
        spec: what is compared.
    """

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._pinned = [axis for axis in spec.axes if axis in spec.tuning.settings]
        self._known: dict[tuple[object, ...], Wanted] = {}

    def plan(self, results: Results) -> Plan:
        """Return what the comparison needs, given what there is."""
        spec, plan = self._spec, Plan()
        chosen = {}
        for method in spec.methods:
            if not method.grid:
                continue
            for at in spec.combinations(spec.tuning.per):
                choice, runs = self._choose(method, at, results)
                plan.choices.append(choice)
                chosen[method.name, tuple(at.items())] = choice
                for run in runs:
                    plan.runs.setdefault(run.key, run)
        # Seed by seed, so that an early look shows every method.
        for seed in spec.seeds:
            for number, at in enumerate(spec.combinations()):
                for method in spec.methods:
                    values: Values | None = {}
                    if method.grid:
                        choice = chosen[method.name, tuple((axis, at[axis]) for axis in spec.tuning.per)]
                        plan.undecided += not choice.decided
                        values = choice.values
                    if values is not None:
                        run = self._wanted(method, at, values, seed, tuning=False)
                        plan.runs.setdefault(run.key, run)
                        plan.finals.setdefault((method.name, number), {})[seed] = run
        return plan

    def _choose(self, method: Method, at: Values, results: Results) -> tuple[Choice, list[Wanted]]:
        """Decide a grid as far as the results allow; return the runs it needs so far."""
        tuning = self._spec.tuning
        target = self._spec.targets[0] if self._spec.targets else None
        candidates = product(method.grid)
        first = len(candidates)
        runs: list[Wanted] = []
        scores: list[tuple[float, ...] | None] = []
        missing, best = False, None
        for widening in range(MAX_WIDENINGS + 1):
            for values in candidates[len(scores) :]:
                groups = [
                    [self._wanted(method, full, values, seed, tuning=True) for seed in tuning.seeds]
                    for full in self._tuned_at(at)
                ]
                needed = [run for group in groups for run in group]
                runs += needed
                there = all(run.key in results for run in needed)
                missing = missing or not there
                records = [[results[run.key] for run in group] for group in groups] if there else []
                scores.append(score(records, tuning.by, target) if there else None)
            best = None if missing else _best(scores)
            if best is None or not tuning.widen or widening == MAX_WIDENINGS:
                break
            beyond = [values for values in _beyond(candidates, candidates[best]) if self._possible(method, at, values)]
            if not beyond:
                break
            candidates += beyond
        tried = tuple(
            Tried(values, one, number >= first)
            for number, (values, one) in enumerate(zip(candidates, scores, strict=True))
        )
        return Choice(method.name, at, tried, None if best is None else candidates[best], not missing), runs

    def _tuned_at(self, at: Values) -> list[Values]:
        """The combinations of all axes whose runs decide a choice at ``at``."""
        return self._places({**at, **{axis: self._spec.tuning.settings[axis] for axis in self._pinned}})

    def _places(self, at: Values) -> list[Values]:
        """The combinations of all axes that a choice at ``at`` is for."""
        spec = self._spec
        others = spec.combinations([axis for axis in spec.axes if axis not in at])
        return [{axis: {**at, **other}[axis] for axis in spec.axes} for other in others]

    def _possible(self, method: Method, at: Values, choice: Values) -> bool:
        """Whether the settings allow a value that nobody wrote."""
        try:
            for full in self._places(at):
                for tuning in (False, True):
                    self._spec.resolved(method, full, choice, self._spec.seeds[0], tuning=tuning)
        except ConfigError:
            return False
        return True

    def _wanted(self, method: Method, at: Values, choice: Values, seed: int, *, tuning: bool) -> Wanted:
        name = (method.name, tuple(at.items()), tuple(choice.items()), seed, tuning)
        if name not in self._known:
            settings = self._spec.resolved(method, at, choice, seed, tuning=tuning)
            self._known[name] = Wanted(method.name, at, choice, seed, tuning, settings, fingerprint(settings))
        return self._known[name]


def _best(scores: Sequence[tuple[float, ...] | None]) -> int | None:
    """The first of the highest scores."""
    known = [number for number, one in enumerate(scores) if one is not None]
    return max(known, key=lambda number: (scores[number], -number), default=None)


def _beyond(candidates: Sequence[Values], best: Values) -> list[Values]:
    """One value more, at the ratio of the outermost two, on each numeric axis at whose edge the best lies.

    The edge is that of the candidates which differ from the best on this axis alone.
    """
    found = []
    for axis, value in best.items():
        line = [c[axis] for c in candidates if all(c[other] == best[other] for other in best if other != axis)]
        numbers = sorted({n for n in line if isinstance(n, int | float) and not isinstance(n, bool)})
        if len(numbers) < len(line) or len(numbers) < 2 or numbers[0] <= 0:
            continue
        wider = None
        if value == numbers[-1]:
            wider = _scaled(numbers[-1], numbers[-1] / numbers[-2])
        elif value == numbers[0]:
            wider = _scaled(numbers[0], numbers[0] / numbers[1])
        if wider is not None and wider not in numbers:
            found.append({**best, axis: wider})
    return found


def _scaled(value: int | float, ratio: float) -> int | float:
    if isinstance(value, int):
        return max(round(value * ratio), 1) if ratio < 1 else math.ceil(value * ratio - 1e-9)
    return float(f"{value * ratio:.10g}")
