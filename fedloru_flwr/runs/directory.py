"""The run directory: everything a run leaves on disk, whole at every moment.

::

    <output-dir>/latest -> <run-name>
    <output-dir>/<run-name>/
      manifest.json  metrics.jsonl  summary.json  model.safetensors  curves.png  samples.jsonl  rank.csv
      checkpoints/round-000010.safetensors  checkpoints/parts/
"""

from __future__ import annotations

import csv
import importlib.metadata
import io
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor

from fedloru_flwr import atomic
from fedloru_flwr.runs.checkpoints import Checkpoint, Checkpoints

LATEST = "latest"
LATEST_TEXT = "latest.txt"  # where symbolic links are not possible

# A row of metrics.jsonl: its keys in their order, and what is written for a key that is not given.
ROUND_DEFAULTS: dict[str, Any] = {
    "round": None,
    "accuracy": None,
    "loss": None,
    "train_loss": None,
    "bytes_up": 0,
    "bytes_down": 0,
    "bytes_by_purpose": {},
    "clients_ok": 0,
    "clients_failed": 0,
    "failures": {},
    "ledger_version": 0,
    "accumulated_rank": 0,
    "seconds": 0.0,
}
SUMMARY_KEYS = (
    "algorithm",
    "rounds",
    "final_accuracy",
    "best_accuracy",
    "clients",
    "total_bytes_up",
    "total_bytes_down",
    "full_model_bytes",
    "fedavg_bytes",
    "trainable_parameters",
    "model_parameters",
    "seconds",
    "status",
)


class OutputError(ValueError):
    """The output directory, a run's name or a run's files cannot be used; says which and why."""


class RunExistsError(ValueError):
    """A run of the given name exists already; says how to go on."""


