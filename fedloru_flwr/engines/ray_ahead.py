"""A Ray of a run's own, started while the run is still being checked: its workers are warm when they are needed.

By itself Flower starts Ray late, in the process that has just imported the ServerApp, and gives its workers a runtime
environment, for which Ray puts aside those it has started and starts others. Here Ray is started by a process of its
own; its workers import what they will need, and the simulation joins it through Ray's hook for runtime environments.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]

_READY = "FEDLORU_RAY"  # names the file that says where Ray is
_HOOK = "RAY_RUNTIME_ENV_HOOK"
_HOLDER = "FEDLORU_RAY_PID"  # the process that holds it
_UV = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"  # under `uv run`, Ray would take a hook of its own instead
_START_SECONDS = 120.0
_POLL_SECONDS = 0.05


@contextlib.contextmanager
def ray_ahead(num_cpus: int | None, modules: Sequence[str], environment: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Begin to start Ray, and yield the variables with which `run_on_flower` joins it; end it on leaving.

    The ClientApp must be importable on the caller's own path, as an installed package is.

    Where the caller's environment names a cluster or has a hook of its own, nothing is started, and there are none.

    Args:
        num_cpus: CPUs that Ray is told it has, by default those it finds.
        modules: what each worker imports at its start.
        environment: variables for the workers, over the caller's.
    """
    from fedloru_flwr.engines.flower import owned_processes

    if os.environ.get("RAY_ADDRESS", "local") != "local" or _HOOK in os.environ:
        yield {}
        return
    with owned_processes(grace=0) as own:  # Ray has nothing to save
        ready = own.scratch / "ray.json"
        env = own.environment(own.scratch, environment)
        env["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        env["RAY_preload_python_modules"] = ",".join(modules)
        arguments = json.dumps({"num_cpus": num_cpus})
        with (own.scratch / "ray.log").open("w", encoding="utf-8") as log:
            holder = own.start([sys.executable, "-P", "-m", __name__, str(ready), arguments], env, stdout=log.fileno())
        yield {
            "RAY_ADDRESS": "",
            _READY: str(ready),
            _HOLDER: str(holder.pid),
            _HOOK: f"{__name__}.{join.__name__}",
            _UV: "0",
        }


def join(runtime_env: dict[str, Any] | None) -> dict[str, Any] | None:
    """Ray's hook, which it calls before it looks for its address: wait for the run's Ray and say where it is.

    The module path is left out of the runtime environment: for the sake of it Ray would start other workers.

    Raises:
        RuntimeError: Ray has not started.
    """
    path = Path(os.environ[_READY])
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        if time.monotonic() > deadline or not _is_alive(int(os.environ[_HOLDER])):
            when = f"in {_START_SECONDS:g} seconds" if time.monotonic() > deadline else "before its process ended"
            raise RuntimeError(f"Ray did not start {when}:\n{_log_end(path)}")
        time.sleep(_POLL_SECONDS)
    told = json.loads(path.read_text(encoding="utf-8"))
    if "error" in told:
        raise RuntimeError(f"Ray did not start: {told['error']}")
    os.environ["RAY_ADDRESS"] = told["address"]
    variables = {key: value for key, value in (runtime_env or {}).get("env_vars", {}).items() if key != "PYTHONPATH"}
    rest = {key: value for key, value in (runtime_env or {}).items() if key != "env_vars"}
    return {**rest, **({"env_vars": variables} if variables else {})} or None


def _is_alive(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def _log_end(ready: Path) -> str:
    """What the process that starts Ray said last."""
    try:
        lines = ready.with_suffix(".log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join(lines[-20:])


def _hold(ready: Path, arguments: Mapping[str, Any]) -> None:
    """Start Ray, write down where it is, and stay until ended."""
    try:
        import ray

        ray.init(address="local", include_dashboard=False, log_to_driver=False, **arguments)
        told = {"address": ray.get_runtime_context().gcs_address}
    except Exception as error:
        told = {"error": str(error)}
    part = ready.with_suffix(".part")
    part.write_text(json.dumps(told), encoding="utf-8")
    part.replace(ready)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    _hold(Path(sys.argv[1]), json.loads(sys.argv[2]))
