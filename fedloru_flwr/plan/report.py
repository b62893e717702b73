"""A plan as tables for the terminal."""

from collections.abc import Iterator
from dataclasses import fields

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedloru_flwr.plan.planning import MethodPlan, Plan, grouped
from fedloru_flwr.runs.units import format_bytes, format_duration

_UNKNOWN = "?"
_NAME_WIDTH = 12


def as_tables(plan: Plan) -> RenderableType:
    """The plan's figures: the settings' own method in full, and all methods side by side where there are others."""
    return Group(*_parts(plan))


def _parts(plan: Plan) -> Iterator[RenderableType]:
    config, own = plan.config, plan.methods[0]
    yield Text(
        f"{plan.subject}: {plan.model_parameters:,} parameters, {format_bytes(plan.model_bytes)}\n"
        f"{config.num_server_rounds} rounds, {config.num_clients} clients, {config.fraction_train:g} of them a round\n"
    )
    if own.stopped:
        limit = format_bytes(config.max_total_bytes)
        yield Text(f"max-total-bytes = {limit} stops {own.algorithm} after round {len(own.rounds)}\n")
    yield _methods(plan)
    yield _layers(own)
    yield _catch_up(own)
    yield _memory(own)
    yield _transfers(plan)
    for method in plan.methods:
        if method.left_out:
            yield Text(f"{method.algorithm}: planned without {', '.join(method.left_out)}, which it does not have")
    for algorithm, reason in plan.refused.items():
        yield Text(f"{algorithm}: cannot be planned: {reason}")
    yield Text("Taken for granted:")
    for assumption in plan.assumptions:
        yield Text(f"  - {assumption}")


def _table(title: str, first: str, *columns: str) -> Table:
    """A table whose first column is folded where the terminal is narrow, so that nothing is lost; numbers never are."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", padding=0)
    table.add_column(first, overflow="fold", min_width=_NAME_WIDTH)
    for column in columns:
        table.add_column(column.replace(" ", "\n", 1), justify="right", no_wrap=True)
    return table


def _methods(plan: Plan) -> Table:
    table = _table(
        "Bytes", "method", "sent numbers", "up a round", "down a round", "up in all", "down in all", "rounds"
    )
    for method in plan.methods:
        count = len(method.rounds)
        table.add_row(
            method.algorithm,
            f"{method.trainable_parameters:,}",
            format_bytes(method.bytes_up / count),
            format_bytes(method.bytes_down / count),
            format_bytes(method.bytes_up),
            format_bytes(method.bytes_down),
            f"{count}",
        )
    return table


def _layers(method: MethodPlan) -> Table:
    table = _table(
        f"{method.algorithm}: what is trained", "layer", "times", "kind", "shape", "rank", "numbers", "of", "in all"
    )
    for name, count, layer in grouped(method.layers):
        table.add_row(
            name,
            str(count),
            layer.kind,
            " x ".join(map(str, layer.shape)) or "1",
            str(layer.rank) if layer.rank else "",
            f"{layer.trainable:,}",
            f"{layer.parameters:,}",
            f"{count * layer.trainable:,}",
        )
    return table


def _catch_up(method: MethodPlan) -> Table:
    table = _table(f"{method.algorithm}: catching up", "rounds away", "accumulations missed", "sent", "as")
    for one in method.catch_up:
        way = ("the base" if one.as_base else "entries") if one.entries else "-"
        table.add_row(str(one.rounds), str(one.entries), format_bytes(one.bytes), way)
    return table


def _memory(method: MethodPlan) -> Table:
    table = _table(f"{method.algorithm}: memory", "where", "what", "bytes")
    for where, memory in (("a client", method.client), ("the server", method.server)):
        for part in fields(memory):
            size = getattr(memory, part.name)
            told = f"{part.name} (estimate)" if part.name == "activations" else part.name
            table.add_row(where, told, _UNKNOWN if size is None else format_bytes(size))
        known = format_bytes(memory.at_least)
        table.add_row(where, "in all", known if memory.total is not None else f"more than {known}", end_section=True)
    return table


def _transfers(plan: Plan) -> Table:
    table = _table("Transfer times", "method", "Mbit/s down/up", "longest round", "run")
    for method in plan.methods:
        for one in method.transfers:
            longest, run = (_seconds(value) for value in (one.longest_round, one.run))
            table.add_row(method.algorithm, str(one.bandwidth), longest, run)
    return table


def _seconds(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 10 else format_duration(seconds)
