"""Run a Flower app through `flwr run` on a simulation engine of its own, and leave nothing behind.

One call owns everything that it starts: a SuperLink on a free port with a private Flower home, the process of
the run, Ray and its workers. All of them carry a mark in their environment, by which they are found and ended
when the call returns, raises or is interrupted. A guard process does the same should the caller itself be
killed. The user's Flower configuration is neither read nor written, and runs side by side do not meet.

Only POSIX systems.
"""

import contextlib
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]
import tomli_w

CONNECTION = "local-simulation"
_MARK = "FEDLORU_FLOWER_RUN"
_HOST = "127.0.0.1"
_START_SECONDS = 60.0  # for the SuperLink; about 1.5 on an idle machine, far more on one that is swapping
_EXIT_SECONDS = 5.0  # for the run's own process to leave by itself, atexit handlers included
_GRACE_SECONDS = 2.0  # between SIGTERM and SIGKILL

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_STARTED = re.compile(r"Successfully started run (\d+)")
_NOISE = re.compile(
    r"Using SuperLink: |Successfully (started run|installed) |WARNING\s*:\s+Since flwr 1\.32, default simulated"
    r"|.*WARNING\s*:\s+Manually terminating ClientAppActor$"
)
_BOX = str.maketrans("", "", "╭╮╰╯─│")


class FlowerError(RuntimeError):
    """Flower did not start, or refused the app or its run config: no run took place."""


@dataclass(frozen=True)
class FlowerOutcome:
    """How a run ended, in Flower's own words.

    `status` is what `flwr list` says (`finished:completed`, `finished:failed`, `finished:stopped`), or
    `timeout`, `lost` or `unknown` when the run was ended here: it took too long, its SuperLink died, or Flower
    did not say.
    """

    completed: bool
    status: str
    details: str
    run_id: int


