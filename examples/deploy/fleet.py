"""A SuperLink and its SuperNodes as separate processes of one machine, under supervision, and nothing left behind.

::

    with Fleet(directory) as fleet:
        fleet.start_superlink()
        fleet.register("north")
        fleet.start_supernode("north", {"client-id": "north", "data-path": "/data/north.csv"})
        run_id = fleet.submit(app_directory, {"num-clients": 1})

Everything lies in one directory: ``tls/`` (certificates), ``superlink/`` and one directory for each SuperNode, with
its key, its Flower home and its log. Only POSIX systems.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import psutil  # type: ignore[import-untyped]
import tomli_w
from credentials import write_certificates, write_node_key

CONNECTION = "fleet"
HOST = "127.0.0.1"
_BIN = Path(sys.executable).parent
_SUPERVISE = Path(__file__).with_name("supervise.py")

Value = bool | int | float | str


class FleetError(RuntimeError):
    """A part of the fleet did not start, or Flower refused what it was asked for."""


class Service:
    """One supervised command.

    Args:
        command: what to run.
        log: where its output goes.
        environment: of its process.
        restart_seconds: between its failure and the next start.
    """

    def __init__(self, command: list[str], log: Path, environment: Mapping[str, str], restart_seconds: float) -> None:
        self.log = log
        head = [sys.executable, "-P", str(_SUPERVISE), str(os.getpid()), str(restart_seconds)]
        with log.open("w") as output:
            self._supervisor = subprocess.Popen(
                [*head, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=log.parent,
                start_new_session=True,  # Ctrl-C reaches the caller alone, which then ends the rest in order
            )

    def said(self) -> str:
        """All it has written so far."""
        return self.log.read_text(errors="replace")

    def pid(self) -> int | None:
        """The process id of the command itself; None while it is not running."""
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._supervisor.pid).children():
                if child.status() != psutil.STATUS_ZOMBIE:
                    return int(child.pid)
        return None

    def kill(self) -> None:
        """Kill the command by SIGKILL, and it alone, as a shortage of memory does; its supervisor starts it again."""
        pid = self.pid()
        if pid is None:
            raise FleetError(f"nothing to kill, it is not running:\n{self.said()}")
        psutil.Process(pid).kill()

    def ask_to_end(self) -> None:
        """Ask it to end for good."""
        self._supervisor.terminate()

    def await_end(self) -> None:
        """Wait until it has ended."""
        try:
            self._supervisor.wait(30)
        except subprocess.TimeoutExpired:
            for process in [*psutil.Process(self._supervisor.pid).children(recursive=True), self._supervisor]:
                with contextlib.suppress(psutil.Error):
                    process.kill()
            self._supervisor.wait()


class Fleet:
    """A SuperLink and SuperNodes.

    Args:
        directory: for all that they need and leave behind.
        secure: with TLS and SuperNode authentication; else in the clear.
        host: the address that the SuperLink listens on and is reached by.
        restart_seconds: between a part's failure and its next start.
    """

    def __init__(self, directory: Path, *, secure: bool = True, host: str = HOST, restart_seconds: float = 5.0) -> None:
        self.directory = directory.absolute()
        self.secure = secure
        self.host = host
        self.port = free_port()
        self.superlink: Service | None = None
        self.supernodes: dict[str, Service] = {}
        self._restart_seconds = restart_seconds
        self._operator = self._environment("operator")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        services = [*self.supernodes.values(), *([self.superlink] if self.superlink else [])]
        for service in services:
            service.ask_to_end()
        for service in services:
            service.await_end()

    @property
    def tls(self) -> Path:
        """The directory of the certificates."""
        return self.directory / "tls"

    def key(self, name: str) -> Path:
        """The private key of a SuperNode; the public one lies beside it."""
        return self.directory / name / "key"

    def start_superlink(self) -> None:
        """Start the SuperLink, with its state in a file, and wait until it answers."""
        command = [_script("flower-superlink"), "--host", self.host, "--port", str(self.port)]
        command += ["--database", str(self.directory / "superlink" / "state.db")]
        connection: dict[str, Value] = {"address": f"{self.host}:{self.port}"}
        if self.secure:
            write_certificates(self.tls, [self.host, "localhost"])
            command += ["--ssl-ca-certfile", str(self.tls / "ca.crt"), "--ssl-certfile", str(self.tls / "server.pem")]
            command += ["--ssl-keyfile", str(self.tls / "server.key"), "--enable-supernode-auth"]
            connection["root-certificates"] = str(self.tls / "ca.crt")
        else:
            command += ["--insecure"]
            connection["insecure"] = True
        config = {"superlink": {"default": CONNECTION, CONNECTION: connection}}
        (self.directory / "operator" / "home" / "config.toml").write_text(tomli_w.dumps(config))
        environment = self._environment("superlink")
        self.superlink = Service(command, self.directory / "superlink" / "log", environment, self._restart_seconds)
        self.await_superlink()

    def await_superlink(self, seconds: float = 120) -> None:
        """Wait until the SuperLink answers on its port."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with contextlib.suppress(OSError), socket.create_connection((self.host, self.port), 1):
                return
            time.sleep(0.2)
        raise FleetError(f"the SuperLink does not answer after {seconds:g} s:\n{self.logs()}")

    def register(self, name: str) -> None:
        """Make a SuperNode's key and tell the SuperLink of it."""
        write_node_key(self.key(name))
        self.flwr("supernode", "register", str(self.key(name)) + ".pub", CONNECTION)

    def start_supernode(
        self,
        name: str,
        node_config: Mapping[str, Value],
        *,
        root_certificates: Path | None = None,
        in_the_clear: bool = False,
        max_retries: int | None = None,
        within: Sequence[str] = (),
    ) -> Service:
        """Start a SuperNode; with security, its key must be in its place.

        Args:
            name: of its directory.
            node_config: what is true of this client alone.
            root_certificates: of another authority than the SuperLink's.
            in_the_clear: without TLS and key, whatever the SuperLink wants.
            max_retries: after which it gives up to reach the SuperLink; None: it never does.
            within: a command that runs the one that follows it, such as ``ip netns exec NAME``.
        """
        environment = self._environment(name)
        command = [*within, _script("flower-supernode"), "--superlink", f"{self.host}:{self.port}"]
        command += ["--port", str(free_port())]
        command += ["--node-config", " ".join(f"{key}={_toml(value)}" for key, value in node_config.items())]
        if self.secure and not in_the_clear:
            command += ["--root-certificates", str(root_certificates or self.tls / "ca.crt")]
            command += ["--auth-supernode-private-key", str(self.key(name))]
        else:
            command += ["--insecure"]
        if max_retries is not None:
            command += ["--max-retries", str(max_retries)]
        service = Service(command, self.directory / name / "log", environment, self._restart_seconds)
        self.supernodes[name] = service
        return service

    def submit(self, app: Path, settings: Mapping[str, Value]) -> int:
        """Submit a run of the app and return its id."""
        path = self.directory / "operator" / "run.toml"
        path.write_text(tomli_w.dumps(dict(settings)))
        said = self.flwr("run", str(app), CONNECTION, "--run-config", str(path), "--format", "json")
        return int(json.loads(said)["run-id"])

    def stream(self, run_id: int) -> None:
        """Show the run's output on this terminal as it comes, until it ends."""
        subprocess.run([_script("flwr"), "log", str(run_id), CONNECTION], env=self._operator, check=False)

    def status(self, run_id: int) -> str:
        """The run's state in Flower's words, such as ``running`` or ``finished:completed``."""
        said = self.flwr("list", CONNECTION, "--run-id", str(run_id), "--format", "json")
        return str(json.loads(said)["runs"][0]["status"])

    def await_run(self, run_id: int, seconds: float) -> str:
        """Wait until a run has ended and return its state."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if (status := self.status(run_id)).startswith("finished"):
                return status
            time.sleep(2)
        raise FleetError(f"run {run_id} has not ended after {seconds:g} s:\n{self.logs()}")

    def nodes(self) -> list[dict[str, Any]]:
        """The SuperNodes that the SuperLink knows of, as ``flwr supernode list`` gives them."""
        found = json.loads(self.flwr("supernode", "list", CONNECTION, "--format", "json"))["nodes"]
        return [dict(node) for node in found]

    def flwr(self, *arguments: str) -> str:
        """Call the ``flwr`` command and return what it prints.

        Raises:
            FleetError: it failed, with what it said.
        """
        done = subprocess.run([_script("flwr"), *arguments], env=self._operator, capture_output=True, text=True)
        if done.returncode:
            raise FleetError(f"flwr {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
        return done.stdout

    def logs(self, lines: int = 40) -> str:
        """The ends of all logs."""
        parts = []
        for path in sorted(self.directory.glob("*/log")):
            parts += [f"--- {path.parent.name}", *path.read_text(errors="replace").splitlines()[-lines:]]
        return "\n".join(parts)

    def _environment(self, name: str) -> dict[str, str]:
        """The environment of a part, with a Flower home of its own."""
        home = self.directory / name / "home"
        home.mkdir(parents=True, exist_ok=True)
        given = {key: value for key, value in os.environ.items() if key != "FEDLORU_STORE"}
        hosts = {HOST, "localhost", self.host}
        direct = {key: ",".join(filter(None, [given.get(key), *sorted(hosts)])) for key in ("no_proxy", "NO_PROXY")}
        settings = {
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
            "PATH": f"{_BIN}{os.pathsep}{given.get('PATH', os.defpath)}",  # they find each other by it
            "PYTHONUNBUFFERED": "1",
        }
        return {**given, **direct, **settings}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _script(name: str) -> str:
    """A command of the Flower that this Python imports."""
    return str(_BIN / name)


def _toml(value: Value) -> str:
    """A value as node configs have it; text in double quotes."""
    return json.dumps(value)
