"""`fedloru rank` as a Python function."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from fedloru_flwr import atomic
from fedloru_flwr.compare.places import only_one
from fedloru_flwr.compare.pool import Interrupted, Pool, worker_environment
from fedloru_flwr.compare.records import fingerprint
from fedloru_flwr.compare.runner import font_cache, signals
from fedloru_flwr.config import ConfigError, RunConfig
from fedloru_flwr.export import Trained
from fedloru_flwr.job import recorded_settings
from fedloru_flwr.rank import advice as advising
from fedloru_flwr.rank import pictures, summary
from fedloru_flwr.rank.learned import ledger_rows
from fedloru_flwr.rank.spec import Measure, RankSpec, Training, read_rank_spec
from fedloru_flwr.rank.unit import UnitFiles, pilot_evidence
from fedloru_flwr.registry import ALGORITHMS
from fedloru_flwr.runs import RunDirectory

StrPath = str | os.PathLike[str]
PILOT_ROUNDS = 20
_PILOT_CLIENTS = 20


@dataclass(frozen=True)
class Analysis:
    """What an analysis left.

    Attributes:
        output_dir: where its files are.
        rows: every measurement.
        failures: a line for each training that failed.
        advice: the proposal, where one was asked for.
    """

    output_dir: Path
    rows: tuple[dict[str, Any], ...]
    failures: tuple[str, ...] = ()
    advice: advising.Advice | None = None


@dataclass(frozen=True)
class _Unit:
    """One training of one seed, to be carried out by a worker."""

    training: Training
    seed: int
    settings: Mapping[str, Any]
    clients: Mapping[str, Any]
    measure: Measure
    directory: Path

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.training.label}, seed {self.seed}"

    @property
    def steps(self) -> int:
        """Rounds to train, and measurements to make."""
        return int(self.settings["num-server-rounds"]) + self.measure.steps


def rank(
    conf: StrPath,
    output_dir: StrPath | None = None,
    *,
    advise: bool = False,
    jobs: int | None = None,
    console: Console | None = None,
) -> Analysis:
    """Measure the rank story, or go on with that: curvature, similarity of clients, what accumulation builds.

    Args:
        conf: an analysis's CONF.toml; a flat CONF.toml of settings, which is analysed with defaults; or the directory
            of a run, of which the ledger alone is analysed, without training anything.
        output_dir: where everything goes; default ``runs/rank-<name of conf>``, for a run ``<run>/rank``.
        advise: instead of measuring, run a short full-rank pilot and propose rank, accumulation and layers.
        jobs: trainings at a time; default one a core.
        console: for people; default standard output.

    Raises:
        ConfigError: something makes no sense; nothing was run.
        KeyboardInterrupt: by Ctrl-C or SIGTERM; calling it again goes on.
    """
    console = console or Console()
    path = Path(conf)
    if path.is_dir():
        if advise:
            raise ConfigError(f"{path} is a run; advice needs a CONF.toml, whose data and network a pilot is run on")
        return _of_run(path, output_dir, console)
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, got {jobs}")
    asked = read_rank_spec(path)
    spec, whose = _pilot(asked) if advise else (asked, "")
    default = Path("runs") / f"{'advice' if advise else 'rank'}-{spec.name}"
    directory = (default if output_dir is None else Path(output_dir)).expanduser().absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output-dir = '{directory}' cannot be written: {error.strerror or error}") from error
    units = [_unit(spec, training, seed, directory) for seed in spec.seeds for training in spec.trainings]
    with only_one(directory) as lock:
        failures = _carry_out(units, directory, jobs or os.cpu_count() or 1, lock, console)
    if advise:
        return _advised(asked, units[0], whose, directory, failures, console)
    rows = [row for unit in units for row in _rows(unit)]
    return _leave(spec.title, spec.seeds, rows, directory, failures, console)


def _of_run(path: Path, output_dir: StrPath | None, console: Console) -> Analysis:
    """Analyse the ledger of a run that is there."""
    run = RunDirectory.open(path)
    settings = recorded_settings(run)
    if not settings:
        raise ConfigError(f"{run.path} has no settings in its manifest: a run of `fedloru run` has")
    config = RunConfig.from_mapping(settings)
    label = {"training": config.algorithm, "label": config.algorithm, "seed": config.seed}
    rows = [{**label, **row} for row in ledger_rows(Trained.of_run(run.path))]
    if not rows:
        raise ConfigError(f"{run.path} has no ledger: {config.algorithm} trains no factors; see `fedloru report`")
    directory = run.path / "rank" if output_dir is None else Path(output_dir).expanduser().absolute()
    directory.mkdir(parents=True, exist_ok=True)
    return _leave(f"Rank of {run.path.name}", (config.seed,), rows, directory, (), console)


def _unit(spec: RankSpec, training: Training, seed: int, directory: Path) -> _Unit:
    settings, clients = spec.resolved(training, seed), spec.clients(seed)
    key = fingerprint({**settings, "clients": fingerprint(clients), "measure": json.dumps(asdict(spec.measure))})
    place = directory / "units" / f"{training.name}-seed-{seed}-{key}"
    return _Unit(training, seed, settings, clients, spec.measure, place)


def _rows(unit: _Unit) -> list[dict[str, Any]]:
    label = {"training": unit.training.name, "label": unit.training.label, "seed": unit.seed}
    return [
        {**label, **({"round": int(part)} if part.isdigit() else {}), **row}
        for (part, _), rows in UnitFiles(unit.directory).measures().items()
        for row in rows
    ]


def _carry_out(
    units: Sequence[_Unit], directory: Path, jobs: int, lock: int | None, console: Console
) -> tuple[str, ...]:
    """Train and measure what is missing, with a bar; return what failed."""
    failed: list[str] = []
    (directory / "logs").mkdir(exist_ok=True)
    waiting = iter(units)
    running: dict[str, _Unit] = {}
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal or console.is_dumb_terminal,
    )
    shown = bar.add_task("rounds and measurements", total=sum(unit.steps for unit in units))

    def next_task() -> tuple[str, Mapping[str, Any]] | None:
        unit = next(waiting, None)
        if unit is None:
            return None
        key = unit.directory.name
        running[key] = unit
        unit.directory.mkdir(parents=True, exist_ok=True)
        task = {"task": "rank", "settings": dict(unit.settings), "clients": dict(unit.clients)}
        task |= {"measure": asdict(unit.measure), "directory": str(unit.directory)}
        return key, {**task, "log": str(directory / "logs" / f"{key}.log")}

    def done(key: str, answer: Mapping[str, Any]) -> None:
        unit = running.pop(key)
        if not answer["ok"]:
            failed.append(f"{unit.name}: {answer['reason']}")
        told = "measured" if answer["ok"] else f"failed: {answer['reason']}"
        console.print(f"{unit.name}: {told}", markup=False, highlight=False, soft_wrap=True)
        show()

    def show() -> None:
        bar.update(shown, completed=sum(min(UnitFiles(unit.directory).progress(), unit.steps) for unit in units))

    with (
        bar,
        font_cache() as fonts,
        Pool(
            min(jobs, len(units)),
            worker_environment(fonts, lock),
            directory / "logs" / "workers.log",
            () if lock is None else (lock,),
        ) as pool,
        signals(pool),
    ):
        try:
            pool.carry_out(next_task, done, show)
        except Interrupted:
            raise KeyboardInterrupt(f"what is measured is in {directory}; the same command goes on") from None
    return tuple(failed)


def _leave(
    title: str,
    seeds: Sequence[int],
    rows: list[dict[str, Any]],
    directory: Path,
    failures: tuple[str, ...],
    console: Console,
) -> Analysis:
    atomic.write_text(directory / "table.md", summary.markdown(title, seeds, rows, failures))
    atomic.write_text(directory / "table.csv", summary.as_csv(rows))
    (directory / "charts").mkdir(exist_ok=True)
    for name, picture in pictures.files(rows).items():
        atomic.write_bytes(directory / "charts" / name, picture)
    console.print(str(directory / "table.md"), markup=False, highlight=False, soft_wrap=True)
    return Analysis(directory, tuple(rows), failures)


def _pilot(spec: RankSpec) -> tuple[RankSpec, str]:
    """A full-rank training of the clients' data and network, of which the weights of every round are kept.

    Its settings are those of the first ``fedavg`` training of several clients, which has the learning rate that suits
    full rank; else the common ones. Also returned: whose they are, for people.
    """
    seed = spec.seeds[0]
    own, whose = {key: value for key, value in spec.clients(seed).items() if key in spec.settings}, "the common ones"
    for training in spec.trainings:
        resolved = spec.resolved(training, seed)
        if resolved["algorithm"] == "fedavg" and int(resolved["num-clients"]) > 1:
            own, whose = {**spec.settings, **training.settings}, f"those of {training.label!r}"
            break
    count = min(PILOT_ROUNDS, RunConfig.from_mapping({**own, "algorithm": "fedavg"}).num_server_rounds)
    own |= {"algorithm": "fedavg", "num-server-rounds": count, "fraction-evaluate": 0.0, "evaluate-in-training": False}
    measure = Measure(tuple(range(count + 1)), (), clients=0, threads=spec.measure.threads)
    return RankSpec(spec.name, spec.title, spec.seeds[:1], measure, own, (Training("pilot", "pilot", {}),)), whose


def _factorised(spec: RankSpec) -> tuple[RunConfig, str]:
    """What the advice is for, and whose settings these are: the first training of factors, else the common ones.

    A central training, or one of full rank, says nothing of ``C`` and of the factors' scale.
    """
    for training in spec.trainings:
        config = RunConfig.from_mapping(spec.resolved(training, spec.seeds[0]))
        if ALGORITHMS[config.algorithm].factorised:
            return config, f"those of {training.label!r}"
    common = {key: value for key, value in spec.settings.items() if key in ("fraction-train", "alpha", "rank")}
    return RunConfig.from_mapping(common), "the common ones"


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let torch have so many threads of this process for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _advised(
    spec: RankSpec, unit: _Unit, whose: str, directory: Path, failures: tuple[str, ...], console: Console
) -> Analysis:
    if failures:
        return Analysis(directory, (), failures)
    pilot = RunConfig.from_mapping(unit.settings)
    files, rounds = UnitFiles(unit.directory), unit.measure.rounds
    with _threads(unit.measure.threads), console.status("looking at the pilot") as shown:
        evidence = pilot_evidence(
            pilot, files, rounds, _PILOT_CLIENTS, lambda told: shown.update(f"looking at the pilot: {escape(told)}")
        )
    asked, askers = _factorised(spec)
    proposal = advising.advise(evidence, asked.fraction_train)
    scale = asked.alpha / asked.rank
    origin = (
        f"From a pilot of {pilot.num_server_rounds} rounds of full-rank FedAvg, learning rate "
        f"{pilot.learning_rate:g}, seed {unit.seed} (settings: {whose}); for C = {asked.fraction_train:g} of the "
        f"clients in a round and alpha / rank = {scale:g} (settings: {askers}). A heuristic, not a theorem: compare "
        "it with the defaults before relying on it."
    )
    text = advising.as_markdown(proposal, scale, origin)
    atomic.write_text(directory / "advice.md", text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    console.print(str(directory / "advice.md"), markup=False, highlight=False, soft_wrap=True)
    return Analysis(directory, (), (), proposal)
