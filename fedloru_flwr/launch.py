"""`fedloru run` as a Python function: settings in, summary out, whatever the engine."""

import contextlib
import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self, get_args

from fedloru_flwr.config import PRETRAINED, ConfigError, RunConfig, read_config_file
from fedloru_flwr.engines.ray_ahead import ray_ahead
from fedloru_flwr.engines.workers import Workers
from fedloru_flwr.environment import DATA, STORE, SUPERNODES
from fedloru_flwr.suggest import did_you_mean

Engine = Literal["flower", "in-process"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
_CLIENT_APP = "fedloru_flwr.client_app"


def engine_named(name: str) -> Engine:
    """The engine of that name.

    Raises:
        ConfigError: there is none.
    """
    for engine in ENGINES:
        if engine == name:
            return engine
    raise ConfigError(f"engine = {name!r} is not one of {', '.join(ENGINES)}{did_you_mean(name, ENGINES)}")


class RunFailedError(RuntimeError):
    """A run started and did not finish; its state up to the last checkpoint is in its directory."""


def run(
    conf: str | os.PathLike[str] | None = None,
    config: Mapping[str, object] | None = None,
    *,
    engine: Engine = "flower",
    resume: str = "",
    num_actors: int | None = None,
    num_supernodes: int | None = None,
    gpus_per_client: float = 0.0,
    on_line: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run one job to its end and return its summary.

    Args:
        conf: a CONF.toml with settings; absent ones take their defaults.
        config: settings that go over the file's.
        engine: ``"flower"`` drives ``flwr run`` on Ray with a private Flower home; ``"in-process"`` runs the same apps
            in this process.
        resume: ``"auto"`` or a run's directory, see the setting of that name.
        num_actors: processes that train: Ray workers, by default one a CPU; of the engine in-process, by default 1,
            this one.
        num_supernodes: SuperNodes of the simulation (engine flower): by default one a client; with fewer, each trains
            many clients as one batch. One a worker is fastest.
        gpus_per_client: GPUs a Ray worker counts for (engine flower), a fraction to share one.
        on_line: gets the lines the run prints (engine flower).

    Returns:
        What ``summary.json`` holds, and under ``"run_dir"`` where.

    Raises:
        ValueError: a setting makes no sense; no client was started.
        RunFailedError: the run failed; what it had saved is in its directory.
    """
    settings = dict(read_config_file(Path(conf))) if conf is not None else {}
    settings |= dict(config or {})
    if resume:
        settings["resume"] = resume
    checked = RunConfig.from_mapping(settings)
    if checked.dataset == "clients":
        raise ConfigError(
            "dataset = 'clients' is for a deployment, whose SuperNodes have data; this would simulate them"
        )
    engine_named(engine)
    if num_actors is not None and num_actors < 1:
        raise ValueError(f"num-actors must be at least 1, got {num_actors}")
    if num_supernodes is not None and num_supernodes < 1:
        raise ValueError(f"num-supernodes must be at least 1, got {num_supernodes}")
    resolved = _resolve(checked)
    others = (num_actors or 1) - 1 if engine == "in-process" else 0
    # What takes seconds to start begins to start first; torch is imported and the settings are checked meanwhile.
    with _private_matplotlib(), Workers(others) as workers, contextlib.ExitStack() as stack:
        continued = None
        if resolved.resume:
            from fedloru_flwr.job import recorded_settings, recorded_supernodes, run_to_continue

            continued = run_to_continue(resolved)
        if continued is not None:
            # What is not said anew is as it was when the run began.
            resolved = _resolve(RunConfig.from_mapping({**recorded_settings(continued), **settings}))
            num_supernodes = num_supernodes or recorded_supernodes(continued)
        elif not resolved.run_name:
            # To the millisecond: runs that are started together get names of their own.
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]
            resolved = dataclasses.replace(resolved, run_name=stamp)
        path = continued.path if continued is not None else Path(resolved.output_dir) / resolved.run_name
        # What the clients hold lives as long as the run may be continued.
        store = path / "store"
        simulation = None
        if engine == "flower":
            supernodes = min(num_supernodes or resolved.num_clients, resolved.num_clients)
            simulation = stack.enter_context(_Simulation(store, num_actors, supernodes, gpus_per_client))

        from fedloru_flwr.job import check

        check(resolved)
        try:
            if simulation is None:
                _run_in_process(resolved, store, workers)
            else:
                simulation.run(resolved, on_line)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what the run saved is in {path}; continue: fedloru run --resume {path}") from None
        except Exception as error:
            raise RunFailedError(f"{error}\nWhat the run saved is in {path}") from error
    from fedloru_flwr.runs import RunDirectory

    summary = RunDirectory.open(path).read_summary()
    if summary is None:
        raise RunFailedError(f"the run ended without a summary; what it saved is in {path}")
    # The run may be continued with more rounds: what clients have of their own is kept, the rest can be sent again; not
    # after a limit on bytes.
    for part in ("bases", "entries", "clients") if summary["status"] != "stopped" else ():
        shutil.rmtree(store / part, ignore_errors=True)
    with contextlib.suppress(OSError):
        store.rmdir()
    return {**summary, "run_dir": str(path)}


def _resolve(config: RunConfig) -> RunConfig:
    """Make paths absolute, since other processes run elsewhere."""
    settings: dict[str, object] = dict(config.as_mapping())
    output_dir = Path(config.output_dir).expanduser().absolute()
    settings["output-dir"] = str(output_dir)
    if config.data_path:
        settings["data-path"] = str(Path(config.data_path).expanduser().absolute())
    if config.pretrained and Path(config.pretrained).expanduser().is_dir():
        settings["model"] = f"{PRETRAINED}{Path(config.pretrained).expanduser().absolute()}"
    if config.init_adapter:
        settings["init-adapter"] = str(Path(config.init_adapter).expanduser().absolute())
    if config.resume not in ("", "auto"):
        settings["resume"] = str(Path(config.resume).expanduser().absolute())
    return RunConfig.from_mapping(settings)


def _run_in_process(config: RunConfig, store: Path, workers: Workers) -> None:
    from fedloru_flwr.engines.in_process import serve, store_at
    from fedloru_flwr.engines.processes import ProcessGrid
    from fedloru_flwr.server_app import app as server_app

    settings = config.as_mapping()
    with store_at(store) as where, tempfile.TemporaryDirectory(prefix="fedloru-data-") as directory:
        data = {DATA: str(Path(directory) / "data.safetensors")}
        if workers.members:
            _share_data(config, Path(data[DATA]))
        grid = ProcessGrid(workers, config.num_clients, settings, config.clients_per_batch, {**where, **data})
        serve(server_app, grid, settings)


class _Simulation(contextlib.ExitStack):
    """A simulation on Flower: on entering its Ray begins to start, of which nothing depends on what is checked yet."""

    def __init__(self, store: Path, num_actors: int | None, supernodes: int, gpus_per_client: float) -> None:
        super().__init__()
        self._store = store
        self._num_actors = num_actors
        self._supernodes = supernodes
        self._gpus_per_client = gpus_per_client

    def __enter__(self) -> Self:
        """Begin to start Ray."""
        super().__enter__()
        self._data = Path(self.enter_context(tempfile.TemporaryDirectory(prefix="fedloru-data-"))) / "data.safetensors"
        self._variables = {
            "MPLCONFIGDIR": os.environ["MPLCONFIGDIR"],
            STORE: str(self._store),
            SUPERNODES: str(self._supernodes),
            DATA: str(self._data),
        }
        self._ray = self.enter_context(contextlib.ExitStack())
        self._start_ray()
        return self

    def _start_ray(self) -> None:
        """Begin to start a Ray, in place of the one there was."""
        self._ray.close()
        self._joining = self._ray.enter_context(ray_ahead(self._num_actors, [_CLIENT_APP], self._variables))

    def run(self, config: RunConfig, on_line: Callable[[str], None]) -> None:
        """Run the job to its end.

        Raises:
            RuntimeError: it failed, and why.
        """
        from fedloru_flwr.engines.app_dir import flower_app
        from fedloru_flwr.engines.flower import run_on_flower
        from fedloru_flwr.runs import RunDirectory

        run = RunDirectory(self._store.parent)
        rounds_before = -1
        _share_data(config, self._data)
        with flower_app() as app_dir:
            while True:
                outcome = run_on_flower(
                    app_dir,
                    config.as_mapping(),
                    num_supernodes=self._supernodes,
                    client_num_gpus=self._gpus_per_client,
                    ray_num_cpus=self._num_actors,
                    environment={**self._variables, **self._joining},
                    on_line=on_line,
                )
                if outcome.completed:
                    return
                summary = run.read_summary() or {}
                if not str(summary.get("error", "")).startswith("WorkerDiedError"):
                    raise RuntimeError(f"the run ended as {outcome.status}: {outcome.details}")
                workers = self._num_actors or _cpus_of_ray()
                if summary["rounds"] <= rounds_before:
                    # Again in the same round: fewer workers need less memory. A cluster's are not ours to choose.
                    if workers == 1 or os.environ.get("RAY_ADDRESS", "local") != "local":
                        raise RuntimeError(summary["error"])
                    self._num_actors = workers // 2
                rounds_before = summary["rounds"]
                on_line(
                    f"a worker has died in round {rounds_before + 1}: going on from round {rounds_before} in a new "
                    f"simulation with {self._num_actors or workers} workers"
                )
                config = dataclasses.replace(config, resume=str(run.path))
                self._start_ray()


def _share_data(config: RunConfig, path: Path) -> None:
    """Spare the run's other processes the reading and partitioning, where there is room for the file."""
    from fedloru_flwr.data import share
    from fedloru_flwr.workload import data_config

    share(data_config(config), path)


def _cpus_of_ray() -> int:
    """As many as Ray starts workers by itself: those of the container, not of the machine."""
    from ray._private.utils import get_num_cpus

    return max(1, int(get_num_cpus()))


@contextmanager
def _private_matplotlib() -> Iterator[None]:
    """Matplotlib writes a font cache; keep it out of the user's home unless they have chosen a place."""
    if "MPLCONFIGDIR" in os.environ:
        yield
        return
    cache = tempfile.mkdtemp(prefix="fedloru-matplotlib-")
    os.environ["MPLCONFIGDIR"] = cache
    try:
        yield
    finally:
        del os.environ["MPLCONFIGDIR"]
        shutil.rmtree(cache, ignore_errors=True)
