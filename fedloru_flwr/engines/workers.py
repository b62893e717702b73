"""Processes at the other end of a socket, started before what they are for has been imported here."""

import contextlib
import io
import os
import pickle
import socket
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

_GRACE_SECONDS = 5.0


def dumps(what: object) -> bytes:
    """Pickle a value in which there may be Flower's arrays, without the chunks that these keep of themselves."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(what)
    return buffer.getvalue()


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if type(obj).__name__ == "Array" and type(obj).__module__.startswith("flwr."):
            return type(obj), (obj.dtype, obj.shape, obj.stype, obj.data)
        return NotImplemented


class Workers:
    """Worker processes, started at once so that their imports pass while the run is prepared.

    Args:
        count: how many; with none, all is trained in this process.
    """

    def __init__(self, count: int) -> None:
        self.members = [Worker() for _ in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self.members:
            worker.stop()


class Worker:
    """A process at the other end of a socket."""

    def __init__(self) -> None:
        mine, its = socket.socketpair()
        command = [sys.executable, "-P", "-m", "fedloru_flwr.engines.processes", str(its.fileno())]
        # In a session of its own: Ctrl-C on the terminal is for this process, which then ends the worker.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=[its.fileno()],
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)},
        )
        its.close()
        self._socket = mine
        self.is_stopped = False
        self._connection = Connection(os.dup(mine.fileno()))

    def send(self, what: object) -> None:
        """Send a value; a dead worker is told of by `receive`."""
        with contextlib.suppress(OSError):
            self._connection.send_bytes(dumps(what))

    def receive(self) -> Any:
        """What the worker sends next.

        Raises:
            EOFError: it has died.
        """
        try:
            return pickle.loads(self._connection.recv_bytes())
        except OSError as error:
            raise EOFError(str(error)) from error

    def stop(self) -> None:
        """End the process; a thread that waits for it is told that it has died."""
        self.is_stopped = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self.process.terminate()  # it has nothing to save
        try:
            self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
