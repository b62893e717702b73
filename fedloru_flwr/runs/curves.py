"""The picture of a run: accuracy against rounds, and against what was sent."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedloru_flwr import atomic
from fedloru_flwr.runs.units import format_bytes, format_ratio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]

# Okabe and Ito's palette, which the colour-blind can tell apart; line styles tell the runs apart in grey.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1.5, 1, 1.5)), (0, (2.5, 1)))
_GREY, _INK = "#80858F", "#30343B"
_TICK_HEIGHT, _TICK_WIDTH = 12, 1.2  # points
_LOG_FROM = 8.0  # ratio of the totals from which a linear axis would squeeze the smallest


class _Curve(NamedTuple):
    """One run's points, where it was evaluated, and ticks, where its ledger grew."""

    label: str
    colour: str
    style: Any
    rounds: list[int]
    megabytes: list[float]  # sent, up plus down, until the end of the round
    values: list[float]
    tick_rounds: list[int]
    tick_megabytes: list[float]


def draw_curves(
    runs: Rows | Mapping[str, Rows],
    title: str,
    path: str | os.PathLike[str],
    *,
    fedavg_bytes: float | None = None,
) -> None:
    """Draw one run, or several by label, as a PNG of two panels; the same bytes for the same numbers.

    Left: accuracy against rounds. Right: accuracy against the megabytes sent so far, up plus down, on a log scale if
    the totals differ much. A thin vertical tick on a curve marks an accumulation. Loss takes the place of accuracy
    where no run has any.

    Args:
        runs: the rows of ``metrics.jsonl``.
        title: above the panels; may be empty.
        path: the PNG.
        fedavg_bytes: what full-rank FedAvg would have sent in all, drawn as a vertical line in the right panel.
    """
    # Drawing is rare and the import takes a second. The figure stands alone: pyplot's list of figures, its backend
    # and its settings remain the user's.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator

    by_label = runs if isinstance(runs, Mapping) else {"": runs}
    rows = [row for run in by_label.values() for row in run]
    metric = "accuracy" if any(row["accuracy"] is not None for row in rows) else "loss"
    curves = [_curve(number, label, run, metric) for number, (label, run) in enumerate(by_label.items())]
    curves = [curve for curve in curves if curve.rounds]

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1, wspace=0.03)
    figure = Figure(figsize=(11, 4.5), dpi=150, facecolor="white", layout=layout)
    left, right = figure.subplots(1, 2, sharey=True)
    if title:
        figure.suptitle(title, fontsize=13, fontweight="bold", color=_INK)
    for axes in (left, right):
        _prepare(axes)
    left.set_ylabel(metric, fontsize=11, color=_INK)
    left.set_xlabel("round", fontsize=11, color=_INK)
    left.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=[1, 2, 5, 10], integer=True))
    left.yaxis.set_major_locator(MaxNLocator(nbins=9, steps=[1, 2, 5, 10]))
    right.set_xlabel("sent so far, up plus down (MB)", fontsize=11, color=_INK)

    if curves:
        _draw_panel(left, [(curve, curve.rounds, curve.tick_rounds) for curve in curves])
        _scale_bytes(right, curves, fedavg_bytes)
        _draw_panel(right, [(curve, curve.megabytes, curve.tick_megabytes) for curve in curves])
        if fedavg_bytes:
            _mark_fedavg(right, curves, fedavg_bytes)
        _add_legend(left, curves, "lower right" if metric == "accuracy" else "upper right")
    else:
        for axes in (left, right):
            axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color=_GREY)

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    atomic.write_bytes(path, buffer.getvalue())


def _curve(number: int, label: str, rows: Rows, metric: str) -> _Curve:
    style = _STYLES[number % len(_STYLES)]
    curve = _Curve(label, _COLOURS[number % len(_COLOURS)], style, [], [], [], [], [])
    megabytes, version = 0.0, 0
    for row in rows:
        megabytes += (row["bytes_up"] + row["bytes_down"]) / 1e6
        if row[metric] is not None:
            curve.rounds.append(row["round"])
            curve.megabytes.append(megabytes)
            curve.values.append(row[metric])
        if row["ledger_version"] > version:
            curve.tick_rounds.append(row["round"])
            curve.tick_megabytes.append(megabytes)
        version = row["ledger_version"]
    return curve


