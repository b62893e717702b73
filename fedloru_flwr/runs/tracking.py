"""Experiment trackers: every row of ``metrics.jsonl``, as it is written, in TensorBoard, Weights & Biases or MLflow.

The rows are the truth and a tracker is told of them, so that a tracker can be down, be switched on later, or see a run
be interrupted and continued, and still have every round once. A library is imported when a run starts that uses it.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from logging import WARNING
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flwr.common.logger import log

from fedloru_flwr import atomic
from fedloru_flwr.runs.directory import ROUND_DEFAULTS, RunDirectory

PROJECT = "fedloru-flwr"
_FILE = "tracking.json"
_PATIENCE, _LAST_PATIENCE = 10.0, 60.0  # seconds a tracker is waited for, in a round and at the end
_MLFLOW_BATCH = 500  # metrics in a request; a server takes 1000
_MLFLOW_PARAMS = 100  # parameters in a request
_MLFLOW_STATUS = {"finished": "FINISHED", "stopped": "FINISHED", "interrupted": "KILLED"}


class TrackerError(ValueError):
    """A tracker cannot be used; says what to install."""


class Known(NamedTuple):
    """What a tracker has of a run.

    Attributes:
        id: its own name for the run, kept in the run's directory; empty before the first start.
        last_round: the last round it was told of; -1: none.
    """

    id: str = ""
    last_round: int = -1


@dataclass(frozen=True)
class TrackedRun:
    """A run, as a tracker is told of it.

    Attributes:
        config: the settings by name, as numbers and text.
        path: the run's directory.
        name: of the run.
        last_round: the round after which this process goes on; -1: it is at the beginning.
    """

    config: Mapping[str, bool | int | float | str]
    path: Path
    name: str
    last_round: int


class Tracker(Protocol):
    """Something that shows runs; whatever it raises is a warning, and the run goes on."""

    @property
    def name(self) -> str:
        """Of the tracker, one of a kind among those of a run."""

    def start(self, run: TrackedRun, known: Known) -> Known:
        """Begin a run, or go on with it.

        Args:
            run: what it is.
            known: what ``start`` has returned before, and the last round told since. Rounds after
                ``run.last_round`` are computed anew.

        Returns:
            What the tracker has from now on: it is told of all rounds after ``last_round``.
        """

    def round(self, server_round: int, scalars: Mapping[str, float]) -> None:
        """Take a round's numbers, under the names that `scalars_of` gives them."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """End the run; ``summary`` is what ``summary.json`` holds."""


def scalars_of(rows: Iterable[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, float]]]:
    """Every number of every row by a name that is the same in all rounds and runs.

    That is its key in ``metrics.jsonl``; keys inside keys are joined by a slash: ``accuracy``, ``bytes_up``,
    ``bytes_by_purpose/entries/down``, ``aggregation_error/fc1``, ``clients/loss/mean``, ``metrics/<your own>``. Added
    are ``total_bytes_up`` and ``total_bytes_down``, all bytes so far. Text and missing numbers are left out, and so are
    ``failures``, which name clients.

    Args:
        rows: of ``metrics.jsonl``, from the first one.
    """
    up = down = 0
    for row in rows:
        up, down = up + row["bytes_up"], down + row["bytes_down"]
        told = {key: value for key, value in row.items() if key not in ("round", "failures")}
        yield row["round"], _numbers({**told, "total_bytes_up": up, "total_bytes_down": down})


def make_trackers(names: Sequence[str], project: str = PROJECT) -> list[Tracker]:
    """The trackers of these names.

    Args:
        names: some of ``"tensorboard"``, ``"wandb"`` and ``"mlflow"``.
        project: in which Weights & Biases and MLflow put the run.

    Raises:
        TrackerError: the library of one is not installed.
        KeyError: there is no such tracker.
    """
    return [_KINDS[name](project) for name in names]


