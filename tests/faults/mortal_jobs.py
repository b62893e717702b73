"""Lives of small jobs, each a fork of this process, killed without warning at a chosen moment.

A server of one client: for each line of JSON on standard input (see `live`) a child runs one life of a job and a line
of JSON on standard output says what became of it. The child tells through a pipe when it passes a **door**: the entry
or the exit of one of the phases in `PHASES`. At the door that was named, and after a delay, this process sends SIGKILL
to the child.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

PHASES = ("sending", "aggregating", "accumulating", "writing a checkpoint", "evaluating")
IN, OUT = "in", "out"


class Doors:
    """Reports, in a child, each entry and exit of a phase.

    Args:
        pipe: where to report to.
        stop_at: the number of the door of ``phase`` at which to wait for the end; 0: nowhere.
        phase: one of `PHASES`.
    """

    def __init__(self, pipe, phase, stop_at):
        self.pipe, self.phase, self.stop_at = pipe, phase, stop_at
        self.passed = 0

    def report(self, phase, side):
        os.write(self.pipe, f"{phase}/{side}\n".encode())
        if phase == self.phase:
            self.passed += 1
            if self.passed == self.stop_at:
                signal.pause()

    def around(self, owner, name, phase, when=lambda *_, **__: True):
        """Put doors around a function or method."""
        inside = getattr(owner, name)

        def guarded(*args, **kwargs):
            if not when(*args, **kwargs):
                return inside(*args, **kwargs)
            self.report(phase, IN)
            try:
                return inside(*args, **kwargs)
            finally:
                self.report(phase, OUT)

        setattr(owner, name, guarded)

    def build(self):
        """Put up the doors of all phases; those of "asking" are passed as often on any engine."""
        from fedloru_flwr.clients import together
        from fedloru_flwr.engines.in_process import InProcessGrid

        self.around(InProcessGrid, "_handle", "sending")
        self.around(together, "train_cohort", "sending")
        self.around(InProcessGrid, "_stream", "asking")
        self.build_at_server()

    def build_at_server(self):
        """Put up the doors of the phases that are the server's alone."""
        from fedloru_flwr import job
        from fedloru_flwr.runs import RunDirectory
        from fedloru_flwr.strategies import FederatedStrategy, federated
        from fedloru_flwr.strategies.inner import InnerStrategy

        self.around(InnerStrategy, "aggregate_train", "aggregating")
        self.around(federated, "step", "accumulating", lambda *_, accumulate_now, **__: accumulate_now)
        self.around(RunDirectory, "write_checkpoint", "writing a checkpoint")
        self.around(FederatedStrategy, "_evaluate", "evaluating")
        self.around(job.Job, "_central", "evaluating")


def run_job(output_dir, settings, run_name="run"):
    import fedloru_flwr

    settings = {**settings, "output-dir": str(output_dir), "run-name": run_name}
    return fedloru_flwr.run(config=settings, engine="in-process", resume="auto")


def child(directory, settings, doors):
    """One life: from what the last one left on disk to the end of the job."""
    log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        doors.build()
        run_job(directory, settings)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def live(directory, settings, phase="", door=0, delay=None):
    """Run one life and tell what became of it.

    Args:
        directory: of the job, to be continued if it has begun.
        settings: of the job.
        phase: one of `PHASES`.
        door: the number of the door of that phase, from 1, at which the life ends; 0: it goes on to its end.
        delay: seconds from that door to the kill; None: the child waits at the door.

    Returns:
        ``status``: the signal that ended it, or minus its exit code. ``inside``: the phases it was in.
        ``doors``: how many of each phase it had passed.
    """
    reading, writing = os.pipe()
    process_id = os.fork()
    if process_id == 0:
        os.close(reading)
        child(Path(directory), settings, Doors(writing, phase, door if delay is None else 0))
    os.close(writing)
    passed, inside = Counter(), Counter()
    with os.fdopen(reading) as pipe:
        for line in pipe:
            where, _, side = line.strip().rpartition("/")
            passed[where] += 1
            inside[where] += 1 if side == IN else -1
            if where == phase and passed[where] == door:
                time.sleep(delay or 0)
                os.kill(process_id, signal.SIGKILL)  # a child that has just ended is not yet waited for
    _, status = os.waitpid(process_id, 0)
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)
    return {"status": ended_by, "inside": [where for where in PHASES if inside[where]], "doors": passed}


def serve(scratch):
    """Import everything, once, then run the lives that are asked for."""
    import torch

    from fedloru_flwr.runs import RunDirectory

    torch.set_num_threads(1)
    RunDirectory.draw_curves = lambda self: None
    answers = os.dup(1)
    os.dup2(2, 1)
    # What is imported late is imported here; of the model and the data, another seed's stay in memory.
    run_job(Path(scratch), {**json.loads(sys.stdin.readline()), "seed": 12345, "num-server-rounds": 1}, "warm-up")
    for line in sys.stdin:
        os.write(answers, (json.dumps(live(**json.loads(line))) + "\n").encode())


if __name__ == "__main__":
    serve(sys.argv[1])
