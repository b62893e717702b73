"""The books of a run: what the server remembers of its clients, what it tells, and what it leaves on disk."""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import INFO
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

from flwr.app import MetricRecord
from flwr.common.logger import log
from flwr.serverapp.strategy import Result
from torch import Tensor

from fedloru_flwr.lowrank import Ledger, digest_tensors
from fedloru_flwr.runs import Checkpoint, RunDirectory, Tracker, Tracking, round_line, versions
from fedloru_flwr.strategies.state import ServerState, state_to_checkpoint

_RESULTS = ("train_metrics_clientapp", "evaluate_metrics_clientapp", "evaluate_metrics_serverapp")
_INNER = "inner/"


class ResumeError(ValueError):
    """A run cannot be continued with these settings."""


class Observer(Protocol):
    """Told of a run's progress, for people."""

    def start_round(self, server_round: int, num_clients: int) -> None:
        """A round's messages go out to ``num_clients`` clients."""

    def end_round(self, row: Mapping[str, Any]) -> None:
        """A round has ended; ``row`` is what ``metrics.jsonl`` gets."""


@dataclass
class Memory:
    """What the server remembers of its clients, by their names.

    Attributes:
        token: by which clients know this run's state of their own from another run's.
        held: the lineage that each holds, as far as is known.
        enrolled: whose enrolment is on the bill.
        counted: the last round in which each one's reply counted.
        examples: SCAFFOLD's ``n_k``.
        evaluation_off: they have no evaluate function.
        norms: the medians of the last rounds' updates' norms.
        nodes: the node on which each was last, by its name, as far as it has said so itself.
        budgets: the largest rank each can train, where it has said so.
        followed: the chain that each holds of the Trainables, see `fedloru_flwr.coding.Chain`.
    """

    token: str = field(default_factory=lambda: secrets.token_hex(8))
    held: dict[str, str] = field(default_factory=dict)
    enrolled: set[str] = field(default_factory=set)
    counted: dict[str, int] = field(default_factory=dict)
    examples: dict[str, float] = field(default_factory=dict)
    evaluation_off: bool = False
    norms: list[float] = field(default_factory=list)
    nodes: dict[str, int] = field(default_factory=dict)
    budgets: dict[str, int] = field(default_factory=dict)
    followed: dict[str, str] = field(default_factory=dict)

    def copy(self) -> Self:
        """A copy that later rounds do not change."""
        return replace(
            self,
            held=dict(self.held),
            enrolled=set(self.enrolled),
            counted=dict(self.counted),
            examples=dict(self.examples),
            norms=list(self.norms),
            nodes=dict(self.nodes),
            budgets=dict(self.budgets),
            followed=dict(self.followed),
        )

    def as_saved(self) -> dict[str, Any]:
        """What JSON can hold."""
        return {**vars(self), "enrolled": sorted(self.enrolled)}

    @classmethod
    def from_saved(cls, saved: Mapping[str, Any]) -> Self:
        """What `as_saved` gave."""
        return cls(**{**saved, "enrolled": set(saved["enrolled"])})


class Snapshot(NamedTuple):
    """Everything that the next round depends on, after a whole round.

    Attributes:
        state: the server's.
        memory: of its clients.
        moments: the inner strategy's, by name.
    """

    state: ServerState
    memory: Memory
    moments: Mapping[str, Tensor]


class Found(NamedTuple):
    """What a run is continued from.

    Attributes:
        checkpoint: as it was on disk; see `state_to_checkpoint`.
        memory: of the clients.
        moments: the inner strategy's, by name.
    """

    checkpoint: Checkpoint
    memory: Memory
    moments: Mapping[str, Tensor]


