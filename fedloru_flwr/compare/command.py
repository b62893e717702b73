"""`fedloru compare` and `fedloru report` as Python functions."""

import dataclasses
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fedloru_flwr import atomic
from fedloru_flwr.compare import charts
from fedloru_flwr.compare.judged import Comparison
from fedloru_flwr.compare.page import html
from fedloru_flwr.compare.places import Places, only_one
from fedloru_flwr.compare.plan import Plan
from fedloru_flwr.compare.records import fingerprint
from fedloru_flwr.compare.results import FILE, Results, Row, join, of_run_directories
from fedloru_flwr.compare.runner import Interrupted, Runner
from fedloru_flwr.compare.spec import Spec, read_spec
from fedloru_flwr.compare.table import as_csv, failures, markdown, timing_csv
from fedloru_flwr.config import ConfigError
from fedloru_flwr.launch import Engine, engine_named

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Outcome:
    """What a comparison or a report left.

    Attributes:
        output_dir: where its files are.
        results: all numbers.
        failures: a line for each method and place where runs failed.
    """

    output_dir: Path
    results: Results
    failures: tuple[str, ...]


def compare(
    conf: StrPath,
    output_dir: StrPath | None = None,
    *,
    engine: Engine = "in-process",
    jobs: int | None = None,
    console: Console | None = None,
) -> Outcome:
    """Run all methods over all axes and seeds, or go on with that, and judge them side by side.

    Args:
        conf: the comparison's CONF.toml.
        output_dir: where everything goes; default ``runs/compare-<name of conf>``.
        engine: of the runs.
        jobs: runs at a time; default one a core, on Flower one.
        console: for people; default standard output.

    Returns:
        The numbers, and which runs failed.

    Raises:
        ConfigError: something makes no sense; nothing was run.
        KeyboardInterrupt: by Ctrl-C or SIGTERM; calling it again goes on.
    """
    path = Path(conf)
    spec = read_spec(path)
    engine_named(engine)
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    given = output_dir is not None
    directory = Path(output_dir) if output_dir is not None else Path("runs") / f"compare-{spec.name}"
    directory = directory.expanduser().absolute()
    told = ["fedloru", "compare", str(conf), *(["--output-dir", str(output_dir)] if given else [])]
    told += ["--engine", engine] if engine != "in-process" else []
    origin = {
        "directory": str(directory),
        "command": shlex.join(told),
        "conf": path.read_text(encoding="utf-8"),
    }
    console = console or Console()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output-dir = '{directory}' cannot be written: {error.strerror or error}") from error
    with only_one(directory) as lock:
        runner = Runner(spec, str(path), Places(directory), engine, jobs, lock, console)
        try:
            partitions = runner.run(_known_partitions(directory))
        except Interrupted:
            _gather(spec, origin, runner, []).write(directory)
            raise KeyboardInterrupt(f"what is finished is in {directory}; the same command goes on") from None
        results = _gather(spec, origin, runner, partitions)
        outcome = _leave(results, directory)
    _tell(outcome, console)
    return outcome


def report(dirs: Sequence[StrPath], output_dir: StrPath | None = None, *, console: Console | None = None) -> Outcome:
    """Write tables and report anew: of one comparison, of several joined, or of runs that no comparison made.

    Args:
        dirs: output directories of `compare`, or run directories.
        output_dir: default: a single comparison's own directory, else ``report`` beside the first of them.
        console: for people; default standard output.

    Raises:
        ConfigError: a directory is neither, or both kinds are given.
        OutputError: a run directory cannot be read.
    """
    paths = [Path(one).expanduser().absolute() for one in dirs]
    if not paths:
        raise ConfigError("name the output directory of a comparison, or run directories")
    compared = [(path / FILE).is_file() for path in paths]
    if all(compared):
        parts = [(path.name, Results.read(path)) for path in paths]
        results = join(parts)
    elif any(compared):
        other = paths[compared.index(False)]
        raise ConfigError(f"{other} has no {FILE}: name comparisons or runs, not both")
    else:
        _measure_ranks(paths, console or Console())
        results = of_run_directories(paths)
    single = all(compared) and len(paths) == 1
    default = paths[0] if single else paths[0].parent / "report"
    directory = default if output_dir is None else Path(output_dir).expanduser().absolute()
    directory.mkdir(parents=True, exist_ok=True)
    outcome = _leave(results, directory, keep=not (single and directory == paths[0]))
    _tell(outcome, console or Console())
    return outcome