class RunDirectory:
    """One run's files. ``create`` makes a new one, ``open`` finds an existing one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._checkpoints = Checkpoints(path / "checkpoints")

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @classmethod
    def create(cls, output_dir: str | os.PathLike[str], run_name: str = "") -> RunDirectory:
        """Make ``<output_dir>/<run_name>`` and let ``<output_dir>/latest`` point to it.

        Args:
            output_dir: made if missing; ``~`` is the home directory.
            run_name: default: the time in UTC, ``20261120-174200``, with ``-2``, ``-3``... while that is taken.

        Raises:
            RunExistsError: ``run_name`` was given and exists.
            OutputError: the name is no plain directory name, or the directory cannot be written.
        """
        output_dir = _absolute(output_dir)
        _check_name(run_name)
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            path = _make_named(output_dir, run_name) if run_name else _make_time_stamped(output_dir)
            (path / "checkpoints").mkdir()
            _point_latest(output_dir, path.name)
        except OSError as error:
            raise _unusable(output_dir, error) from error
        return cls(path)

    @classmethod
    def check(cls, output_dir: str | os.PathLike[str], run_name: str = "") -> None:
        """Raise what ``create`` would raise, and leave nothing behind."""
        output_dir = _absolute(output_dir)
        _check_name(run_name)
        if run_name and os.path.lexists(output_dir / run_name):
            raise _exists(output_dir, run_name)
        existing = output_dir
        while not os.path.lexists(existing):
            existing = existing.parent
        missing = output_dir.relative_to(existing)
        try:
            scratch = Path(tempfile.mkdtemp(prefix=".fedloru-", dir=existing))
            try:
                (scratch / missing / (run_name or "run")).mkdir(parents=True)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
        except OSError as error:
            raise _unusable(output_dir, error) from error

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> RunDirectory:
        """Return the existing run at ``path``; ``<output-dir>/latest`` is followed to the run it names.

        Raises:
            OutputError: there is no run.
        """
        path = _absolute(path)
        if path.name == LATEST and not path.exists() and path.with_name(LATEST_TEXT).is_file():
            path = path.with_name(path.with_name(LATEST_TEXT).read_text(encoding="utf-8").strip())
        if not path.is_dir():
            raise OutputError(f"there is no run at {path}")
        path = path.resolve()
        if not ((path / "manifest.json").is_file() or (path / "checkpoints").is_dir()):
            runs = sorted(entry.parent.name for entry in path.glob("*/manifest.json"))
            hint = f"; it holds runs, name one of them: {', '.join(runs)}" if runs else ""
            raise OutputError(f"{path} is not a run: it has no manifest.json{hint}")
        return cls(path)

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        """Write ``manifest.json``: resolved configuration, versions, seed, digests."""
        atomic.write_json(self.path / "manifest.json", manifest)

    def update_manifest(self, more: Mapping[str, Any]) -> None:
        """Add to ``manifest.json``, which is made if it is not there."""
        self.write_manifest({**(self._read_object("manifest.json") or {}), **more})

    def read_manifest(self) -> dict[str, Any]:
        """Return the manifest.

        Raises:
            OutputError: there is none, or it is not a JSON object.
        """
        manifest = self._read_object("manifest.json")
        if manifest is None:
            raise OutputError(f"{self.path} has no manifest.json: the run ended before its first round")
        return manifest

    def append_round(self, row: Mapping[str, Any]) -> None:
        """Append a row to ``metrics.jsonl``: the keys of ``ROUND_DEFAULTS``, in that order, then any others.

        Round 0 is the evaluation before training. ``round`` is required; numbers that are not finite become null.
        """
        if row.get("round") is None:
            raise ValueError(f"a row of metrics.jsonl needs a round, got {dict(row)}")
        atomic.append_line(self.path / "metrics.jsonl", {**ROUND_DEFAULTS, **row})

    def read_rounds(self) -> list[dict[str, Any]]:
        """Return the rows of ``metrics.jsonl``, oldest first."""
        return atomic.read_lines(self.path / "metrics.jsonl")

    def truncate_rounds(self, last_round: int) -> None:
        """Keep only the rows of rounds up to ``last_round``: what a resumed run starts from."""
        rows = self.read_rounds()
        atomic.write_lines(self.path / "metrics.jsonl", [row for row in rows if row["round"] <= last_round])

    def write_answers(self, server_round: int, rows: Sequence[Mapping[str, str]]) -> None:
        """Write what a language model said after a round into ``samples.jsonl``, in place of an earlier such answer.

        Args:
            server_round: 0 for before training.
            rows: each with ``prompt``, ``reference`` and ``generated``.
        """
        path = self.path / "samples.jsonl"
        others = [row for row in atomic.read_lines(path) if row["round"] < server_round]
        atomic.write_lines(path, [*others, *({"round": server_round, **row} for row in rows)])

    def read_answers(self) -> list[dict[str, Any]]:
        """Return the rows of ``samples.jsonl``: what a language model said before and after training."""
        return atomic.read_lines(self.path / "samples.jsonl")

    def write_ranks(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write ``rank.csv``, the rank of what was learned: ``kind`` and ``layer``, else numbers."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{value:.8g}" if isinstance(value, float) else value for key, value in row.items()})
        atomic.write_text(self.path / "rank.csv", buffer.getvalue())

    def read_ranks(self) -> list[dict[str, Any]]:
        """Return the rows of ``rank.csv``, without what is empty; none while nobody has had them written."""
        path = self.path / "rank.csv"
        if not path.is_file():
            return []
        with path.open(encoding="utf-8", newline="") as file:
            return [
                {key: value if key in ("kind", "layer") else float(value) for key, value in row.items() if value}
                for row in csv.DictReader(file)
            ]

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, which has at least the keys of ``SUMMARY_KEYS``."""
        missing = [key for key in SUMMARY_KEYS if key not in summary]
        if missing:
            raise ValueError(f"summary.json needs {', '.join(missing)}")
        atomic.write_json(self.path / "summary.json", {**{key: summary[key] for key in SUMMARY_KEYS}, **summary})

    def remove_summary(self) -> None:
        """Remove the summary: the run goes on."""
        (self.path / "summary.json").unlink(missing_ok=True)

    def read_summary(self) -> dict[str, Any] | None:
        """Return the summary, or None while the run has not ended."""
        return self._read_object("summary.json")

    def write_model(self, state_dict: Mapping[str, Tensor]) -> None:
        """Write ``model.safetensors``: the merged model under the keys of the plain one."""
        atomic.write_tensors(self.path / "model.safetensors", state_dict, {"format": "pt"})

    def write_checkpoint(
        self,
        server_round: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        parts: Mapping[str, Mapping[str, Tensor]] | None = None,
        *,
        keep: int = 2,
    ) -> Path:
        """Save what the run needs to go on after ``server_round``; return the file.

        Only the last ``keep`` checkpoints up to this round stay, and the parts that they need. Those of later rounds
        belong to a course of the run that has been abandoned, and go.

        Args:
            server_round: the round just finished.
            tensors: their order is kept.
            state: what JSON can hold, with strings as keys; NaN and infinity come back as they were.
            parts: further tensors by a name for their content (letters and digits): a part that an earlier checkpoint
                has brought is not written again.
            keep: at least 1.
        """
        return self._checkpoints.write(server_round, tensors, state, parts or {}, keep=keep)

    def write_parts(self, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Save parts ahead of the next checkpoint, which names them (see `write_checkpoint`)."""
        self._checkpoints.write_parts(parts)

    def latest_checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint that can be read, or None if there is none.

        Raises:
            OutputError: there are checkpoints, but the disk has damaged all of them.
        """
        try:
            return self._checkpoints.newest()
        except ValueError as error:
            raise OutputError(str(error)) from error

    def draw_curves(self, full_model_bytes_per_round: float | None = None) -> Path:
        """Draw ``curves.png`` from the rows written so far; return the file.

        Args:
            full_model_bytes_per_round: what full-rank FedAvg would send in a round, up plus down, for comparison;
                default: the summary's ``fedavg_bytes``, if the run has ended.
        """
        from fedloru_flwr.runs.curves import draw_curves

        rounds = self.read_rounds()
        summary = self.read_summary() or {}
        if full_model_bytes_per_round is None:
            fedavg_bytes = summary.get("fedavg_bytes")
        else:
            fedavg_bytes = full_model_bytes_per_round * sum(row["round"] > 0 for row in rounds)
        path = self.path / "curves.png"
        draw_curves(rounds, summary.get("algorithm", ""), path, fedavg_bytes=fedavg_bytes)
        return path

    def _read_object(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{path} is not JSON ({error})") from error
        if not isinstance(content, dict):
            raise OutputError(f"{path} should hold a JSON object, got {type(content).__name__}")
        return content


def versions() -> dict[str, str | None]:
    """The versions of Python and of the packages that a run's result depends on; None for one that is not there."""
    packages = ("fedloru-flwr", "flwr", "torch", "peft", "numpy", "ray", "safetensors", "flwr-datasets")
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _absolute(path: str | os.PathLike[str]) -> Path:
    return Path(path).expanduser().absolute()


def _check_name(run_name: str) -> None:
    """Refuse what is not a plain directory name; the empty name stands for a time stamp."""
    reason = ""
    if "/" in run_name or "\\" in run_name:
        reason = "it may not contain a path separator; the directory around the run is output-dir"
    elif run_name.startswith("."):
        reason = "it may not start with a dot"
    elif run_name != run_name.strip() or not (run_name.isprintable()):
        reason = "it may not start or end with a space, nor contain control characters"
    elif run_name.lower() in (LATEST, LATEST_TEXT):
        reason = "that name points to the newest run"
    if reason:
        raise OutputError(f"run-name = {run_name!r}: {reason}")


def _make_named(output_dir: Path, run_name: str) -> Path:
    path = output_dir / run_name
    try:
        path.mkdir()
    except FileExistsError:
        raise _exists(output_dir, run_name) from None
    return path


def _make_time_stamped(output_dir: Path) -> Path:
    stamp = _now().strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        path = output_dir / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path


def _now() -> datetime:
    return datetime.now(UTC)


def _point_latest(output_dir: Path, run_name: str) -> None:
    atomic.remove_leftovers(output_dir, LATEST)
    temporary = atomic.temporary_path(output_dir / LATEST)
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(run_name, target_is_directory=True)
        temporary.replace(output_dir / LATEST)
        (output_dir / LATEST_TEXT).unlink(missing_ok=True)
    except OSError:
        temporary.unlink(missing_ok=True)
        atomic.write_text(output_dir / LATEST_TEXT, f"{run_name}\n")


def _exists(output_dir: Path, run_name: str) -> RunExistsError:
    path = output_dir / run_name
    return RunExistsError(
        f"run-name = {run_name!r}: {path} exists already; choose another run-name, or go on with it: resume = '{path}'"
    )


def _unusable(output_dir: Path, error: OSError) -> OutputError:
    return OutputError(f"output-dir = '{output_dir}' cannot be written: {error.strerror or error}")
