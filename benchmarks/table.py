"""Figures of one benchmark run, as dataclasses, and the table they make."""

import dataclasses
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.measuring import ROOT, Measured


@dataclass(frozen=True)
class Figure:
    """The seconds (or mebibytes) of one rival.

    Attributes:
        part: of the benchmark.
        rival: its title.
        unit: ``s`` a round, ``ms`` a client, ``MiB``.
        values: one a repetition.
        threads: in each process.
        processes: that train.
        form: how it computes.
        note: why there are no values.
    """

    part: str
    rival: str
    unit: str
    values: list[float]
    threads: int = 1
    processes: int = 1
    form: str = ""
    note: str = ""


@dataclass(frozen=True)
class Ratio:
    """One row of the table: a figure over another, repetition by repetition.

    Attributes:
        part: of the benchmark.
        of: what is divided.
        over: by what.
        goal: what it should be, such as ``>= 10``.
        values: one a repetition; empty where either was not measured.
        setting: threads and processes of both.
        note: why there are no values.
    """

    part: str
    of: str
    over: str
    goal: str
    values: list[float]
    setting: str = ""
    note: str = ""

    @property
    def median(self) -> float | None:
        """Over the repetitions."""
        return statistics.median(self.values) if self.values else None

    @property
    def met(self) -> bool | None:
        """Whether the median is what it should be; None without a goal or a value."""
        if not self.goal or self.median is None:
            return None
        sign, _, bound = self.goal.partition(" ")
        return self.median >= float(bound) if sign == ">=" else self.median <= float(bound)


def figure(part: str, measured: Measured, of: str = "", unit: str = "s", scale: float = 1.0) -> Figure:
    """A rival's figures; ``of`` names an extra one."""
    rival = measured.rival
    return Figure(
        part=part,
        rival=rival.title,
        unit=unit,
        values=[value * scale for value in measured.figures(of)],
        threads=rival.threads,
        processes=rival.processes,
        form=measured.reports[0].form if measured.reports else "",
        note=measured.unavailable.partition("\n")[0],
    )


def ratio(of: Figure, over: Figure, goal: str = "") -> Ratio:
    """``of / over``, repetition by repetition."""
    count = min(len(of.values), len(over.values))
    missing = [one.note or "not measured" for one in (of, over) if not one.values]
    return Ratio(
        part=of.part,
        of=of.rival,
        over=over.rival,
        goal=goal,
        values=[of.values[i] / over.values[i] for i in range(count)],
        setting=f"{_setting(of)} / {_setting(over)}",
        note="; ".join(missing),
    )


def _setting(one: Figure) -> str:
    return f"{one.processes} x {one.threads}"


@dataclass(frozen=True)
class Results:
    """All of one run of the benchmark."""

    command: str
    ratios: list[Ratio]
    figures: list[Figure]
    machine: dict[str, str] = field(default_factory=dict)

    def markdown(self) -> str:
        """The table of ratios, then the figures behind it."""
        lines = [
            "# Benchmark",
            "",
            f"`{self.command}` on {self.machine['processor']}, {self.machine['cores']} cores, torch "
            f"{self.machine['torch']}, commit {self.machine['commit']}.",
            "",
            "Each ratio is formed within a repetition, in which all rivals ran one after the other; given are the "
            "median and the range over the repetitions. *Set-up* is processes x threads in each.",
            "",
            "| Workload | Ratio | Median | Range | Set-up | Goal | Met |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in self.ratios:
            median = f"{row.median:.2f}" if row.median is not None else "-"
            spread = _spread(row.values) if row.values else row.note
            met = {True: "yes", False: "no", None: ""}[row.met]
            lines.append(
                f"| {row.part} | {row.of} / {row.over} | {median} | {spread} | {row.setting} | {row.goal} | {met} |"
            )
        lines += ["", "| Workload | Rival | Median | Range | Set-up | Form |", "|---|---|---|---|---|---|"]
        for one in self.figures:
            median = f"{statistics.median(one.values):.3g} {one.unit}" if one.values else "-"
            spread = _spread(one.values) if one.values else one.note
            lines.append(f"| {one.part} | {one.rival} | {median} | {spread} | {_setting(one)} | {one.form} |")
        return "\n".join(lines) + "\n"

    def write(self, directory: Path) -> Path:
        """Write ``bench.md`` and ``bench.json``; return the former."""
        content = dataclasses.asdict(self)
        content["ratios"] = [{**dataclasses.asdict(row), "median": row.median, "met": row.met} for row in self.ratios]
        (directory / "bench.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        path = directory / "bench.md"
        path.write_text(self.markdown(), encoding="utf-8")
        return path


def _spread(values: Sequence[float]) -> str:
    return f"{min(values):.3g} to {max(values):.3g}"


def machine() -> dict[str, str]:
    """What the figures depend on besides the code."""
    import os

    import torch

    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(": ")[2] for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    return {
        "processor": processor,
        "cores": str(cores),
        "torch": torch.__version__,
        "commit": commit or "unknown",
        "load_before": load,
        "python": platform.python_version(),
    }
