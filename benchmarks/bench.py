"""How fast a round is, side by side with other ways to train the same clients; one table of ratios.

::

    make bench
    python -m benchmarks.bench --only digits --repeats 5 --out runs/bench

Every repetition runs all rivals of a workload one after the other, each in a process of its own, and takes the median
of its rounds after warm-up. See ``docs/performance.md`` for what the figures mean.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measuring import ROOT, Harness, Measured, Rival, RivalFailedError
from benchmarks.plain_layers import FORMS
from benchmarks.rivals.report import Task
from benchmarks.table import Figure, Ratio, Results, figure, machine, ratio
from benchmarks.workloads import DIGITS, LANGUAGE, RESNET, Workload, cohort_of

TORCH = "2.13.0"
PFL = "0.6.0"
PFL_HOME = ROOT / ".venv-bench-pfl"
COHORTS = (10, 100, 1_000, 10_000)


class Bench:
    """One run of the benchmark: what is measured goes into ``figures`` and ``ratios``.

    Args:
        harness: runs the rivals.
        quick: small sizes and few rounds, to see that everything works; the figures mean little.
        pfl: the interpreter that has pfl-research, or None to leave it out.
    """

    def __init__(self, harness: Harness, quick: bool, pfl: Path | None) -> None:
        self.harness, self.quick, self.pfl = harness, quick, pfl
        self.figures: list[Figure] = []
        self.ratios: list[Ratio] = []
        self._pfl: dict[str, Rival] = {}
        self.work = harness.out / "workloads"
        self.work.mkdir(parents=True, exist_ok=True)

    def digits(self) -> None:
        """The small CNN: against every rival, and the time to the first round."""
        workload = DIGITS
        path = str(workload.prepare(self.work))
        central, bare = self.central(path), self.bare(path)
        plain = Rival("plain", "plain Flower + PEFT app", "benchmarks.rivals.plain", processes=2)
        kept = Rival(
            "plain-kept",
            "plain Flower + PEFT app, model kept",
            "benchmarks.rivals.plain",
            processes=2,
            options={"keep_model": True},
        )
        alone, two = self.ours(workload, path, "in-process"), self.ours(workload, path, "in-process, 2 processes")
        hosted, each = self.ours(workload, path, "fast-simulation"), self.ours(workload, path, "SuperNode per client")
        rivals = [alone, two, hosted, each, plain, *([] if self.quick else [kept]), *self.pfl_rivals(path)]
        found = self.compare(workload.name, [*rivals, *bare, central], path, rounds=15, warm_up=2)
        for one, goal in ((two, ">= 10"), (alone, ""), (hosted, ">= 5"), (each, ">= 1.5")):
            self.divide(found, plain, one, goal)
        for rival in [kept, *self.pfl_rivals(path), *bare]:
            if rival.key in found:
                self.divide(found, rival, two)
                self.divide(found, rival, alone)
        self.divide(found, two, central, "<= 2.5")
        self.divide(found, alone, central)
        self.first_round(found, plain, [each, hosted])

    def first_round(self, found: Mapping[str, Measured], plain: Rival, ours: list[Rival]) -> None:
        """Time to the end of round 1, from the runs that were measured anyway."""
        kinds = (
            ("first_round_from_run", "from `flwr run`", "<= 0.5"),
            ("first_round_from_command", "from the command", ""),
        )
        for name, title, goal in kinds:
            part = f"first round, {title}"
            over = figure(part, found[plain.key], name)
            self.figures.append(over)
            for rival in ours:
                self.figures.append(figure(part, found[rival.key], name))
                self.ratios.append(ratio(self.figures[-1], over, goal))

    def only_first_round(self) -> None:
        """Time to the end of round 1 by itself."""
        path = str(DIGITS.prepare(self.work))
        plain = Rival("plain", "plain Flower + PEFT app", "benchmarks.rivals.plain", processes=2)
        ours = [self.ours(DIGITS, path, kind) for kind in ("SuperNode per client", "fast-simulation")]
        found = self.compare("first round", [plain, *ours], path, rounds=1, warm_up=0, note=False)
        self.first_round(found, plain, ours)

    def resnet10(self) -> None:
        """ResNet-10: against the bare loop on as many cores, and the centralised step."""
        path = str(RESNET.prepare(self.work))
        central, bare = self.central(path), self.bare(path)
        alone, two = self.ours(RESNET, path, "in-process"), self.ours(RESNET, path, "in-process, 2 processes")
        plain = Rival("plain", "plain Flower + PEFT app", "benchmarks.rivals.plain", processes=2)
        pfl = self.pfl_rivals(path)
        found = self.compare(RESNET.name, [alone, two, *bare, central, *pfl, plain], path, rounds=5, warm_up=1)
        one_core, both = bare
        self.divide(found, one_core, alone, ">= 0.95")
        self.divide(found, both, two, ">= 0.95")
        for rival in [*pfl, plain]:
            self.divide(found, rival, two)
        self.divide(found, two, central)

    def language_model(self) -> None:
        """The language model: this package's drop-in session with a user's loop, one client at a time."""
        path = str(LANGUAGE.prepare(self.work))
        central, bare = self.central(path), self.bare(path)
        session = Rival("session", "drop-in session, in-process", "benchmarks.rivals.drop_in")
        plain = Rival("plain", "plain Flower + PEFT app", "benchmarks.rivals.plain", processes=2)
        pfl = self.pfl_rivals(path)
        found = self.compare(LANGUAGE.name, [session, *bare, central, *pfl, plain], path, rounds=10, warm_up=1)
        for rival in [plain, *pfl, bare[0]]:
            self.divide(found, rival, session)
        self.divide(found, session, central)

    def clients(self) -> None:
        """Cost of a client in a round by the number of clients a round; ours, in one process."""
        found: dict[int, Figure] = {}
        sizes = COHORTS[:2] if self.quick else COHORTS
        rivals = {}
        for size in sizes:
            workload = cohort_of(size, self.work)
            rivals[size] = Rival(
                workload.name,
                workload.title,
                "benchmarks.rivals.ours",
                options={"settings": workload.settings, "arguments": {"engine": "in-process"}},
                same_work=False,
            )
        measured = {size: Measured(rival) for size, rival in rivals.items()}
        for _ in range(self.harness.repeats):
            for size, rival in rivals.items():
                # More rounds of small cohorts, so that a figure rests on as much work.
                rounds = 1 if self.quick else max(1, min(20, 1000 // size))
                one = measured[size]
                if one.unavailable:
                    continue
                try:
                    one.reports.append(self.harness.run(rival, Task(rival.key, rounds, 1)))
                except RivalFailedError as error:
                    one.unavailable = str(error)
                    continue
                self.harness.say(f"  {rival.title}: {1000 * one.figures()[-1] / size:.2f} ms a client")
        for size in sizes:
            found[size] = figure("clients a round", measured[size], unit="ms a client", scale=1000 / size)
            self.figures.append(found[size])
        for size in sizes:
            if size != 100:
                self.ratios.append(ratio(found[size], found[100], "<= 1" if size == COHORTS[-1] else ""))

    def server(self) -> None:
        """Aggregation: seconds against `torch.add`, and memory by the number of replies."""
        shapes = [(20, 1), (10, 1)] if self.quick else [(1000, 1), (100, 1), (100, 100)]
        rivals = {
            (how, count, size): Rival(
                f"{how}-{count}-{size}",
                f"{title}, {count:,} replies of {size} MB",
                "benchmarks.aggregation",
                options={"how": how, "replies": count, "mebibytes": size},
                same_work=False,
            )
            for count, size in shapes
            for how, title in (("ours", "aggregation"), ("add", "torch.add"))
        }
        found = {one.rival.key: one for one in self.harness.side_by_side(list(rivals.values()), "", 1, 0)}
        seconds = {key: figure("server", found[rival.key]) for key, rival in rivals.items()}
        memory = {
            key: figure("server, peak memory", found[rival.key], "peak_mebibytes", "MiB")
            for key, rival in rivals.items()
        }
        self.figures += [*seconds.values(), *memory.values()]
        for count, size in shapes:
            self.ratios.append(ratio(seconds["add", count, size], seconds["ours", count, size], ">= 0.5"))
        (many, size), (few, _) = shapes[:2]
        self.ratios.append(ratio(memory["ours", many, size], memory["ours", few, size], "<= 1.2"))

    def central(self, path: str) -> Rival:
        """One centralised step over the same samples, in the fastest of its forms on this machine."""
        forms = [
            Rival(
                f"central-{form}-{threads}" + ("-last" if last else ""),
                "centralised steps",
                "benchmarks.rivals.central",
                threads=threads,
                options={"form": form, "channels_last": last},
                same_work=False,
            )
            for form in FORMS
            for threads in (1, 2)
            for last in ((False, True) if "language" not in path else (False,))
        ]
        return self.harness.fastest(forms[:1] if self.quick else forms, path)

    def bare(self, path: str) -> list[Rival]:
        """The bare loop on one core, and on two: by threads or by processes, whichever is faster."""
        module = "benchmarks.rivals.bare"
        both = [
            Rival("bare-2-processes", "bare torch loop, 2 cores", module, processes=2),
            Rival("bare-2-threads", "bare torch loop, 2 cores", module, threads=2),
        ]
        chosen = both[0] if self.quick else self.harness.fastest(both, path)
        return [Rival("bare", "bare torch loop, 1 core", module), chosen]

    def pfl_rivals(self, path: str) -> list[Rival]:
        """pfl-research, if it is there: in one process, with one thread or two, whichever is faster."""
        if self.pfl is None:
            return []
        if path not in self._pfl:
            forms = [
                Rival(f"pfl-{threads}", "pfl-research", "benchmarks.rivals.pfl", threads=threads, python=str(self.pfl))
                for threads in (1, 2)
            ]
            self._pfl[path] = forms[0] if self.quick else self.harness.fastest(forms, path)
        return [self._pfl[path]]

    def ours(self, workload: Workload, path: str, kind: str) -> Rival:
        """This package with the workload's settings, in one of the ways that `OURS` lists."""
        arguments, processes = OURS[kind]
        from benchmarks.prepared import Prepared

        prepared = Prepared.load(path)
        options: dict[str, Any] = {
            "settings": workload.settings,
            "arguments": arguments,
            "steps": prepared.steps(0),
            "samples": sum(len(prepared.client(number)[1]) for number in prepared.cohort(0)),
            "form": "as the package chooses",
        }
        key = kind.replace(", ", "-").replace(" ", "-")
        return Rival(key, f"ours, {kind}", "benchmarks.rivals.ours", processes=processes, options=options)

    def compare(
        self, part: str, rivals: list[Rival], path: str, rounds: int, warm_up: int, note: bool = True
    ) -> dict[str, Measured]:
        """Measure rivals side by side and note their figures."""
        rounds, warm_up = (2, 1) if self.quick and rounds > 1 else (rounds, warm_up)
        found = self.harness.side_by_side(rivals, path, rounds, warm_up)
        if note:
            self.figures += [figure(part, one) for one in found]
        return {one.rival.key: one for one in found}

    def divide(self, found: Mapping[str, Measured], of: Rival, over: Rival, goal: str = "") -> None:
        """Note one ratio."""
        part = next(one.part for one in reversed(self.figures) if one.rival == of.title)
        self.ratios.append(ratio(figure(part, found[of.key]), figure(part, found[over.key]), goal))


