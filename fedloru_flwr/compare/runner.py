"""Carry out the runs of a comparison: what is there is kept, what was interrupted goes on, what is missing is run."""

import dataclasses
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from fedloru_flwr.compare.measures import last
from fedloru_flwr.compare.places import Places
from fedloru_flwr.compare.plan import Plan, Planner, Wanted
from fedloru_flwr.compare.pool import Interrupted, Pool, worker_environment
from fedloru_flwr.compare.progress import CompareProgress, TimeLeft
from fedloru_flwr.compare.records import Record, fingerprint
from fedloru_flwr.compare.spec import Spec
from fedloru_flwr.config import ConfigError, name_to_key
from fedloru_flwr.launch import Engine
from fedloru_flwr.runs.units import format_duration

MOST_CLIENTS = 1000  # that a map of partitions shows


class Runner:
    """Carries out one comparison.

    Args:
        spec: what is compared.
        source: what errors call the CONF.
        places: its files.
        engine: of the runs.
        jobs: runs at a time; None: a core each, and one at a time on Flower, which spreads a run over the cores itself.
        lock: the open file that workers keep open.
        console: for people.
    """

    def __init__(
        self,
        spec: Spec,
        source: str,
        places: Places,
        engine: Engine,
        jobs: int | None,
        lock: int | None,
        console: Console,
    ) -> None:
        cores = os.cpu_count() or 1
        self._planner = Planner(spec)
        self._spec = spec
        self._source = source
        self._places = places
        self._engine = engine
        self._jobs = jobs or (cores if engine == "in-process" else 1)
        self._actors = max(cores // self._jobs, 1) if engine == "flower" else None
        self._lock = lock
        self._progress = CompareProgress(console)
        self._time_left = TimeLeft()
        self._running: dict[str, Wanted] = {}
        self._ran = 0
        self.results: dict[str, Record] = {}
        self.plan = Plan()

    def run(self, known_partitions: Mapping[str, list[list[int]]]) -> list[dict[str, Any]]:
        """Carry out all runs, and return the partitions: counts, and which rows they are of.

        Args:
            known_partitions: counts that are known already, by the fingerprint of their settings.

        Raises:
            ConfigError: some settings could not run; nothing was started.
            Interrupted: by a signal; ``results`` has what is finished.
        """
        self._find_finished()
        self._places.logs.mkdir(parents=True, exist_ok=True)
        with (
            self._progress,
            font_cache() as fonts,
            Pool(
                self._jobs,
                worker_environment(fonts, self._lock),
                self._places.logs / "workers.log",
                () if self._lock is None else (self._lock,),
            ) as pool,
            signals(pool),
        ):
            self._check(pool)
            self._run_all(pool)
            self._measure_ranks(pool)
            return self._partitions(pool, known_partitions)

    def _find_finished(self) -> None:
        """Take what is there, until that makes no more runs known."""
        while True:
            self.plan = self._planner.plan(self.results)
            found = {
                key: Record.of_directory(self._places.place(run).path)
                for key, run in self.plan.runs.items()
                if key not in self.results and self._places.finished(run)
            }
            if not found:
                return
            self.results |= found
            for key, record in found.items():
                self._time_left.learn(self.plan.runs[key], record.seconds)

    def _check(self, pool: Pool) -> None:
        """Refuse what could not run: one check for each configuration of which runs are missing, whatever the seed."""
        left: dict[str, Wanted] = {}
        for key, run in self.plan.runs.items():
            if key not in self.results and not (self._places.place(run).path / "manifest.json").exists():
                left.setdefault(fingerprint({**run.settings, "seed": 0}), run)
        waiting = iter(left.items())
        refused: list[str] = []

        def next_task() -> tuple[str, Mapping[str, Any]] | None:
            found = next(waiting, None) if not refused else None
            if found is None:
                return None
            key, run = found
            return f"check {key}", {"task": "check", "settings": self._places.settings(run)}

        def done(key: str, answer: Mapping[str, Any]) -> None:
            if not answer["ok"]:
                run = left[key.removeprefix("check ")]
                refused.append(f"{self._source}: [methods.{run.method}] {run.name}: {answer['reason']}")

        pool.carry_out(next_task, done)
        if refused:
            raise ConfigError(refused[0])

    def _run_all(self, pool: Pool) -> None:
        started: set[str] = set()

        def next_task() -> tuple[str, Mapping[str, Any]] | None:
            for key, run in self.plan.runs.items():
                if key not in self.results and key not in started:
                    started.add(key)
                    self._running[key] = run
                    log = self._places.make_ready(run)
                    task = {"task": "run", "settings": self._places.settings(run), "engine": self._engine}
                    return key, {**task, "num_actors": self._actors, "log": str(log)}
            return None

        def done(key: str, answer: Mapping[str, Any]) -> None:
            run = self._running.pop(key)
            self._end(key, run, answer)
            self._show(pool)
            self._say(run, self.results[key], pool)

        self._show(pool)
        pool.carry_out(next_task, done, lambda: self._show(pool))

    def _end(self, key: str, run: Wanted, answer: Mapping[str, Any]) -> None:
        place = self._places.place(run)
        if answer["ok"]:
            self.results[key] = Record.of_directory(place.path)
            self._time_left.learn(run, self.results[key].seconds)
        else:
            self.results[key] = Record.failed(run.settings, answer["reason"])
        self._ran += 1
        self.plan = self._planner.plan(self.results)

    def _show(self, pool: Pool) -> None:
        behind = {key: (run, self._places.rounds_done(run)) for key, run in self._running.items()}
        done, total = self._counts()
        self._progress.show(done, total, self._left(pool), behind)

    def _counts(self) -> tuple[int, int]:
        done = sum(key in self.results for key in self.plan.runs)
        return done, len(self.plan.runs) + self.plan.undecided

    def _left(self, pool: Pool) -> float | None:
        left = [
            (run, self._places.rounds_done(run) if key in self._running else 0)
            for key, run in self.plan.runs.items()
            if key not in self.results
        ]
        return self._time_left.estimate(left, self.plan.undecided, pool.size)

    def _say(self, run: Wanted, record: Record, pool: Pool) -> None:
        done, total = self._counts()
        left = self._left(pool)
        accuracy = last(record, "accuracy")
        if accuracy is None:
            accuracy = last(record, "personal")
        if record.finished:
            told = f"accuracy {accuracy:.3f}" if accuracy is not None else "finished"
            told += f" in {format_duration(record.seconds)}"
        else:
            told = f"failed: {record.reason}"
        ending = f"  ({format_duration(left)} left)" if left and done < total else ""
        self._progress.say(f"{done:>{len(str(total))}}/{total}  {run.name}: {told}{ending}")

    def _measure_ranks(self, pool: Pool) -> None:
        """Have the rank of what was learned written down, of the runs that are judged; some have none."""
        finals = {run.key for runs in self.plan.finals.values() for run in runs.values()}
        left = [key for key in finals if key in self.results and self._lacks_ranks(self.results[key])]
        waiting = iter(sorted(left))

        def next_task() -> tuple[str, Mapping[str, Any]] | None:
            key = next(waiting, None)
            if key is None:
                return None
            log = str(self._places.logs / "ranks.log")
            return f"learned {key}", {"task": "learned", "directory": self.results[key].path, "log": log}

        def done(key: str, answer: Mapping[str, Any]) -> None:
            if answer["ok"]:
                key = key.removeprefix("learned ")
                self.results[key] = Record.of_directory(Path(self.results[key].path))

        pool.carry_out(next_task, done)

    @staticmethod
    def _lacks_ranks(record: Record) -> bool:
        return record.finished and not (Path(record.path) / "rank.csv").exists()

    def _partitions(self, pool: Pool, known: Mapping[str, list[list[int]]]) -> list[dict[str, Any]]:
        """Count classes by client, once for each way in which the first seed's runs deal out the data."""
        from fedloru_flwr.data import DataConfig

        seed = self._spec.seeds[0]
        decisive = {name_to_key(field.name) for field in dataclasses.fields(DataConfig)}
        found: dict[str, dict[str, Any]] = {}
        settings: dict[str, Mapping[str, Any]] = {}
        for (method, number), runs in self.plan.finals.items():
            data = {key: value for key, value in runs[seed].settings.items() if key in decisive}
            key = fingerprint(data)
            settings[key] = runs[seed].settings
            entry = found.setdefault(key, {"settings": data, "rows": [], "counts": known.get(key)})
            entry["rows"].append([method, number])
        waiting = iter([(key, settings[key]) for key, entry in found.items() if entry["counts"] is None])

        def next_task() -> tuple[str, Mapping[str, Any]] | None:
            item = next(waiting, None)
            if item is None:
                return None
            return f"partition {item[0]}", {"task": "partition", "settings": item[1], "most": MOST_CLIENTS}

        def done(key: str, answer: Mapping[str, Any]) -> None:
            if answer["ok"]:
                found[key.removeprefix("partition ")]["counts"] = answer["counts"]

        pool.carry_out(next_task, done)
        return [entry for entry in found.values() if entry["counts"]]


@contextmanager
def font_cache() -> Iterator[str]:
    """A directory for matplotlib's font cache that workers share."""
    if chosen := os.environ.get("MPLCONFIGDIR"):
        yield chosen
        return
    cache = tempfile.mkdtemp(prefix="fedloru-matplotlib-")
    try:
        yield cache
    finally:
        shutil.rmtree(cache, ignore_errors=True)


@contextmanager
def signals(pool: Pool) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the comparison in order; a second one ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(*_: object) -> None:
        for number in before:
            signal.signal(number, signal.default_int_handler)
        pool.interrupt()

    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Interrupted", "Runner"]