def run_on_flower(
    app_dir: Path,
    run_config: Mapping[str, bool | int | float | str],
    *,
    num_supernodes: int,
    flower_home: Path | None = None,
    client_num_cpus: int = 1,
    client_num_gpus: float = 0.0,
    ray_num_cpus: int | None = None,
    environment: Mapping[str, str] | None = None,
    on_line: Callable[[str], None] = print,
    timeout: float | None = None,
) -> FlowerOutcome:
    """Run the app in `app_dir` with `flwr run`, wait for its end and return how it ended.

    The ServerApp's working directory is the caller's. There are `ray_num_cpus / client_num_cpus` workers.

    Args:
        app_dir: directory with the app's `pyproject.toml`.
        run_config: values that replace those of `[tool.flwr.app.config]`; Flower refuses a key that is not there.
        num_supernodes: number of virtual clients.
        flower_home: Flower's home for this run, kept afterwards; two runs at a time need two. A temporary one
            by default.
        client_num_cpus: CPUs that a worker counts for (and the threads that it may use).
        client_num_gpus: GPUs that a worker counts for, a fraction to share one.
        ray_num_cpus: CPUs that Ray is told it has, by default those it finds. It may be more than there are.
            Not used with a Ray cluster named by `RAY_ADDRESS`, which has its own.
        environment: variables for the run's processes, over the caller's and over the defaults set here.
            `FLWR_LOG_LEVEL=INFO` brings Flower's own progress lines back.
        on_line: called with each line the run writes, as it comes, without its newline and colours.
        timeout: seconds after which the run is ended; by default never.

    Raises:
        ValueError: there are no clients or no CPUs for them.
        FlowerError: nothing was run, and why.
    """
    if num_supernodes < 1 or client_num_cpus < 1 or client_num_gpus < 0:
        raise ValueError(
            "expected num_supernodes >= 1, client_num_cpus >= 1 and client_num_gpus >= 0, "
            f"got {num_supernodes}, {client_num_cpus} and {client_num_gpus}"
        )
    if ray_num_cpus is not None and ray_num_cpus < client_num_cpus:
        raise ValueError(
            f"expected ray_num_cpus >= client_num_cpus ({client_num_cpus}), or no worker fits, got {ray_num_cpus}"
        )
    with owned_processes() as own:
        home = (flower_home or own.scratch / "home").absolute()
        home.mkdir(parents=True, exist_ok=True)
        env = own.environment(home, environment or {})
        own_ray = env["RAY_ADDRESS"] == "local"
        federation = {
            "num-supernodes": num_supernodes,
            "client-resources-num-cpus": client_num_cpus,
            "client-resources-num-gpus": float(client_num_gpus),
            **({"init-args-num-cpus": ray_num_cpus} if ray_num_cpus is not None and own_ray else {}),
        }
        superlink, port = _start_superlink(home, env, own)
        connection = {"address": f"{_HOST}:{port}", "insecure": True}
        config = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        (home / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
        command = [_script("flwr"), "run", str(app_dir.absolute()), CONNECTION, "--stream"]
        command += ["--federation-config", " ".join(f"{key}={value}" for key, value in federation.items())]
        if run_config:
            overrides = own.scratch / "run-config.toml"
            overrides.write_text(tomli_w.dumps(dict(run_config)), encoding="utf-8")
            command += ["--run-config", str(overrides)]
        return _follow(command, env, superlink, home, own, on_line, timeout)


@dataclass(frozen=True)
class OwnedProcesses:
    """Processes that carry one mark, and a temporary directory of theirs.

    Attributes:
        mark: what their environment holds.
        scratch: the directory, with a short name.
        children: those started from here.
    """

    mark: str
    scratch: Path
    children: list[subprocess.Popen[str]] = field(default_factory=list)

    def environment(self, home: Path, given: Mapping[str, str]) -> dict[str, str]:
        """Their environment: fixed settings over `given` over the caller's over defaults."""
        return _environment(self.mark, home, self.scratch, given)

    def start(self, command: list[str], env: dict[str, str], *, stdout: int) -> subprocess.Popen[str]:
        """Start one of them."""
        child = _popen(command, env, stdout=stdout)
        self.children.append(child)
        return child


@contextlib.contextmanager
def owned_processes(grace: float = _GRACE_SECONDS) -> Iterator[OwnedProcesses]:
    """Give a mark and a directory; end all processes that carry the mark on leaving, even if this one is killed.

    Args:
        grace: seconds that they have to leave by themselves.
    """
    with _interruptible(), _scratch() as scratch:
        own = OwnedProcesses(uuid.uuid4().hex, scratch)
        guard = _start_guard(own.mark, scratch)
        try:
            yield own
        finally:
            _end_processes(own.mark, grace)
            for child in own.children:
                child.wait()
            guard.terminate()
            guard.wait()


def _follow(
    command: list[str],
    env: dict[str, str],
    superlink: subprocess.Popen[str],
    home: Path,
    own: OwnedProcesses,
    on_line: Callable[[str], None],
    timeout: float | None,
) -> FlowerOutcome:
    """Submit the run, pass its lines on until it ends, and ask how it ended."""
    deadline = None if timeout is None else time.monotonic() + timeout
    run = own.start(command, env, stdout=subprocess.PIPE)
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(run, lines), daemon=True).start()
    run_id = 0
    before: list[str] = []  # what `flwr run` said before the run was accepted

    while True:
        try:
            line = lines.get(timeout=0.25)
        except queue.Empty:
            if superlink.poll() is not None:
                details = f"Flower's SuperLink ended ({superlink.returncode}) during the run:\n{_log_end(home)}"
                return FlowerOutcome(False, "lost", details, run_id)
        else:
            if line is None:
                break
            if not run_id and (started := _STARTED.match(line)):
                run_id = int(started[1])
            if not run_id:
                before.append(line)
            elif not _NOISE.match(line):
                on_line(line)
        if deadline is not None and time.monotonic() > deadline:
            return FlowerOutcome(False, "timeout", f"ended after {timeout:g} seconds (timeout)", run_id)

    if not run_id:
        said = [text for line in before if (text := line.translate(_BOX).strip()) and not _NOISE.match(line)]
        said += [line for line in _log_end(home).splitlines() if line.startswith("ERROR")]  # the reason, in full
        raise FlowerError(f"`flwr run` did not accept the app in {command[2]}:\n" + "\n".join(said))
    # The stream can end without the run: when the connection breaks.
    unknown = 0
    while True:
        status, details = _status(run_id, env, superlink, home)
        unknown = unknown + 1 if status == "unknown" else 0
        if status.startswith("finished") or status == "lost" or unknown == 5:
            break
        if deadline is not None and time.monotonic() > deadline:
            return FlowerOutcome(False, "timeout", f"ended after {timeout:g} seconds (timeout)", run_id)
        time.sleep(1)
    if status.startswith("finished"):
        _await_exit(superlink.pid)
    return FlowerOutcome(status == "finished:completed", status, details, run_id)


