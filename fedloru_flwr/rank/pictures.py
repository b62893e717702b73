"""An analysis in pictures: SVG files that stand alone, the same bytes for the same numbers.

Hollow markers are rounds right after a restart of the factors (and the start), where their product is zero.
"""

import statistics
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from fedloru_flwr.compare.drawing import as_svg, explain, figure_of, looks, picture_name
from fedloru_flwr.rank.perturbation import Simulation

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = Mapping[str, Any]
Lines = Mapping[str, Mapping[int, list[float]]]  # label, round, one value a seed
_SPACE_NAMES = {"full": "all parameters", "adapter": "factors"}


def files(rows: Sequence[Row]) -> dict[str, bytes]:
    """The pictures by file name: stable rank against rounds, and similarity of clients against rounds."""
    found: dict[str, bytes] = {}
    for training in dict.fromkeys(row["label"] for row in rows):
        own = [row for row in rows if row["label"] == training]
        hollow = {row["round"] for row in own if row.get("after_restart")}
        for space, told in _SPACE_NAMES.items():
            lines = _stable_ranks([row for row in own if row.get("space") == space])
            if lines:
                title = f"Stable rank of the Hessian, {told}: {training}"
                found[_name("stable-rank", training, space)] = _drawn(lines, title, "stable rank", hollow, log=True)
        for of in ("gradients", "updates"):
            lines = _similarities([row for row in own if row["kind"] == "similarity" and row["of"] == of])
            if lines:
                title = f"Similarity of clients' {of}: {training}"
                found[_name("similarity", training, of)] = _drawn(
                    lines, title, "cosine between clients", hollow, log=False
                )
    return found


def of_simulation(found: Simulation, title: str) -> dict[str, bytes]:
    """The theorem's simulation by file name: stable ranks and spectra by the number of points, beside the theory."""
    points = [one.points for one in found.sampled]
    figure, axes = figure_of("points", "stable rank")
    style = looks(["simulated", "limit"])
    means, errors = ([getattr(one, key) for one in found.sampled] for key in ("stable_rank", "stable_rank_error"))
    known = [(one.points, one.limit.stable_rank) for one in found.sampled if one.limit.stable_rank is not None]
    if known:
        look = style["limit"]
        axes.plot(*zip(*known, strict=True), color=look.colour, linestyle=look.style, marker=look.marker, markersize=4)
    look = style["simulated"]
    axes.errorbar(points, means, errors, color=look.colour, linestyle="", marker=look.marker, markersize=4, capsize=2)
    _logarithmic(axes, "x")
    _logarithmic(axes, "y")
    explain(figure, f"{title}: stable rank", {name: style[name] for name in ("simulated", *["limit"] * bool(known))})
    spectra, axes = figure_of("eigenvalue", "share below")
    style = looks([f"{count} points" for count in points])
    for values, look in zip(found.eigenvalues, style.values(), strict=True):
        share = [1 - place / len(values) for place in range(len(values))]
        axes.plot(values, share, color=look.colour, linestyle=look.style, linewidth=1.4)
    for one, look in zip(found.sampled, style.values(), strict=True):
        if one.limit.largest is not None:
            axes.plot([one.limit.largest], [1.0], look.marker, color=look.colour, markersize=4.5, clip_on=False)
    explain(spectra, f"{title}: spectra, marked: the limit of the largest", style)
    name = picture_name(title)
    return {f"{name}-stable-rank.svg": as_svg(figure), f"{name}-spectra.svg": as_svg(spectra)}


def _stable_ranks(rows: Sequence[Row]) -> Lines:
    """Means over draws and clients, by sample size."""
    values: dict[str, dict[int, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    sizes = sorted({row["points"] for row in rows if row["kind"] == "hessian" and row["of"] == "sample"})
    labels = [f"n = {size}" for size in sizes]
    for row in rows:
        # A Hessian of zeros has no stable rank; the table counts those.
        if row["kind"] == "hessian" and not row["layer"] and row["stable_rank"] > 0:
            label = f"n = {row['points']}" if row["of"] == "sample" else "clients' own samples"
            values[label][row["round"]][row["seed"]].append(row["stable_rank"])
    order = [label for label in (*labels, "clients' own samples") if label in values]
    return {label: _by_seed(values[label]) for label in order}


def _similarities(rows: Sequence[Row]) -> Lines:
    values: dict[str, dict[int, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for row in rows:
        if not row["layer"]:
            label = f"cut to rank {row['rank']}" if row["rank"] else "full"
            values[label][row["round"]][row["seed"]].append(row["mean"])
    return {label: _by_seed(own) for label, own in values.items()}


def _by_seed(values: Mapping[int, Mapping[int, list[float]]]) -> dict[int, list[float]]:
    return {at: [statistics.fmean(own) for own in values[at].values()] for at in sorted(values)}


def _drawn(lines: Lines, title: str, ylabel: str, hollow: Collection[int], *, log: bool) -> bytes:
    figure, axes = figure_of("round", ylabel)
    style = looks(list(lines))
    for label, by_round in lines.items():
        look, rounds = style[label], list(by_round)
        means = [statistics.fmean(by_round[at]) for at in rounds]
        stds = [statistics.stdev(by_round[at]) if len(by_round[at]) > 1 else 0.0 for at in rounds]
        if any(stds):
            # On a logarithmic axis a band that reaches 0 would fill the picture.
            low = [max(mean - std, 0.1 * mean) if log else mean - std for mean, std in zip(means, stds, strict=True)]
            high = [mean + std for mean, std in zip(means, stds, strict=True)]
            axes.fill_between(rounds, low, high, color=look.colour, alpha=0.13, linewidth=0)
        axes.plot(rounds, means, color=look.colour, linestyle=look.style, linewidth=1.7)
        for face, kind in ((look.colour, False), ("white", True)):
            points = [(at, mean) for at, mean in zip(rounds, means, strict=True) if (at in hollow) is kind]
            x, y = zip(*points, strict=True) if points else ((), ())
            axes.plot(x, y, look.marker, markersize=4, markeredgecolor=look.colour, markerfacecolor=face)
    if log and all(value > 0 for by_round in lines.values() for values in by_round.values() for value in values):
        _logarithmic(axes, "y")
    if any(at in hollow for by_round in lines.values() for at in by_round):
        title += "\nhollow: the factors are fresh, B = 0"
    explain(figure, title, style)
    return as_svg(figure)


def _logarithmic(axes: "Axes", which: Literal["x", "y"]) -> None:
    """Labels as people write numbers, at 1, 2 and 5."""
    from matplotlib.ticker import LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.set_minor_formatter(NullFormatter())


def _name(*parts: str) -> str:
    return f"{picture_name(' '.join(parts))}.svg"
