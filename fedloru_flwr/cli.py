"""The command ``fedloru``.

Exit status: 0 done, 1 failed (state saved), 2 bad input (nothing started), 130 interrupted (state saved).
"""

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from fedloru_flwr.config import ConfigError, parse_overrides

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def fedloru() -> None:
    """FedLoRU: communication-efficient federated training with low-rank updates, on Flower."""


@app.command()
def run(
    conf: Annotated[Path | None, typer.Argument(help="A TOML file of settings.", show_default=False)] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", help='Settings over the file\'s: "rank=8 learning-rate=0.05".'),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="flower (the default): `flwr run` on Ray; in-process: the same apps in this process.",
            show_default=False,
        ),
    ] = "flower",
    resume: Annotated[str, typer.Option(help="auto, or the directory of a run to continue.", show_default=False)] = "",
    num_actors: Annotated[
        int | None, typer.Option(help="Processes that train: by default one a CPU; in-process one.", show_default=False)
    ] = None,
    num_supernodes: Annotated[
        int | None,
        typer.Option(
            help="SuperNodes of the simulation: by default one a client; one a worker is fastest.", show_default=False
        ),
    ] = None,
    gpus_per_client: Annotated[float, typer.Option(help="GPUs a Ray worker counts for.", show_default=False)] = 0.0,
) -> None:
    """Run one federated training."""
    from fedloru_flwr import launch

    if engine == "in-process":
        # Flower tells of each phase, which the round lines say as well; FLWR_LOG_LEVEL=INFO brings it back.
        os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")

    def work() -> tuple[str, ...]:
        settings: dict[str, object] = {}
        for text in config or []:
            settings |= parse_overrides(text)
        launch.run(
            conf,
            settings,
            engine=launch.engine_named(engine),
            resume=resume,
            num_actors=num_actors,
            num_supernodes=num_supernodes,
            gpus_per_client=gpus_per_client,
            on_line=lambda line: print(line, flush=True),
        )
        return ()

    _judge(work)


@app.command()
def compare(
    conf: Annotated[Path, typer.Argument(help="A TOML file of methods, axes, seeds and grids.", show_default=False)],
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where everything goes; by default runs/compare-<name of CONF>.", show_default=False),
    ] = None,
    engine: Annotated[str, typer.Option(help="in-process, or flower.")] = "in-process",
    jobs: Annotated[
        int | None, typer.Option(help="Runs at a time; by default one a core, on Flower one.", show_default=False)
    ] = None,
) -> None:
    """Run many methods over seeds and axes, or go on with that, and judge them side by side."""
    from fedloru_flwr import launch
    from fedloru_flwr.compare import compare as run_comparison

    def work() -> tuple[str, ...]:
        return run_comparison(conf, output_dir, engine=launch.engine_named(engine), jobs=jobs).failures

    _judge(work)


@app.command()
def plan(
    conf: Annotated[Path | None, typer.Argument(help="A TOML file of settings.", show_default=False)] = None,
    config: Annotated[
        list[str] | None,
        typer.Option("--config", "-c", help='Settings over the file\'s: "rank=8 learning-rate=0.05".'),
    ] = None,
    all_methods: Annotated[bool, typer.Option("--all-methods", help="Every method with these settings.")] = False,
    output: Annotated[str, typer.Option("--format", help="table, or json.")] = "table",
    picture: Annotated[
        Path | None, typer.Option(help="Draw it too, into a file .svg or .png.", show_default=False)
    ] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(help="A client's DOWN/UP in Mbit/s, or DOWN/UP/SERVER; may be given again.  [default: 100/20]"),
    ] = None,
    transformers: Annotated[
        str | None,
        typer.Option(help="A transformers model instead: its config.json, directory or name.", show_default=False),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="Tokens a sample of such a model.")] = 512,
    examples: Annotated[
        int, typer.Option(help="Samples a client trains on where its data is not at hand; 0: 100.")
    ] = 0,
) -> None:
    """Tell what a run will cost before it starts: bytes, memory, transfer times; no weights, no training."""
    os.environ.setdefault("FLWR_LOG_LEVEL", "WARNING")
    from fedloru_flwr.plan.command import show_plan

    def work() -> tuple[str, ...]:
        settings: dict[str, object] = {}
        for text in config or []:
            settings |= parse_overrides(text)
        show_plan(
            conf,
            settings,
            output=output,
            picture=picture,
            bandwidths=bandwidth or ["100/20"],
            all_methods=all_methods,
            transformers=transformers,
            sequence_length=sequence_length,
            examples=examples,
        )
        return ()

    _judge(work)


