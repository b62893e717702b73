"""Worker processes that are used again and again, so that heavy imports are paid once."""

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import psutil  # type: ignore[import-untyped]

from fedloru_flwr.compare.worker import GRACE_SECONDS, LOCK

COMMAND = (sys.executable, "-m", "fedloru_flwr.compare.worker")
MAX_ATTEMPTS = 3  # for a task whose worker dies

Answer = dict[str, Any]
Events: TypeAlias = "queue.SimpleQueue[tuple[_Worker, Answer | None] | None]"


class Interrupted(KeyboardInterrupt):
    """`Pool.interrupt` was called."""


class _Worker:
    """A process, and what it does at the moment."""

    def __init__(self, events: Events, environment: Mapping[str, str], pass_fds: Sequence[int], log: Path) -> None:
        self.task: Mapping[str, Any] | None = None
        self.key = ""
        # In a session of its own: Ctrl-C on the terminal is for the parent, which tells its workers.
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=dict(environment),
                text=True,
                encoding="utf-8",
                start_new_session=True,
                pass_fds=pass_fds,
            )
        threading.Thread(target=self._listen, args=(events,), daemon=True).start()

    def give(self, key: str, task: Mapping[str, Any]) -> None:
        """Begin a task; a process that is dead already says so by itself."""
        self.key, self.task = key, task
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task) + "\n")
            self.process.stdin.flush()

    def dismiss(self) -> None:
        """Ask it to end."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _listen(self, events: Events) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with contextlib.suppress(ValueError):  # the half of a line of one that was killed
                events.put((self, json.loads(line)))
        events.put((self, None))


class Pool:
    """At most ``size`` workers, started when there is something for them to do.

    Args:
        size: how many at a time.
        environment: theirs.
        log: gets what they say outside of tasks.
        pass_fds: open files that they keep open.
    """

    def __init__(self, size: int, environment: Mapping[str, str], log: Path, pass_fds: Sequence[int] = ()) -> None:
        self._size = size
        self._environment = environment
        self._pass_fds = pass_fds
        self._log = log
        self._workers: list[_Worker] = []
        self._events: Events = queue.SimpleQueue()
        self._attempts: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def size(self) -> int:
        """How many workers there may be."""
        return self._size

    def interrupt(self) -> None:
        """Let `carry_out` raise `Interrupted`; may be called from a signal handler."""
        self._events.put(None)

    def carry_out(
        self,
        next_task: Callable[[], tuple[str, Mapping[str, Any]] | None],
        done: Callable[[str, Answer], None],
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        """Carry out tasks until none is left.

        Args:
            next_task: gives the next task and a key for it, or None while there is none; asked again after each end.
            done: gets a key and the answer.
            tick: called about once a second.

        Raises:
            Interrupted: see `interrupt`.
        """
        while True:
            while self._free() and (found := next_task()) is not None:
                self._begin(*found)
            if not any(worker.task for worker in self._workers):
                return
            try:
                event = self._events.get(timeout=1.0)
            except queue.Empty:
                tick()
                continue
            if event is None:
                raise Interrupted
            self._handle(*event, done)
            tick()

    def _free(self) -> bool:
        return sum(worker.task is not None for worker in self._workers) < self._size

    def _begin(self, key: str, task: Mapping[str, Any]) -> None:
        self._attempts[key] = self._attempts.get(key, 0) + 1
        worker = next((worker for worker in self._workers if worker.task is None), None)
        if worker is None:
            worker = _Worker(self._events, self._environment, self._pass_fds, self._log)
            self._workers.append(worker)
        worker.give(key, task)

    def _handle(self, worker: _Worker, answer: Answer | None, done: Callable[[str, Answer], None]) -> None:
        key, task, worker.task = worker.key, worker.task, None
        if answer is not None:
            done(key, answer)
            return
        self._workers.remove(worker)
        status = worker.process.wait()
        if task is None:
            return
        if self._attempts[key] < MAX_ATTEMPTS:
            self._begin(key, task)
        else:
            how = f"by signal {-status}" if status < 0 else f"with status {status}"
            done(
                key, {"ok": False, "refused": False, "reason": f"its worker process ended {how}, {MAX_ATTEMPTS} times"}
            )

    def _stop(self) -> None:
        """End the workers and all that they have started; those that are busy save their state first."""
        started = []
        for worker in self._workers:
            with contextlib.suppress(psutil.NoSuchProcess):
                process = psutil.Process(worker.process.pid)
                started += [process, *process.children(recursive=True)]
            worker.dismiss()
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            for worker in self._workers:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    worker.process.wait(max(deadline - time.monotonic(), 0.0))
        finally:  # also when interrupted once more
            for process in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()  # psutil makes sure that the id is still that process's
            self._workers.clear()


def worker_environment(matplotlib: str, lock: int | None) -> dict[str, str]:
    """The environment of workers: quiet, with a shared font cache."""
    own = {LOCK: "" if lock is None else str(lock), "MPLCONFIGDIR": matplotlib}
    return {"FLWR_LOG_LEVEL": "WARNING", **os.environ, **own}
