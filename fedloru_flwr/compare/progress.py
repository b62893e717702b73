"""How far a comparison is: one bar over all runs on a terminal, one line a finished run elsewhere."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from fedloru_flwr.compare.plan import Wanted
from fedloru_flwr.runs.units import format_duration


class TimeLeft:
    """Reckons the time that runs take from those that have finished.

    A run is taken to need, a round, what finished runs of the same method at the same place on the axes needed; failing
    those, of the same method; failing those, of any.
    """

    def __init__(self) -> None:
        self._seconds: dict[tuple[object, ...], list[float]] = {}

    def learn(self, run: Wanted, seconds: float) -> None:
        """Take a finished run into account."""
        rate = seconds / rounds(run)
        for key in self._keys(run):
            self._seconds.setdefault(key, []).append(rate)

    def estimate(self, left: Iterable[tuple[Wanted, int]], more: int, workers: int) -> float | None:
        """Seconds until the end; None while no run has finished.

        Args:
            left: runs that are not finished, and the rounds they have behind them.
            more: runs that are not known yet, each like the mean of those known.
            workers: runs at a time.
        """
        if not self._seconds:
            return None
        needs = []
        for run, done in left:
            rate = next(self._seconds[key] for key in self._keys(run) if key in self._seconds)
            needs.append(statistics.fmean(rate) * max(rounds(run) - done, 0))
        mean = statistics.fmean(needs) if needs else 0.0
        # No end is nearer than that of the longest run that is left.
        return max([(sum(needs) + more * mean) / workers, *needs])

    def _keys(self, run: Wanted) -> Sequence[tuple[object, ...]]:
        return (run.method, *run.at.items()), (run.method,), ()


class CompareProgress:
    """Shows runs done, what is running, and the time left.

    Args:
        console: where to.
        clock: seconds, from any origin.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )
        self._all = self._bar.add_task("runs", total=None, note="")
        self._running: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def show(self, done: int, total: int, left: float | None, running: Mapping[str, tuple[Wanted, int]]) -> None:
        """Bring the display up to date.

        Args:
            done: runs that have ended.
            total: runs in all, as far as they are known.
            left: seconds, if they can be told.
            running: runs that are going on by key, and the rounds they have behind them.
        """
        note = "" if left is None else f"{format_duration(left)} left"
        self._bar.update(self._all, completed=done, total=total, note=note)
        for key in set(self._running) - set(running):
            self._bar.remove_task(self._running.pop(key))
        for key, (run, behind) in running.items():
            if key not in self._running:
                self._running[key] = self._bar.add_task(run.name, total=rounds(run), note="rounds")
            self._bar.update(self._running[key], completed=behind)


def rounds(run: Wanted) -> int:
    """The number of rounds of a run."""
    return int(run.settings["num-server-rounds"])
