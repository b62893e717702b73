"""`fedloru run` as a Python function: settings in, summary out, whatever the engine."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedloru_flwr.config import RunConfig, read_config_file
from fedloru_flwr.runs import RunDirectory

Engine = Literal["flower", "in-process"]
ENGINES: tuple[Engine, ...] = ("flower", "in-process")


class RunFailedError(RuntimeError):
    """A run started and did not finish; its state up to the last checkpoint is in its directory."""


def run(
    conf: str | os.PathLike[str] | None = None,
    config: Mapping[str, object] | None = None,
    *,
    engine: Engine = "flower",
    resume: str = "",
    num_actors: int | None = None,
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
        num_actors: Ray workers (engine flower); by default one a CPU.
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
    if engine not in ENGINES:
        raise ValueError(f"engine = {engine!r} is not one of {', '.join(ENGINES)}")
    if num_actors is not None and num_actors < 1:
        raise ValueError(f"num-actors must be at least 1, got {num_actors}")
    resolved = _resolve(checked)
    with _private_matplotlib():
        from fedloru_flwr.job import check, directory_path

        check(resolved)
        path = directory_path(resolved)
        if engine == "in-process":
            _run_in_process(resolved)
        else:
            _run_on_flower(resolved, path, num_actors, gpus_per_client, on_line)
    summary = RunDirectory.open(path).read_summary()
    if summary is None:
        raise RunFailedError(f"the run ended without a summary; what it saved is in {path}")
    return {**summary, "run_dir": str(path)}


def _resolve(config: RunConfig) -> RunConfig:
    """Make paths absolute, since other processes run elsewhere, and fix the run's name before anything starts."""
    settings: dict[str, object] = dict(config.as_mapping())
    output_dir = Path(config.output_dir).expanduser().absolute()
    settings["output-dir"] = str(output_dir)
    if config.data_path:
        settings["data-path"] = str(Path(config.data_path).expanduser().absolute())
    if config.resume not in ("", "auto"):
        settings["resume"] = str(Path(config.resume).expanduser().absolute())
    elif not config.run_name and config.resume != "auto":
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        names = (stamp if number == 1 else f"{stamp}-{number}" for number in range(1, 10_000))
        settings["run-name"] = next(name for name in names if not (output_dir / name).exists())
    return RunConfig.from_mapping(settings)


def _run_in_process(config: RunConfig) -> None:
    from fedloru_flwr.client_app import app as client_app
    from fedloru_flwr.engines.in_process import run_in_process
    from fedloru_flwr.server_app import app as server_app

    run_in_process(server_app, client_app, num_supernodes=config.num_clients, run_config=config.as_mapping())


def _run_on_flower(
    config: RunConfig,
    path: Path,
    num_actors: int | None,
    gpus_per_client: float,
    on_line: Callable[[str], None],
) -> None:
    from fedloru_flwr.engines.app_dir import flower_app
    from fedloru_flwr.engines.flower import FlowerError, run_on_flower

    with flower_app() as app_dir:
        try:
            outcome = run_on_flower(
                app_dir,
                config.as_mapping(),
                num_supernodes=config.num_clients,
                client_num_gpus=gpus_per_client,
                ray_num_cpus=num_actors,
                environment={"MPLCONFIGDIR": os.environ["MPLCONFIGDIR"]},
                on_line=on_line,
            )
        except FlowerError as error:
            raise RunFailedError(str(error)) from error
    if not outcome.completed:
        raise RunFailedError(f"the run ended as {outcome.status} ({outcome.details}); what it saved is in {path}")


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
