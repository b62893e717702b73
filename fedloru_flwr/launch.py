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
from typing import Any, Literal, get_args

from fedloru_flwr.config import ConfigError, RunConfig, read_config_file
from fedloru_flwr.engines.workers import Workers
from fedloru_flwr.runs import RunDirectory
from fedloru_flwr.suggest import did_you_mean

Engine = Literal["flower", "in-process"]
ENGINES: tuple[Engine, ...] = get_args(Engine)


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
        ValueError: a setting makes no sense; nothing was started.
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
    others = (num_actors or 1) - 1 if engine == "in-process" else 0
    with _private_matplotlib(), Workers(others) as workers:
        from fedloru_flwr.job import check, recorded_settings, run_to_continue

        resolved = _resolve(checked)
        if (continued := run_to_continue(resolved)) is not None:
            # What is not said anew is as it was when the run began.
            resolved = _resolve(RunConfig.from_mapping({**recorded_settings(continued), **settings}))
        elif not resolved.run_name:
            # To the millisecond: runs that are started together get names of their own.
            stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")[:-3]
            resolved = dataclasses.replace(resolved, run_name=stamp)
        check(resolved)
        path = continued.path if continued is not None else Path(resolved.output_dir) / resolved.run_name
        # What the clients hold lives as long as the run may be continued.
        store = path / "store"
        try:
            if engine == "in-process":
                _run_in_process(resolved, store, workers)
            else:
                _run_on_flower(resolved, store, num_actors, num_supernodes, gpus_per_client, on_line)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"what the run saved is in {path}; continue: fedloru run --resume {path}") from None
        except Exception as error:
            raise RunFailedError(f"{error}\nWhat the run saved is in {path}") from error
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
    with store_at(store) as where, _shared_data(config, bool(workers.members)) as data:
        grid = ProcessGrid(workers, config.num_clients, settings, config.clients_per_batch, {**where, **data})
        serve(server_app, grid, settings)


def _run_on_flower(
    config: RunConfig,
    store: Path,
    num_actors: int | None,
    num_supernodes: int | None,
    gpus_per_client: float,
    on_line: Callable[[str], None],
) -> None:
    from fedloru_flwr.engines.app_dir import flower_app
    from fedloru_flwr.engines.flower import run_on_flower
    from fedloru_flwr.engines.hosted import SUPERNODES

    supernodes = min(num_supernodes or config.num_clients, config.num_clients)
    run = RunDirectory(store.parent)
    rounds_before = -1
    with flower_app() as app_dir, _shared_data(config, True) as data:
        while True:
            outcome = run_on_flower(
                app_dir,
                config.as_mapping(),
                num_supernodes=supernodes,
                client_num_gpus=gpus_per_client,
                ray_num_cpus=num_actors,
                environment={
                    "MPLCONFIGDIR": os.environ["MPLCONFIGDIR"],
                    "FEDLORU_STORE": str(store),
                    SUPERNODES: str(supernodes),
                    **data,
                },
                on_line=on_line,
            )
            if outcome.completed:
                return
            summary = run.read_summary() or {}
            if not str(summary.get("error", "")).startswith("WorkerDiedError"):
                raise RuntimeError(f"the run ended as {outcome.status}: {outcome.details}")
            workers = num_actors or _cpus_of_ray()
            if summary["rounds"] <= rounds_before:
                # Again in the same round: fewer workers need less memory. A cluster's are not ours to choose.
                if workers == 1 or os.environ.get("RAY_ADDRESS", "local") != "local":
                    raise RuntimeError(summary["error"])
                num_actors = workers // 2
            rounds_before = summary["rounds"]
            on_line(
                f"a worker has died in round {rounds_before + 1}: going on from round {rounds_before} in a new "
                f"simulation with {num_actors or workers} workers"
            )
            config = dataclasses.replace(config, resume=str(run.path))


@contextmanager
def _shared_data(config: RunConfig, wanted: bool) -> Iterator[dict[str, str]]:
    """Spare the run's other processes the reading and partitioning; yield the variables that tell them of the file."""
    if not wanted:
        yield {}
        return
    from fedloru_flwr.data import share
    from fedloru_flwr.workload import data_config

    with tempfile.TemporaryDirectory(prefix="fedloru-data-") as directory:
        yield share(data_config(config), Path(directory) / "data.safetensors")


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
