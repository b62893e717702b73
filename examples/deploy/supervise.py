"""Keep one command running: what a service manager does for a SuperLink or a SuperNode, in a few lines.

::

    python supervise.py PARENT_PID RESTART_SECONDS COMMAND [ARGUMENT ...]

A command that fails is started again after ``RESTART_SECONDS``; one that ends well is not. On SIGTERM, SIGINT or
SIGHUP, or once the process ``PARENT_PID`` is no longer the parent, the command and its descendants are ended.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
from types import FrameType

import psutil  # type: ignore[import-untyped]

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and after a while end it with all its descendants."""
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_GRACE_SECONDS)
    process.kill()
    process.wait()
    _, left = psutil.wait_procs(family, timeout=2)
    for one in left:
        with contextlib.suppress(psutil.Error):
            one.kill()


def supervise(command: list[str], restart_seconds: float, parent: int) -> int:
    """Run the command until it ends well (return 0) or somebody asks for its end (return 0 too)."""
    asked = threading.Event()

    def ask(number: int, frame: FrameType | None) -> None:
        asked.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, ask)

    def wanted() -> bool:
        return not asked.is_set() and os.getppid() == parent

    while True:
        process = subprocess.Popen(command, start_new_session=True)
        while wanted() and process.poll() is None:
            asked.wait(_POLL_SECONDS)
        if process.poll() is None:
            end(process)
        if not wanted() or process.returncode == 0:
            return 0
        told = f"supervise: ended with status {process.returncode}, again in {restart_seconds:g} s"
        print(told, file=sys.stderr, flush=True)
        waited = 0.0
        while wanted() and waited < restart_seconds:
            asked.wait(_POLL_SECONDS)
            waited += _POLL_SECONDS
        if not wanted():
            return 0


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[3:], float(sys.argv[2]), int(sys.argv[1])))