# How this package is run: arguments of `fedloru_flwr.run` (or settings), and the processes that then train.
OURS: dict[str, tuple[dict[str, Any], int]] = {
    "in-process": ({"engine": "in-process"}, 1),
    "in-process, 2 processes": ({"engine": "in-process", "num_actors": 2}, 2),
    "SuperNode per client": ({"engine": "flower", "num_actors": 2}, 2),
    "fast-simulation": ({"engine": "flower", "num_supernodes": 2, "num_actors": 2}, 2),
}

PARTS: dict[str, Callable[[Bench], None]] = {
    "digits": Bench.digits,
    "resnet10": Bench.resnet10,
    "language-model": Bench.language_model,
    "clients": Bench.clients,
    "server": Bench.server,
    "first-round": Bench.only_first_round,
}


def pfl_python(home: Path = PFL_HOME) -> Path:
    """The interpreter of pfl-research's virtual environment, made with pip where it is missing.

    Raises:
        RuntimeError: pip could not install it.
    """
    python = home / "bin" / "python"
    done = home / ".installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", f"torch=={TORCH}", f"pfl=={PFL}"]
        if subprocess.run(install, check=False).returncode:
            raise RuntimeError(
                f"pip could not install pfl-research into {home}: see above. Remove that directory and try again, or "
                "leave this rival out with --no-pfl"
            )
        done.touch()
    return python


