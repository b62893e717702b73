"""Rivals side by side: each repetition runs every rival once, one after the other, in processes of their own."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.rivals.report import Report, Task, Unavailable

ROOT = Path(__file__).parent.parent


class RivalFailedError(RuntimeError):
    """A rival's process failed, or did other work than the rest."""


@dataclass(frozen=True)
class Rival:
    """One way to do a workload.

    Attributes:
        key: short name, unique within a comparison.
        title: for people.
        module: ``python -m`` this.
        threads: torch's threads in each process.
        processes: how many train at a time.
        options: the module's own.
        python: the interpreter; by default the one at hand.
        same_work: whether clients, steps, samples and trained parameters must be those of the others.
        rounds_share: of the measured rounds, for rivals that are so slow that fewer have to do.
    """

    key: str
    title: str
    module: str
    threads: int = 1
    processes: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    same_work: bool = True
    rounds_share: float = 1.0


@dataclass
class Measured:
    """What the repetitions of one rival gave.

    Attributes:
        rival: which.
        reports: one a repetition.
        unavailable: why there are none.
    """

    rival: Rival
    reports: list[Report] = field(default_factory=list)
    unavailable: str = ""

    def figures(self, of: str = "") -> list[float]:
        """One figure a repetition: the median round, or the extra figure of that name where there is one."""
        if of:
            return [report.extra[of] for report in self.reports if of in report.extra]
        return [statistics.median(report.rounds) for report in self.reports]


@dataclass(frozen=True)
class Harness:
    """How rivals are run.

    Attributes:
        out: where logs go.
        repeats: repetitions of every rival.
        say: gets a line of progress.
        timeout: seconds a process may take.
    """

    out: Path
    repeats: int
    say: Callable[[str], None]
    timeout: float = 3600.0

    def run(self, rival: Rival, task: Task) -> Report:
        """Run one rival once.

        Raises:
            RivalFailedError: its process failed.
            Unavailable: it said that it cannot be measured here.
        """
        log = self.out / "logs" / f"{Path(task.workload).stem or 'server'}-{rival.key}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        started = {"started": time.time()}
        whole = dataclasses.replace(task, options={**rival.options, **task.options, **started})
        command = [rival.python, "-m", rival.module, json.dumps(dataclasses.asdict(whole))]
        env = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": str(ROOT)}
        try:
            done = subprocess.run(
                command,
                env=env,
                cwd=self.out,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=self.timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise RivalFailedError(
                f"{rival.title}: not done after {self.timeout:g} s; give it more time or fewer rounds"
            ) from error
        with log.open("a", encoding="utf-8") as file:
            file.write(done.stdout + done.stderr)
        report = Report.find(done.stdout)
        if done.returncode or report is None:
            lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
            reason, end = lines[-1] if lines else "it said nothing", "\n".join(lines[-15:])
            raise RivalFailedError(
                f"{rival.title} failed (status {done.returncode}; the whole log: {log}): {reason}\n{end}"
            )
        return report

    def side_by_side(self, rivals: Sequence[Rival], workload: str, rounds: int, warm_up: int) -> list[Measured]:
        """Measure rivals in turn, again and again: A B C A B C ...

        A rival that is unavailable or fails is left out from then on, with the reason.

        Raises:
            RivalFailedError: rivals did different work.
        """
        found = [Measured(rival) for rival in rivals]
        for repetition in range(self.repeats):
            for measured in found:
                rival = measured.rival
                if measured.unavailable:
                    continue
                share = max(1, round(rounds * rival.rounds_share))
                task = Task(workload, share, warm_up, rival.threads, rival.processes)
                try:
                    report = self.run(rival, task)
                except (Unavailable, RivalFailedError) as reason:
                    measured.unavailable = str(reason)
                    self.say(f"  {rival.title}: {str(reason).splitlines()[0]}")
                    continue
                measured.reports.append(report)
                middle = statistics.median(report.rounds)
                self.say(f"  {repetition + 1}/{self.repeats} {rival.title}: {middle:.3f} s")
        check_same_work(found)
        return found

    def fastest(self, rivals: Sequence[Rival], workload: str, rounds: int = 3, warm_up: int = 1) -> Rival:
        """The rival that is fastest in a short trial: its best form on this machine."""
        if len(rivals) == 1:
            return rivals[0]
        seconds: dict[str, float] = {}
        for rival in rivals:
            report = self.run(rival, Task(workload, rounds, warm_up, rival.threads, rival.processes))
            seconds[rival.key] = statistics.median(report.rounds)
        self.say("  trial: " + ", ".join(f"{key} {value:.3f} s" for key, value in seconds.items()))
        return min(rivals, key=lambda rival: seconds[rival.key])


def check_same_work(found: Sequence[Measured]) -> None:
    """Refuse figures of rivals that trained other clients, steps, samples or parameters than the first one.

    Raises:
        RivalFailedError: naming both.
    """
    told = [
        (measured.rival.title, {name: getattr(report, name) for name in ("clients", "steps", "samples", "trainable")})
        for measured in found
        if measured.rival.same_work
        for report in measured.reports[:1]
    ]
    for title, work in told[1:]:
        if work != told[0][1]:
            raise RivalFailedError(
                f"{title} did {work} a round, {told[0][0]} {told[0][1]}: every rival has to do the same work, "
                "mend the one that does not"
            )


# No telemetry, no updates, no look at the user's caches; torch says how many threads there are.
_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