def _prepare(axes: Axes) -> None:
    axes.set_axisbelow(True)
    axes.minorticks_on()
    axes.margins(x=0.04, y=0.1)
    axes.grid(which="major", color="#DADDE2", linewidth=0.7)
    axes.grid(which="minor", color="#EEF0F3", linewidth=0.5)
    axes.tick_params(which="both", color="#B5BAC2", labelcolor=_INK, labelsize=9.5)
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#B5BAC2")


def _draw_panel(axes: Axes, drawn: list[tuple[_Curve, Sequence[float], Sequence[float]]]) -> None:
    for curve, xs, ticks in drawn:
        heights = np.interp(ticks, xs, curve.values)
        line = {"color": curve.colour, "linestyle": curve.style, "linewidth": 1.9, "solid_capstyle": "round"}
        axes.plot(xs, curve.values, **line)
        axes.plot(
            ticks,
            heights,
            linestyle="",
            marker="|",
            color=curve.colour,
            markersize=_TICK_HEIGHT,
            markeredgewidth=_TICK_WIDTH,
        )
        axes.plot(xs[-1:], curve.values[-1:], marker="o", markersize=4.5, color=curve.colour)
        if len(drawn) == 1:
            _label_end(axes, xs[-1], curve.values[-1], curve.colour)


def _label_end(axes: Axes, x: float, value: float, colour: str) -> None:
    axes.annotate(
        f"{value:.3f}",
        (x, value),
        xytext=(0, 9),
        textcoords="offset points",
        ha="center",
        fontsize=9.5,
        fontweight="bold",
        color=colour,
    )


def _scale_bytes(axes: Axes, curves: list[_Curve], fedavg_bytes: float | None) -> None:
    """Take the log scale where the smallest total would be squeezed; the origin has no place on it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    totals = [curve.megabytes[-1] for curve in curves if curve.megabytes[-1] > 0]
    if not totals:
        return
    largest = max([*totals, (fedavg_bytes or 0) / 1e6])
    if largest < _LOG_FROM * min(totals):
        axes.set_xlim(0, largest * 1.06)
        return
    smallest = min(next(x for x in curve.megabytes if x > 0) for curve in curves if curve.megabytes[-1] > 0)
    axes.set_xscale("log", nonpositive="mask")
    axes.set_xlim(smallest / 1.3, largest * 1.6)
    labelled = (1.0,) if largest > 100 * smallest else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(subs=labelled))
    axes.xaxis.set_minor_locator(LogLocator(subs=range(2, 10)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _mark_fedavg(axes: Axes, curves: list[_Curve], fedavg_bytes: float) -> None:
    x = fedavg_bytes / 1e6
    axes.axvline(x, color=_GREY, linestyle=(0, (4, 2)), linewidth=1.2)
    axes.annotate(
        f"full-rank FedAvg, as many rounds: {format_bytes(fedavg_bytes)}",
        (x, 0.04),
        xycoords=("data", "axes fraction"),
        xytext=(-5, 0),
        textcoords="offset points",
        ha="right",
        va="bottom",
        rotation=90,
        fontsize=9,
        color=_GREY,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
    )
    end = curves[0].megabytes[-1]
    if len(curves) == 1 and 0 < end < x / 1.5:
        height = curves[0].values[-1]
        arrow = {"arrowstyle": "<-", "color": _GREY, "linewidth": 0.9, "shrinkA": 5, "shrinkB": 1}
        axes.annotate("", (end, height), xytext=(x, height), arrowprops=arrow)
        middle = (end * x) ** 0.5 if axes.get_xscale() == "log" else (end + x) / 2
        axes.annotate(
            f"{format_ratio(x / end)} less",
            (middle, height),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            color=_GREY,
        )


def _add_legend(axes: Axes, curves: list[_Curve], place: str) -> None:
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], color=curve.colour, linestyle=curve.style, linewidth=1.9, label=curve.label)
        for curve in curves
        if curve.label
    ]
    if any(curve.tick_rounds for curve in curves):
        colour = curves[0].colour if len(curves) == 1 else _INK
        entries.append(
            Line2D(
                [],
                [],
                linestyle="",
                color=colour,
                label="accumulation",
                marker="|",
                markersize=_TICK_HEIGHT,
                markeredgewidth=_TICK_WIDTH,
            )
        )
    if entries:
        axes.legend(handles=entries, loc=place, fontsize=9.5, frameon=True, framealpha=0.9, edgecolor="none")