def _read_lines(process: subprocess.Popen[str], lines: "queue.SimpleQueue[str | None]") -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError), process.stdout as stream:
        for line in stream:
            lines.put(_COLOUR.sub("", line.rstrip("\n")))
    lines.put(None)


def _status(run_id: int, env: dict[str, str], superlink: subprocess.Popen[str], home: Path) -> tuple[str, str]:
    """Return the run's status and its details, as `flwr list` gives them."""
    command = [_script("flwr"), "list", CONNECTION, "--run-id", str(run_id), "--format", "json"]
    reply = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
    )
    try:
        found = json.loads(reply.stdout)["runs"][0]
        details = str(found["status-details"])
        return str(found["status"]), "" if details == "N/A" else details
    except (ValueError, KeyError, IndexError):
        if superlink.poll() is None:
            return "unknown", reply.stdout + reply.stderr
        return "lost", f"Flower's SuperLink ended ({superlink.returncode}) during the run:\n{_log_end(home)}"


def _start_superlink(home: Path, env: dict[str, str], own: OwnedProcesses) -> tuple[subprocess.Popen[str], int]:
    """Start a SuperLink and return it, listening, with its port."""
    log = home / "superlink.log"
    for _ in range(5):  # another process may take the port between its choice and its use
        with socket.socket() as probe:
            probe.bind((_HOST, 0))
            port = int(probe.getsockname()[1])
        command = [_script("flower-superlink"), "--insecure", "--simulation", "--host", _HOST, "--port", str(port)]
        with log.open("w", encoding="utf-8") as output:
            superlink = own.start(command, env, stdout=output.fileno())
        deadline = time.monotonic() + _START_SECONDS
        while superlink.poll() is None and time.monotonic() < deadline:
            # An answer on the port could be another SuperLink's; the socket's owner is beyond doubt.
            if _listens(superlink.pid, port):
                return superlink, port
            time.sleep(0.05)
        if superlink.poll() is None:
            raise FlowerError(f"Flower's SuperLink did not start in {_START_SECONDS:g} seconds:\n{_log_end(home)}")
        if "address already in use" not in _log_end(home).lower():
            break
    raise FlowerError(f"Flower's SuperLink did not start (exit status {superlink.returncode}):\n{_log_end(home)}")


def _listens(pid: int, port: int) -> bool:
    with contextlib.suppress(psutil.Error):
        connections = psutil.Process(pid).net_connections("tcp4")
        return any(entry.status == psutil.CONN_LISTEN and entry.laddr.port == port for entry in connections)
    return False