def main(
    only: Annotated[list[str] | None, typer.Option(help="a part to run; again for several. By default all.")] = None,
    repeats: Annotated[int, typer.Option(help="repetitions of every rival", min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="directory for the table; by default a new one in runs/")] = None,
    quick: Annotated[bool, typer.Option(help="small and short, to see that it works; no figures to quote")] = False,
    pfl: Annotated[bool, typer.Option(help="measure pfl-research, in .venv-bench-pfl (made if missing)")] = True,
) -> None:
    """Measure, and write bench.md and bench.json."""
    parts = list(only or [part for part in PARTS if part != "first-round"])  # digits has it, too
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(PARTS)}", param_hint="--only")
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    directory = (out or ROOT / "runs" / f"bench-{stamp}").absolute()
    directory.mkdir(parents=True, exist_ok=True)
    about = machine()
    wanted = pfl and bool({"digits", "resnet10", "language-model"} & set(parts))
    bench = Bench(Harness(directory, 1 if quick else repeats, typer.echo), quick, pfl_python() if wanted else None)
    for part in parts:
        typer.echo(part)
        PARTS[part](bench)
        command = shlex.join(["python", "-m", "benchmarks.bench", *sys.argv[1:]])
        path = Results(command, bench.ratios, bench.figures, about).write(directory)  # what there is, part by part
    typer.echo(f"\n{path.read_text()}\n{path}")


if __name__ == "__main__":
    typer.run(main)
