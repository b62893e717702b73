"""What a run says on the terminal: a line for each round, a bar where it can move, a table at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from fedloru_flwr.runs.units import format_bytes, format_duration, format_ratio

Row = Mapping[str, Any]


def round_line(row: Row, num_rounds: int, elapsed: float, *, previous: Row | None = None, first_round: int = 0) -> str:
    """Return a round as one line of plain text in fixed columns, fit for a log.

    ::

        round 12/60  accuracy 0.912  loss  0.301  up  660 kB  down  710 kB    50 clients  ETA 2:44

    followed by ``accumulated: ledger 3, rank 12`` if the ledger grew and by ``2 failed`` if clients did.

    Args:
        row: of ``metrics.jsonl``.
        num_rounds: of the whole run.
        elapsed: seconds since training began in this process.
        previous: the row before, to see whether the ledger grew; without it, any ledger counts as grown.
        first_round: the round after which this process began: 0, or the checkpoint's.
    """
    server_round = row["round"]
    parts = [
        f"round {server_round:>{len(str(num_rounds))}}/{num_rounds}",
        f"accuracy {_metric(row['accuracy']):>5}",
        f"loss {_metric(row['loss']):>6}",
    ]
    if server_round == 0:
        return "  ".join([*parts, "before training"])
    done = max(server_round - first_round, 1)
    left = elapsed / done * max(num_rounds - server_round, 0)
    parts += [
        f"up {format_bytes(row['bytes_up']):>7}",
        f"down {format_bytes(row['bytes_down']):>7}",
        f"{row['clients_ok']:>4} client{' ' if row['clients_ok'] == 1 else 's'}",
        f"ETA {format_duration(left)}",
    ]
    if row["ledger_version"] > (previous or {}).get("ledger_version", 0):
        parts.append(f"accumulated: ledger {row['ledger_version']}, rank {row['accumulated_rank']}")
    if row["clients_failed"]:
        parts.append(f"{row['clients_failed']} failed")
    return "  ".join(parts)


def closing_table(summary: Mapping[str, Any]) -> Table:
    """Return the run's numbers beside those of full-rank FedAvg over the same rounds and clients.

    FedAvg sends the model up as often as down, so each way has half of ``fedavg_bytes``.

    Args:
        summary: of ``summary.json``.
    """
    table = Table(
        title=f"{summary['algorithm']}: {summary['rounds']} rounds, {summary['status']}",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("")
    for heading in ("this run", "full-rank FedAvg", "saving"):
        table.add_column(heading, justify="right")
    up, down, fedavg = summary["total_bytes_up"], summary["total_bytes_down"], summary["fedavg_bytes"]
    for name, ours, theirs in (
        ("sent up", up, fedavg / 2),
        ("sent down", down, fedavg / 2),
        ("sent in all", up + down, fedavg),
    ):
        table.add_row(name, format_bytes(ours), format_bytes(theirs), _saving(ours, theirs))
    trainable, parameters = summary["trainable_parameters"], summary["model_parameters"]
    table.add_row(
        "trainable parameters", f"{trainable:,}", f"{parameters:,}", _saving(trainable, parameters), end_section=True
    )
    table.add_row("final accuracy", _metric(summary["final_accuracy"]))
    table.add_row("best accuracy", _metric(summary["best_accuracy"]))
    for name, title in (("accuracy", "clients, global model"), ("personal-accuracy", "clients, personal models")):
        if over := summary.get("clients", {}).get(name):
            worst = f"worst tenth {_metric(over['worst_decile'])}"
            table.add_row(title, f"{_metric(over['mean'])} ± {_metric(over['std'])}", worst)
    table.add_row("time", format_duration(summary["seconds"]))
    return table


class RoundProgress:
    """Show a run as it goes: on a terminal round lines above a bar, elsewhere the lines alone.

    ::

        with RoundProgress(console, num_rounds=60) as progress:
            progress.start_round(1, num_clients=50)
            progress.client_done()
            progress.end_round(row)

    Args:
        console: where to.
        num_rounds: of the whole run.
        resumed_from: the row of the checkpoint that this process goes on from.
        clock: seconds, from any origin.
    """

    def __init__(
        self,
        console: Console,
        num_rounds: int,
        *,
        resumed_from: Row | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console
        self._num_rounds = num_rounds
        self._first_round = int(resumed_from["round"]) if resumed_from else 0
        self._clock = clock
        self._began = clock()
        self._previous = resumed_from
        self._warm = False
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal or console.is_dumb_terminal,
        )
        self._rounds = self._progress.add_task("rounds", total=num_rounds, completed=self._first_round, left="")
        self._clients = self._progress.add_task("clients", total=0, visible=False, left="")

    def __enter__(self) -> Self:
        self._began = self._clock()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start_round(self, server_round: int, num_clients: int) -> None:
        """Begin a round of ``num_clients`` participants."""
        self._progress.update(
            self._clients,
            description=f"clients of round {server_round}",
            total=num_clients,
            completed=0,
            visible=True,
        )

    def client_done(self) -> None:
        """Count one participant of the current round, whether it answered or failed."""
        self._progress.advance(self._clients)
        self._show_time_left()

    def end_round(self, row: Row) -> None:
        """Print the line of a finished round.

        Args:
            row: of ``metrics.jsonl``.
        """
        line = round_line(
            row,
            self._num_rounds,
            self._clock() - self._began,
            previous=self._previous,
            first_round=self._first_round,
        )
        if not self._warm and row["round"] > self._first_round:
            # The first round pays for starting workers and loading data: the time left is reckoned from its end.
            self._warm, self._began, self._first_round = True, self._clock(), int(row["round"])
        self._previous = row
        self._progress.update(self._rounds, completed=row["round"])
        self._progress.update(self._clients, completed=0, visible=False)
        self._show_time_left()
        self._console.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _show_time_left(self) -> None:
        rounds, clients = (self._progress.tasks[task] for task in (self._rounds, self._clients))
        at = rounds.completed + (clients.completed / clients.total if clients.total else 0.0)
        done = at - self._first_round
        if done > 0:
            left = (self._clock() - self._began) / done * max(self._num_rounds - at, 0.0)
            self._progress.update(self._rounds, left=f"{format_duration(left)} left")


def _metric(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.0e}"


def _saving(ours: float, theirs: float) -> str:
    return format_ratio(theirs / ours) if ours else "-"