def _log_end(home: Path, lines: int = 20) -> str:
    try:
        text = (home / "superlink.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "(no log)"
    return "\n".join(_COLOUR.sub("", text).splitlines()[-lines:])


def _environment(mark: str, home: Path, scratch: Path, given: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the run's processes: fixed settings over `given` over the caller's over defaults."""
    defaults = {
        "FLWR_LOG_LEVEL": "WARNING",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.25",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "RAY_ADDRESS": "local",  # a private Ray, even where one is running
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # a worker that counts for no GPU may still see it
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    env = {**defaults, **os.environ, **given}
    # Flower finds its own commands by PATH, and reaches its SuperLink through a proxy if one is set.
    env["PATH"] = os.pathsep.join([*_script_dirs(), env.get("PATH", os.defpath)])
    for name in ("no_proxy", "NO_PROXY"):
        env[name] = ",".join(filter(None, [env.get(name), _HOST, "localhost"]))
    fixed = {
        _MARK: mark,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_TMPDIR": str(scratch),
        "TERMINAL_WIDTH": "200",  # of the box in which `flwr` writes its errors
    }
    return {**env, **fixed}


def _script_dirs() -> list[str]:
    return list(dict.fromkeys([str(Path(sys.executable).parent), sysconfig.get_path("scripts")]))


def _script(name: str) -> str:
    """Return a command of the Flower that this Python imports; another one may be first in PATH."""
    found = shutil.which(name, path=os.pathsep.join(_script_dirs()))
    if found is None:
        raise FlowerError(f"`{name}` is not in {' or '.join(_script_dirs())}: is flwr[simulation] installed there?")
    return found


def _popen(command: list[str], env: dict[str, str], *, stdout: int) -> subprocess.Popen[str]:
    # A session of its own: Ctrl-C at the terminal reaches the caller alone, which then ends the rest in order.
    return subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


@contextlib.contextmanager
def _scratch() -> Iterator[Path]:
    """Give a temporary directory with a name short enough for Ray's sockets: 103 bytes, of which Ray takes 68."""
    base = tempfile.gettempdir()
    path = Path(tempfile.mkdtemp(prefix="fedloru-", dir=base if len(os.fsencode(base)) <= 18 else "/tmp"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit, as Ctrl-C raises, where nobody else handles them."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    replaced = []
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, leave)
                replaced.append(number)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, signal.SIG_DFL)


def _run_processes(mark: str, sessions: set[int]) -> list[psutil.Process]:
    """Return the living processes of the run: those that carry its mark, share a session with one, or descend from one.

    A process may write over its environment to show a title, as Ray's workers do, hence the other two ways.
    `sessions` keeps those known so far, for processes that lose their parent between two calls.
    """
    own = os.getpid()
    living = {}
    children: dict[int, list[int]] = {}
    found: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid == own or process.status() == psutil.STATUS_ZOMBIE:
                continue
            living[process.pid] = process
            children.setdefault(process.ppid(), []).append(process.pid)
            session = os.getsid(process.pid)
            if session in sessions:
                found.add(process.pid)
            elif process.environ().get(_MARK) == mark:
                found.add(process.pid)
                sessions.add(session)
    pending = list(found)
    while pending:
        for child in children.get(pending.pop(), []):
            if child not in found:
                found.add(child)
                pending.append(child)
    return [living[pid] for pid in sorted(found)]


def _end_processes(mark: str, grace: float = _GRACE_SECONDS) -> None:
    """End the run's processes: ask, and after `grace` seconds insist."""
    sessions: set[int] = set()
    asked: set[psutil.Process] = set()
    start = time.monotonic()
    while processes := _run_processes(mark, sessions):
        waited = time.monotonic() - start
        if waited > grace + 10:  # unkillable, stuck in the kernel: not worth hanging for
            return
        for process in processes:
            with contextlib.suppress(psutil.Error):
                if waited > grace:
                    process.kill()
                elif process not in asked:
                    asked.add(process)
                    process.terminate()
        time.sleep(0.05)


def _await_exit(superlink: int) -> None:
    """Wait, but not for ever, until the SuperLink has no grandchildren: the run's process and Ray."""
    deadline = time.monotonic() + _EXIT_SECONDS
    with contextlib.suppress(psutil.Error):
        parent = psutil.Process(superlink)
        while time.monotonic() < deadline:
            below = set(parent.children(recursive=True)) - set(parent.children())
            if all(process.status() == psutil.STATUS_ZOMBIE for process in below):
                return
            time.sleep(0.05)


def _start_guard(mark: str, scratch: Path) -> subprocess.Popen[bytes]:
    """Start the process that cleans up should this one be killed."""
    command = [sys.executable, "-P", __file__, mark, str(os.getpid()), str(scratch)]
    return subprocess.Popen(
        command,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _guard(mark: str, caller: int, scratch: Path) -> None:
    while os.getppid() == caller:
        time.sleep(0.25)
    _end_processes(mark)
    shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    _guard(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
