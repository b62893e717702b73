"""The package's ServerApp on Flower's own engine, killed without warning, with its SuperLink, at a chosen moment."""

import os
import signal
import threading

import psutil
from flwr.superlink.grid.inmemory_grid import InMemoryGrid
from mortal_jobs import Doors

from fedloru_flwr import server_app

app = server_app.app

PHASE, DOOR, DELAY = "MORTAL_PHASE", "MORTAL_DOOR", "MORTAL_DELAY"


def die():
    """End the SuperLink, so that its caller need not wait for a heartbeat that fails, and this process."""
    superlink = next(one for one in psutil.Process().parents() if "flower-superlink" in " ".join(one.cmdline()))
    os.kill(superlink.pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


class DoorsOnFlower(Doors):
    """Ends this process at a door."""

    def __init__(self):
        super().__init__(None, os.environ[PHASE], int(os.environ[DOOR]))

    def report(self, phase, side):
        if phase == self.phase:
            self.passed += 1
            if self.passed == self.stop_at:
                if delay := float(os.environ[DELAY]):
                    threading.Timer(delay, die).start()
                else:
                    die()


if os.environ.get(PHASE):
    doors = DoorsOnFlower()
    doors.around(InMemoryGrid, "push_messages", "asking")
    doors.build_at_server()