def _measure_ranks(runs: Sequence[Path], console: Console) -> None:
    """Write down the rank of what each run has learned; one of which that is not known goes without."""
    from fedloru_flwr.rank.learned import write_ranks

    for run in runs:
        try:
            with console.status(f"rank of what {escape(run.name)} has learned"):
                write_ranks(run)
        except (ValueError, OSError) as error:
            told = f"no rank of what was learned: {error}"
            console.print(told, markup=False, highlight=False, soft_wrap=True)


def _leave(results: Results, directory: Path, *, keep: bool = True) -> Outcome:
    comparison = Comparison(results)
    atomic.write_text(directory / "table.md", markdown(comparison))
    atomic.write_text(directory / "table.csv", as_csv(comparison))
    atomic.write_text(directory / "timing.csv", timing_csv(comparison))
    atomic.write_text(directory / "report.html", html(comparison))
    pictures = charts.files(comparison)
    (directory / "charts").mkdir(exist_ok=True)
    for left in set((directory / "charts").glob("*.svg")) - {directory / "charts" / name for name in pictures}:
        left.unlink()  # of an axis or a metric that is gone
    for name, picture in pictures.items():
        atomic.write_bytes(directory / "charts" / name, picture)
    if keep:
        results.write(directory)
    return Outcome(directory, results, tuple(failures(comparison)))


def _tell(outcome: Outcome, console: Console) -> None:
    for line in outcome.failures:
        console.print(f"failed: {line}", markup=False, highlight=False, soft_wrap=True)
    for name in ("table.md", "report.html"):
        console.print(str(outcome.output_dir / name), markup=False, highlight=False, soft_wrap=True)


def _gather(spec: Spec, origin: dict[str, str], runner: Runner, partitions: list[dict[str, Any]]) -> Results:
    plan, found = runner.plan, runner.results
    choices = {(choice.method, tuple(choice.at.items())): choice for choice in plan.choices}
    rows = []
    for number, at in enumerate(spec.combinations()):
        for method in spec.methods:
            wanted = plan.finals.get((method.name, number), {})
            runs = {seed: found[run.key] for seed, run in wanted.items() if run.key in found}
            choice = choices.get((method.name, tuple((axis, at[axis]) for axis in spec.tuning.per)))
            values = (choice.values if choice else None) or {}
            missing = [] if choice and choice.decided and choice.values is None else spec.seeds
            rows.append(Row(method.name, at, values, runs, [seed for seed in missing if seed not in runs]))
    return Results(
        title=spec.title,
        origins=[origin],
        seeds=list(spec.seeds),
        targets=list(spec.targets),
        below_best=[dataclasses.asdict(one) for one in spec.below_best],
        budgets_mb=None if spec.budgets_mb is None else list(spec.budgets_mb),
        reference=spec.reference,
        axes={axis: list(values) for axis, values in spec.axes.items()},
        labels={method.name: method.label for method in spec.methods},
        rows=rows,
        choices=_choices(spec, plan),
        partitions=partitions,
        complete=not any(row.missing for row in rows),
    )


def _choices(spec: Spec, plan: Plan) -> list[dict[str, Any]]:
    def number(value: float) -> float | None:
        return value if abs(value) < float("inf") else None

    return [
        {
            "method": choice.method,
            "at": choice.at,
            "by": spec.tuning.by,
            "seeds": list(spec.tuning.seeds),
            "settings": dict(spec.tuning.settings),
            "tried": [
                {
                    "values": tried.values,
                    "score": None if tried.score is None else [number(value) for value in tried.score],
                    "widened": tried.widened,
                }
                for tried in choice.tried
            ],
            "values": choice.values,
        }
        for choice in plan.choices
    ]


def _known_partitions(directory: Path) -> dict[str, list[list[int]]]:
    """Partitions that need not be counted again."""
    try:
        entries = Results.read(directory).partitions
    except ConfigError:
        return {}
    return {fingerprint(entry["settings"]): entry["counts"] for entry in entries}