class TensorBoardTracker:
    """Event files for TensorBoard in ``<run directory>/tensorboard``; numbers are of single precision there.

    Raises:
        TrackerError: the library is not installed.
    """

    name = "tensorboard"

    def __init__(self) -> None:
        _require("tensorboard")

    def start(self, run: TrackedRun, known: Known) -> Known:
        """See `Tracker`; what was told of rounds that are computed anew is purged."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        directory = run.path / "tensorboard"
        last_round = min(known.last_round, run.last_round) if any(directory.glob("events.*")) else -1
        # TensorBoard reads the files by name, which begins with the second in which they were begun.
        while any(directory.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(0.05)
        self._writer: Any = SummaryWriter(str(directory), purge_step=last_round + 1)
        file: Any = self._writer.file_writer
        if last_round < 0:
            told = dict.fromkeys(("accuracy", "loss", "total_bytes_up", "total_bytes_down"))
            for summary in hparams(dict(run.config), told)[:2]:  # type: ignore[no-untyped-call]
                file.add_summary(summary)
        return Known(last_round=last_round)

    def round(self, server_round: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`; the file is written before this returns."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, server_round)
        self._writer.flush()

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See `Tracker`; the summary is a text."""
        text = "".join(f"    {line}\n" for line in json.dumps(summary, indent=2).splitlines())
        self._writer.add_text("summary", text, summary["rounds"])
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases; its own files are in ``<run directory>/wandb``, unless ``WANDB_DIR`` says otherwise.

    Args:
        project: in which a new run is made; one that is continued stays where it is.

    Raises:
        TrackerError: the library is not installed.
    """

    name = "wandb"

    def __init__(self, project: str = PROJECT) -> None:
        _require("wandb")
        self._project = project

    def start(self, run: TrackedRun, known: Known) -> Known:
        """See `Tracker`; a step that is on the server cannot be replaced, so that its round is not told again."""
        import wandb

        project, _, run_id = known.id.rpartition("/")
        project, run_id = project or self._project, run_id or secrets.token_hex(4)
        self._run: Any = wandb.init(
            project=project,
            id=run_id,
            name=run.name,
            dir=os.environ.get("WANDB_DIR") or str(run.path),
            config=dict(run.config),
            allow_val_change=True,
            resume="allow",
            reinit="create_new",  # the caller may have a run of its own
            settings=wandb.Settings(console="off"),
        )
        last_round = known.last_round
        if self._run.resumed:
            last_round = self._run.starting_step - 1  # the server knows best what has reached it
        elif self._run.offline:
            # A killed process leaves a file without its end. Nobody has seen it yet: the new one gets all rounds.
            own = Path(self._run.sync_dir)
            earlier = [one for one in own.parent.glob(f"offline-run-*-{run_id}*") if one.name != own.name]
            if not any(synced for one in earlier for synced in one.glob("*.synced")):
                for one in earlier:
                    shutil.rmtree(one, ignore_errors=True)
                last_round = -1
        return Known(f"{project}/{run_id}", last_round)

    def round(self, server_round: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(scalars), step=server_round, commit=True)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See `Tracker`."""
        self._run.summary.update(_plain({"summary": summary}))
        self._run.finish(exit_code=0 if summary["status"] in ("finished", "stopped") else 1)