@app.command()
def report(
    dirs: Annotated[
        list[Path], typer.Argument(help="Output directories of fedloru compare, or run directories.", metavar="DIR...")
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option(help="By default a comparison's own, else report beside the first DIR.", show_default=False),
    ] = None,
) -> None:
    """Write tables and report anew: of a comparison, of several joined, or of runs that stand alone."""
    from fedloru_flwr.compare import report as write_report

    def work() -> tuple[str, ...]:
        write_report(dirs, output_dir)
        return ()

    _judge(work)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run's directory, finished or interrupted.", show_default=False)],
    format: Annotated[
        str, typer.Option(help="peft: one LoRA adapter beside the base; merged: the whole model.")
    ] = "peft",
    rank: Annotated[
        int | None, typer.Option(help="For peft: compress every layer's product to this rank.", show_default=False)
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(
            "--output-dir", "--out", help="By default export/<format> in the run's directory.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="Of a run made by an app of your own: its factory, my_app.task:Net.", show_default=False)
    ] = "",
    inputs: Annotated[
        str,
        typer.Option(help="A function that returns sample inputs, my_app.task:sample_inputs.", show_default=False),
    ] = "",
) -> None:
    """Write a run's model for peft, transformers or plain torch, and prove that they load it."""
    from rich.console import Console

    from fedloru_flwr.export import export as export_run

    def work() -> tuple[str, ...]:
        factory = _named("--model", model) if model else None
        samples = _sample_inputs(inputs) if inputs else None
        exported = export_run(run, format, rank, output_dir, model=factory, inputs=samples)
        console = Console()
        if exported.report["layers"]:
            console.print(exported.table())
        for line in [*exported.lines(), f"exported to: {exported.path}"]:
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        return ()

    _judge(work)


@app.command()
def rank(
    conf: Annotated[
        Path,
        typer.Argument(help="A TOML file of what to train and measure, one of settings, or a run.", show_default=False),
    ],
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Where everything goes; by default runs/rank-<name of CONF>.", show_default=False),
    ] = None,
    advise: Annotated[
        bool, typer.Option("--advise", help="Propose rank, accumulation and layers from a short full-rank pilot.")
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Trainings at a time; by default one a core.", show_default=False)
    ] = None,
) -> None:
    """Measure curvature, similarity of clients and what accumulation builds, or go on with that."""
    from fedloru_flwr.rank import rank as measure

    def work() -> tuple[str, ...]:
        return measure(conf, output_dir, advise=advise, jobs=jobs).failures

    _judge(work)


def _sample_inputs(text: str) -> Any:
    """What the function that ``--inputs`` names returns.

    Raises:
        ConfigError: there is no such function, it fails, or it returns nothing.
    """
    make = _named("--inputs", text)
    if not callable(make):
        raise ConfigError(
            f"--inputs = {text!r} is a {type(make).__name__}: expected a function that returns the inputs"
        )
    try:
        samples = make()
    except Exception as error:  # whatever somebody's function does
        raise ConfigError(
            f"--inputs = {text!r} failed with {type(error).__name__}: {error}; expected a function that takes no "
            "arguments and returns a tensor, a tuple of arguments or a dict of keywords"
        ) from error
    if samples is None:
        raise ConfigError(
            f"--inputs = {text!r} returned None: expected a tensor, a tuple of arguments or a dict of keywords"
        )
    return samples


def _named(option: str, text: str) -> Any:
    """What ``package.module:name`` names, looked for in the directory at hand as well.

    Raises:
        ConfigError: there is no such thing.
    """
    module, _, name = text.partition(":")
    if not module or not name:
        raise ConfigError(f"{option} = {text!r} must be of the form package.module:name")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{option} = {text!r} must be of the form package.module:name: {error}") from error


def _judge(work: Callable[[], tuple[str, ...]]) -> None:
    """Do ``work``, which returns what failed, and end with the status that says so."""
    try:
        failed = work()
    except ValueError as error:
        _fail(error, 2)
    except KeyboardInterrupt as interrupt:
        _fail(f"interrupted; {interrupt}", 130)
    except Exception as error:
        if os.environ.get("FEDLORU_DEBUG"):
            raise
        _fail(error, 1)
    else:
        if failed:
            _fail(f"{len(failed)} failed, the rest is done", 1)


def _fail(error: object, status: int) -> None:
    print(f"fedloru: {error}", file=sys.stderr)
    raise typer.Exit(status)


def main() -> None:
    """Entry point of the console script."""
    app()
