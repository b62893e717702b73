"""Where a comparison's runs and files lie, and what of them is there already."""

import contextlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedloru_flwr.compare.plan import Wanted
from fedloru_flwr.compare.records import fingerprint
from fedloru_flwr.compare.spec import Values
from fedloru_flwr.config import ConfigError, RunConfig, Scalar

_LOCK_SECONDS = 30.0  # for the workers of a comparison that was killed to end


@dataclass(frozen=True)
class Place:
    """A run's directory: ``<parent>/<name>``."""

    parent: Path
    name: str

    @property
    def path(self) -> Path:
        """The run's directory."""
        return self.parent / self.name


class Places:
    """The files of one comparison.

    Args:
        output_dir: made if missing.
    """

    def __init__(self, output_dir: Path) -> None:
        self.output_dir = output_dir
        self.runs = output_dir / "runs"
        self.logs = output_dir / "logs"
        self._found = dict(self._scan()) if self.runs.is_dir() else {}

    def place(self, run: Wanted) -> Place:
        """Where a run lies, or is to lie."""
        if run.key not in self._found:
            told = _file_name(",".join(f"{key}={value}" for key, value in {**run.at, **run.choice}.items()))
            parent = self.runs / _file_name(run.method) / told if told else self.runs / _file_name(run.method)
            self._found[run.key] = Place(parent, f"seed-{run.seed}-{run.key}")
        return self._found[run.key]

    def settings(self, run: Wanted) -> Values:
        """The run's settings, its place included."""
        place = self.place(run)
        return {**run.settings, "output-dir": str(place.parent), "run-name": place.name}

    def finished(self, run: Wanted) -> bool:
        """Whether the run has ended well: with its last round, or with the one that reached a limit."""
        summary = _read(self.place(run).path / "summary.json")
        whole = summary.get("status") == "finished" and summary.get("rounds") == run.settings["num-server-rounds"]
        return whole or summary.get("status") == "stopped"

    def make_ready(self, run: Wanted) -> Path:
        """Clear away what cannot be continued; return the file for the run's output.

        That is what was killed before it became a run, and a run that failed: it is run anew, since to go on behind the
        round in which it failed would give another result.
        """
        path = self.place(run).path
        is_run = (path / "manifest.json").is_file() or (path / "checkpoints").is_dir()
        if path.is_dir() and (not is_run or _read(path / "summary.json").get("status") == "failed"):
            shutil.rmtree(path)
        self.logs.mkdir(parents=True, exist_ok=True)
        return self.logs / f"{_file_name(run.method)}-{path.name}.log"

    def rounds_done(self, run: Wanted) -> int:
        """How many rounds the run has behind it."""
        with contextlib.suppress(OSError):
            return max((self.place(run).path / "metrics.jsonl").read_bytes().count(b"\n") - 1, 0)
        return 0

    def _scan(self) -> Iterator[tuple[str, Place]]:
        """Find runs by what they compute, whatever method's name they lie under."""
        for path in sorted(self.runs.glob("**/seed-*-*/manifest.json")):
            settings = _read(path).get("config")
            with contextlib.suppress(ConfigError):  # a setting that there is no more
                if isinstance(settings, dict):
                    key = fingerprint(RunConfig.from_mapping(settings).as_mapping())
                    yield key, Place(path.parent.parent, path.parent.name)


@contextlib.contextmanager
def only_one(output_dir: Path) -> Iterator[int | None]:
    """Keep a second comparison out of the directory, workers of a killed one included; give the lock's file.

    Raises:
        ConfigError: another one is at work.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    if sys.platform == "win32":
        yield None
        return
    import fcntl

    lock = os.open(output_dir / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        deadline = time.monotonic() + _LOCK_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"another comparison is at work in {output_dir}") from None
                time.sleep(0.2)
        yield lock
    finally:
        os.close(lock)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.=,+-]", "_", text)[:100]


def _read(path: Path) -> Mapping[str, Scalar]:
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}