class MlflowTracker:
    """A run of MLflow, where ``MLFLOW_TRACKING_URI`` says.

    Args:
        project: the experiment in which a new run is made; one that is continued stays where it is.

    Raises:
        TrackerError: the library is not installed.
    """

    name = "mlflow"

    def __init__(self, project: str = PROJECT) -> None:
        _require("mlflow")
        self._project, self._id = project, ""

    def start(self, run: TrackedRun, known: Known) -> Known:
        """See `Tracker`; neither parameters nor metrics can be replaced, so that nothing is told again."""
        # Not MLflow's functions of the same purpose: they change what is current in the caller's process.
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client: Any = MlflowClient()
        self._id = known.id or self._id or self._client.create_run(self._experiment(), run_name=run.name).info.run_id
        if known.id:
            self._client.update_run(self._id, status="RUNNING")
        held = self._client.get_run(self._id).data
        params = [Param(_key(name), str(value)) for name, value in run.config.items() if _key(name) not in held.params]
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(self._id, params=params[start : start + _MLFLOW_PARAMS])
        return Known(self._id, int(held.metrics.get("round", -1)))

    def round(self, server_round: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`; the metric ``round`` is the last one, by which the round is known to be there."""
        self._log({**scalars, "round": server_round}, server_round)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """See `Tracker`; numbers are metrics, text is tags."""
        numbers = _numbers({"summary": summary})
        self._log(numbers, summary["rounds"])
        for name, value in _plain({"summary": summary}).items():
            if name not in numbers:
                self._client.set_tag(self._id, _key(name), str(value))
        self._client.set_terminated(self._id, _MLFLOW_STATUS.get(summary["status"], "FAILED"))

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self._project)
        if found is None:
            try:
                return str(self._client.create_experiment(self._project))
            except MlflowException:
                found = self._client.get_experiment_by_name(self._project)  # another run has made it meanwhile
                if found is None:
                    raise
        return str(found.experiment_id)

    def _log(self, scalars: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(_key(name), value, now, step) for name, value in scalars.items()]
        for start in range(0, len(metrics), _MLFLOW_BATCH):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MLFLOW_BATCH])


@dataclass
class _Followed:
    """A tracker, and how far it is.

    Attributes:
        tracker: that is told.
        known: what it has.
        started: in this process.
        pause: rounds until it is told again, after it has raised.
        failures: how often it has raised.
        thread: in which it is being told.
        is_slow: whether it has been waited for in vain.
    """

    tracker: Tracker
    known: Known
    started: bool = False
    pause: int = 0
    failures: int = 0
    thread: threading.Thread | None = None
    is_slow: bool = False


class Tracking:
    """Tells trackers of a run, and never stops it.

    Each is told in a thread of its own, for which a round waits 10 seconds and the end of the run a minute; of one that
    takes longer is warned once, and no later round waits for it. A tracker that raises is warned of once, too. It is
    tried again after 1, 2, 4... rounds and at the end, and is then told of all that it has missed. How far each one is
    stands in ``tracking.json`` in the run's directory.

    Args:
        trackers: each with a name of its own.

    Raises:
        ValueError: two have the same name.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        names = [tracker.name for tracker in trackers]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"trackers: two are called {twice[0]!r}, give each a name of its own")
        self._followed = [_Followed(tracker, Known()) for tracker in trackers]
        self._writing = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._followed)

    def begin(self, directory: RunDirectory, config: Mapping[str, Any]) -> None:
        """Start the trackers, where ``metrics.jsonl`` holds the rows that the run goes on from.

        Args:
            directory: the run's.
            config: its settings.
        """
        if not self._followed:
            return
        self._directory = directory
        rows = directory.read_rounds()
        self._last = max((row["round"] for row in rows), default=-1)
        self._totals = tuple(sum(row[key] for row in rows) for key in ("bytes_up", "bytes_down"))
        path = directory.path.resolve()
        self._run = TrackedRun(_plain(config), path, path.name, self._last)
        saved = self._read()
        for one in self._followed:
            one.known = saved.get(one.tracker.name, Known())
            self._tell(one)

    def round(self, row: Mapping[str, Any]) -> None:
        """Tell of a round.

        Args:
            row: the last one of ``metrics.jsonl``.
        """
        if not self._followed:
            return
        up, down = self._totals
        before = {"round": -1, "bytes_up": up, "bytes_down": down}
        _, now = scalars_of([before, {**ROUND_DEFAULTS, **row}])  # as it stands in the file
        self._totals = (up + row["bytes_up"], down + row["bytes_down"])
        for one in self._followed:
            if one.pause:
                one.pause -= 1
            else:
                self._tell(one, now)
        self._last = row["round"]

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Tell of the end.

        Args:
            summary: what ``summary.json`` holds.
        """
        for one in self._followed:
            self._tell(one, summary=summary)

    def _tell(
        self,
        one: _Followed,
        now: tuple[int, dict[str, float]] | None = None,
        *,
        summary: Mapping[str, Any] | None = None,
    ) -> None:
        """Tell a tracker of the round ``now`` and of those before that it lacks; wait for it, but not for ever.

        One that is still busy with what it was told before is left alone, and catches up the next time.
        """
        patience = _LAST_PATIENCE if summary is not None else 0.0 if one.is_slow else _PATIENCE
        if one.thread is not None:
            one.thread.join(patience)
        if one.thread is None or not one.thread.is_alive():
            one.thread = threading.Thread(target=self._tell_now, args=(one, now, summary, self._last), daemon=True)
            one.thread.start()
            one.thread.join(patience)
        if one.thread.is_alive() and not one.is_slow:
            one.is_slow = True
            log(
                WARNING,
                "tracking by %s takes more than %g seconds; the run goes on, and tells it later what it has missed",
                one.tracker.name,
                patience,
            )

    def _tell_now(
        self,
        one: _Followed,
        now: tuple[int, dict[str, float]] | None,
        summary: Mapping[str, Any] | None,
        last_round: int,
    ) -> None:
        before = one.known
        try:
            if not one.started:
                one.known = one.tracker.start(self._run, one.known)
                one.started = True
            is_abreast = now is not None and one.known.last_round >= last_round
            for server_round, scalars in [now] if now and is_abreast else self._all_rounds():
                if server_round > one.known.last_round:
                    one.tracker.round(server_round, scalars)
                    one.known = one.known._replace(last_round=server_round)
            if summary is not None:
                one.tracker.finish(summary)
        except Exception as error:
            if not one.failures:
                log(
                    WARNING,
                    "tracking by %s has failed; the run is not touched, and tells it later what it has missed: %s",
                    one.tracker.name,
                    f"{type(error).__name__}: {error}",
                )
            one.pause = 2**one.failures - 1
            one.failures += 1
        finally:
            if one.known != before:
                self._write()

    def _all_rounds(self) -> Iterator[tuple[int, dict[str, float]]]:
        return scalars_of(self._directory.read_rounds())

    def _read(self) -> dict[str, Known]:
        try:
            saved = json.loads((self._directory.path / _FILE).read_text(encoding="utf-8"))
            return {name: Known(str(one["id"]), int(one["last_round"])) for name, one in saved.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log(WARNING, "%s cannot be read, trackers begin anew: %s", self._directory.path / _FILE, error)
            return {}

    def _write(self) -> None:
        with self._writing:
            # What is known of a tracker that this process does not use stays.
            known = self._read() | {one.tracker.name: one.known for one in self._followed}
            try:
                atomic.write_json(self._directory.path / _FILE, {name: one._asdict() for name, one in known.items()})
            except OSError as error:
                log(WARNING, "%s cannot be written: %s", self._directory.path / _FILE, error)


def _require(library: str) -> None:
    found = importlib.util.find_spec(library)
    if found is None or found.origin is None:  # a directory of that name is no library
        raise TrackerError(
            f"track = {library!r}: the library {library} is not installed: pip install 'fedloru-flwr[{library}]'"
        )


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What is inside of mappings and lists, by the keys that lead there, joined by slashes."""
    if isinstance(value, Mapping | list | tuple):
        inside = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, one in inside:
            yield from _leaves(one, f"{name}/{key}" if name else str(key))
    else:
        yield name, value.item() if hasattr(value, "item") else value


def _numbers(content: Mapping[str, Any]) -> dict[str, float]:
    leaves = _leaves(content)
    return {name: value for name, value in leaves if isinstance(value, int | float) and math.isfinite(value)}


def _plain(content: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    return {name: value if isinstance(value, int | float) else str(value) for name, value in _leaves(content)}


def _key(name: str) -> str:
    """A name that MLflow takes: like a path, of letters, digits and a few signs."""
    parts = re.sub(r"[^\w\-. /]", "_", name).split("/")
    return "/".join(part if part.strip(".") else "_" for part in parts)[:250]


_KINDS: dict[str, Callable[[str], Tracker]] = {
    "tensorboard": lambda project: TensorBoardTracker(),
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}