class Books:
    """The books of one run.

    Args:
        run_dir: where they are kept; None: only in memory.
        resume: None; ``"auto"`` to continue the run in ``run_dir`` if there is one; or such a directory.
        observer: told of every round; None: the log is.
        trackers: told of what is written down of the run; they need a directory.

    Raises:
        ValueError: there are trackers and no directory, or two of one name.

    Attributes:
        observer: as given.
        result: Flower's, filled as rounds end.
        total_bytes: on the bills of all rounds so far, up and down, those of a continued run included.
    """

    def __init__(
        self,
        run_dir: str | Path | None,
        resume: str | Path | None,
        observer: Observer | None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        if trackers and not (run_dir or resume):
            raise ValueError("trackers need a run_dir: they are told of the rows that are written there")
        self._run_dir = Path(run_dir) if run_dir else None
        self._resume = resume or None
        self.observer = observer
        self._tracking = Tracking(trackers)
        self._run: RunDirectory | None = None
        self._counted_before: list[dict[str, int]] = []
        self._previous: dict[str, Any] | None = None
        self._first_round = 0
        self._saved_round = -1
        self.result = Result()
        self.total_bytes = 0

    def open(self, settings: Mapping[str, Any], root: str, stateful: str | None) -> Found | None:
        """Open the run's directory and return where to continue, or None for a new run; nothing is changed yet.

        Args:
            settings: what a continued run must share.
            root: the digest of ``W_0``.
            stateful: the inner strategy that keeps what no checkpoint holds, if there is one.

        Raises:
            ResumeError: the directory holds no run, or one that cannot be continued so.
        """
        path = self._path()
        if path is None:
            return None
        self._run = RunDirectory(path)
        found = self._run.latest_checkpoint()
        if found is None:
            return None
        saved = found.state
        if stateful:
            raise ResumeError(
                f"resume: the inner strategy {stateful} carries state from round to round, which checkpoints do not "
                "hold; start a new run"
            )
        changed = [name for name in settings if saved["settings"].get(name) != settings[name]]
        if changed:
            told = "; ".join(f"{name} was {saved['settings'].get(name)!r}, is {settings[name]!r}" for name in changed)
            raise ResumeError(f"resume: settings that change the result differ from the run's: {told}")
        if saved["root"] != root:
            raise ResumeError("resume: the model's initial weights are not those the run was started with")
        moments = {name.removeprefix(_INNER): one for name, one in found.tensors.items() if name.startswith(_INNER)}
        return Found(found, Memory.from_saved(saved["memory"]), moments)

    def _path(self) -> Path | None:
        if self._resume == "auto" and self._run_dir is None:
            raise ResumeError("resume = 'auto' needs a run_dir to look into")
        named = self._resume is not None and self._resume != "auto"
        path = Path(str(self._resume)) if named else self._run_dir
        if path is None:
            return None
        if not (path / "checkpoints").exists():
            if named:
                raise ResumeError(f"resume: {path} holds no run to continue")
            (path / "checkpoints").mkdir(parents=True)
        if self._resume is None and RunDirectory(path).read_rounds():
            raise ResumeError(
                f"run_dir {path} holds a run already: choose another directory, or continue it with resume='auto'"
            )
        return path

    def begin(self, settings: Mapping[str, Any], seed: int, root: str, found: Found | None) -> None:
        """Write down what the run is; one that is continued goes back to the checkpoint ``found``."""
        if self._run is None:
            return
        self._run.remove_summary()  # it tells of an earlier end
        # Without a checkpoint: killed before its first one.
        self._run.truncate_rounds(-1 if found is None else found.checkpoint.server_round)
        if found is not None:
            server_round, saved = found.checkpoint.server_round, found.checkpoint.state
            self._counted_before = [dict(counted) for counted in saved["counted_before"]]
            for name in _RESULTS:
                there = {int(key): MetricRecord(value) for key, value in saved[name].items()}
                getattr(self.result, name).update(there)
            self._first_round = self._saved_round = server_round
            rows = self._run.read_rounds()
            self.total_bytes = sum(row["bytes_up"] + row["bytes_down"] for row in rows)
            self._previous = next((row for row in rows if row["round"] == server_round), None)
            log(INFO, "continuing after round %d", server_round)
        self._run.update_manifest(
            {"strategy": settings, "seed": seed, "versions": versions(), "digests": {"root": root}}
        )
        self._tracking.begin(self._run, self._run.read_manifest().get("config") or settings)

    @property
    def accuracy(self) -> float | None:
        """Of the last round; None where it was not evaluated."""
        return (self._previous or {}).get("accuracy")

    def start_round(self, server_round: int, num_clients: int) -> None:
        """Tell that a round's messages go out."""
        if self.observer is not None:
            self.observer.start_round(server_round, num_clients)

    def end_round(self, row: dict[str, Any], num_rounds: int, started: float) -> None:
        """Write a row of ``metrics.jsonl`` and tell everybody.

        Args:
            row: what came of the round.
            num_rounds: of the whole run.
            started: when the run was, by the monotonic clock.
        """
        self.total_bytes += row["bytes_up"] + row["bytes_down"]
        if self._run is not None:
            self._run.append_round(row)
            self._tracking.round(row)
        if self.observer is not None:
            self.observer.end_round(row)
        else:
            elapsed = time.monotonic() - started
            line = round_line(row, num_rounds, elapsed, previous=self._previous, first_round=self._first_round)
            log(INFO, "%s", line)
        self._previous = row

    def keep_from(self, client: str, counted: int) -> int:
        """The oldest round whose state a client has to keep: no checkpoint refers to an older one.

        Args:
            client: its name.
            counted: the last round in which its reply counted.
        """
        if self._run is None:
            return counted
        # What the checkpoint before the last one refers to is kept: the last one may turn out damaged.
        return self._counted_before[0].get(client, 0) if len(self._counted_before) > 1 else 0

    def keep_entries(self, ledger: Ledger) -> None:
        """Write the ledger's entries before any message carries a new one."""
        if self._run is not None:
            self._run.write_parts({entry.digest: entry.tensors() for entry in ledger.entries})

    def checkpoint(self, now: Snapshot, settings: Mapping[str, Any], *, is_due: bool = True) -> None:
        """Write what the run needs to go on.

        Args:
            now: everything after a whole round.
            settings: what a continued run must share.
            is_due: a run that nothing interrupts writes one here too. What clients are told to keep follows from those
                alone, so that a continued run tells them the same.
        """
        if self._run is None:
            return
        done = now.state.server_round
        tensors, saved, entries = state_to_checkpoint(now.state)
        earlier = self._counted_before[:-1] if self._saved_round == done else self._counted_before
        before = [*earlier, dict(now.memory.counted)][-2:] if is_due else self._counted_before
        results = {
            name: {str(key): dict(value) for key, value in getattr(self.result, name).items() if key <= done}
            for name in _RESULTS
        }
        self._run.write_checkpoint(
            done,
            tensors | {f"{_INNER}{name}": tensor for name, tensor in now.moments.items()},
            {"settings": settings, **saved, "memory": now.memory.as_saved(), "counted_before": before, **results},
            entries,
        )
        self._counted_before = before
        if is_due:
            self._saved_round = done

    def close(
        self, state: ServerState, model: Mapping[str, Tensor], full_bytes: tuple[int, int], facts: Mapping[str, Any]
    ) -> None:
        """Write the model, the picture and the summary.

        Args:
            state: the server's.
            model: the merged model's state dict.
            full_bytes: what plain FedAvg sends down to a client and up from it in a round.
            facts: what the summary says beside what the rows tell.
        """
        if self._run is None:
            return
        rows = self._run.read_rounds()
        accuracies = [row["accuracy"] for row in rows if row["accuracy"] is not None]
        down, up = full_bytes
        asked = sum(row["clients_ok"] + row["clients_failed"] + row.get("clients_evaluated", 0) for row in rows)
        self._run.write_model(model)
        digests = {"root": state.ledger.root, "lineage": state.ledger.lineage, "model": digest_tensors(model)}
        self._run.update_manifest({"digests": digests})
        summary = {
            **facts,
            "rounds": state.server_round,
            "final_accuracy": rows[-1]["accuracy"] if rows else None,
            "best_accuracy": max(accuracies, default=None),
            "clients": next((row["clients"] for row in reversed(rows) if row.get("clients")), {}),
            "total_bytes_up": sum(row["bytes_up"] for row in rows),
            "total_bytes_down": sum(row["bytes_down"] for row in rows),
            "full_model_bytes": down,
            "fedavg_bytes": asked * down + sum(row["clients_ok"] for row in rows) * up,
            "seconds": round(sum(row["seconds"] for row in rows), 3),
        }
        self._run.write_summary(summary)
        self._run.draw_curves()
        self._tracking.finish(summary)
