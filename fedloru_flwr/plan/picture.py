"""A plan as a picture: bytes and a client's memory, method by method."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedloru_flwr import atomic
from fedloru_flwr.compare.drawing import COLOURS, INK, as_picture
from fedloru_flwr.config import ConfigError
from fedloru_flwr.plan.planning import Plan
from fedloru_flwr.runs.units import format_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FORMATS = (".svg", ".png")


def check_picture(path: str | os.PathLike[str]) -> None:
    """Refuse a file that `draw_plan` could not write.

    Raises:
        ConfigError: its name ends in neither ``.svg`` nor ``.png``, or its directory is not there.
    """
    if Path(path).suffix not in _FORMATS:
        raise ConfigError(f"picture = {os.fspath(path)!r}: expected a file name that ends in {' or '.join(_FORMATS)}")
    if not Path(path).absolute().parent.is_dir():
        raise ConfigError(f"picture = {os.fspath(path)!r}: there is no directory {Path(path).absolute().parent}")


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Draw a plan as SVG or PNG, by the file's name; the same bytes for the same plan.

    Left: bytes down and up in the whole run, a bar for each method. Right: a client's memory by part.

    Raises:
        ConfigError: see `check_picture`.
    """
    check_picture(path)
    # The import takes a second; the figure stands alone, without pyplot's state.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    names = [method.algorithm for method in plan.methods]
    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03)
    size = (11, 1.6 + 0.34 * max(3, len(names)))
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout=layout)
    left, right = figure.subplots(1, 2)
    rounds = plan.config.num_server_rounds
    told = f"{plan.subject}: {rounds} rounds, {plan.config.num_clients} clients"
    figure.suptitle(told, fontsize=13, fontweight="bold", color=INK)
    methods = plan.methods
    _bars(
        left,
        "sent in the whole run",
        names,
        {"down": [one.bytes_down for one in methods], "up": [one.bytes_up for one in methods]},
    )
    parts = tuple(vars(methods[0].client))
    _bars(
        right,
        "memory of a client (activations estimated)",
        names,
        {part: [getattr(method.client, part) or 0 for method in methods] for part in parts},
        [method.client.total is not None for method in methods],
    )
    atomic.write_bytes(path, as_picture(figure, "svg" if Path(path).suffix == ".svg" else "png"))


def _bars(
    axes: "Axes", title: str, names: Sequence[str], parts: dict[str, list[int]], whole: Sequence[bool] = ()
) -> None:
    """Stacked bars, the first name on top, each with its sum at the end, as "more than" where it is not the whole."""
    from matplotlib.ticker import MaxNLocator

    ends = [0] * len(names)
    places = range(len(names))
    for colour, (part, sizes) in zip(COLOURS, parts.items(), strict=False):
        if any(sizes):
            axes.barh(places, sizes, left=ends, color=colour, label=part, height=0.7)
            ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    for place, end in zip(places, ends, strict=True):
        told = format_bytes(end) if not whole or whole[place] else f"more than {format_bytes(end)}"
        axes.annotate(told, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8.5)
    axes.set_yticks(list(places), list(names), fontsize=9.5, color=INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.18 * max([*ends, 1]))
    axes.set_title(title, fontsize=10.5, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    axes.tick_params(axis="x", labelsize=8.5, labelcolor=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(fontsize=8.5, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.06), ncols=3)
