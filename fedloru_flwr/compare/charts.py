"""The report's pictures, as SVG: the same bytes for the same numbers, a method looking the same in all of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fedloru_flwr.compare import measures
from fedloru_flwr.compare.drawing import GREY, INK, Look, as_svg, explain, figure_of, looks, picture_name
from fedloru_flwr.compare.judged import Comparison, Judged, same_but
from fedloru_flwr.compare.measures import Curve, Metric, Stat, Way
from fedloru_flwr.compare.records import Record
from fedloru_flwr.compare.spec import describe
from fedloru_flwr.compare.table import METRIC_NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# What accuracies are drawn against: the name, the axis, and which bytes, where it is bytes.
_AGAINST: tuple[tuple[str, str, Way | None], ...] = (
    ("rounds", "round", None),
    ("bytes", "MB sent up so far, all clients together", "up"),
    ("all bytes", "MB sent up and down so far, all clients together", "all"),
)


@dataclass(frozen=True)
class Chart:
    """A picture.

    Attributes:
        title: what it shows, in short.
        alt: what it shows, for those who do not see it.
        svg: the picture.
        methods: names of those whose looks it needs explained.
    """

    title: str
    alt: str
    svg: bytes
    methods: tuple[str, ...] = ()


def files(comparison: Comparison) -> dict[str, bytes]:
    """The charts of accuracies and gaps as SVG files that stand alone, by name: for papers and slides."""
    charts = [
        *(chart for metric in METRIC_NAMES for chart in accuracy_charts(comparison, metric, alone=True)),
        *gap_charts(comparison, alone=True),
    ]
    return {f"{picture_name(chart.title)}.svg": chart.svg for chart in charts}


def accuracy_charts(comparison: Comparison, metric: Metric, *, alone: bool = False) -> list[Chart]:
    """The metric against rounds, uplink and all bytes, for each combination of the axes' values.

    Args:
        comparison: the results.
        metric: of the global or the personal models.
        alone: with a title and a legend.
    """
    style = looks(list(comparison.results.labels))
    values = [stat for one in comparison.judged for stat in one.curve(metric).values]
    limits = _limits(values)
    charts = []
    for number, group in enumerate(comparison.groups):
        drawn = [one for one in group if one.curve(metric).values]
        if not drawn:
            continue
        head = describe(comparison.combinations[number])
        for by, unit, way in _AGAINST:
            title = f"{METRIC_NAMES[metric].capitalize()} against {by}" + (f", {head}" if head else "")
            figure, axes = figure_of(unit, METRIC_NAMES[metric])
            for one in drawn:
                line = one.curve(metric)
                xs: list[float] = list(line.rounds) if way is None else _megabytes(line, way)
                _band(axes, xs, line.values, style[one.row.method], 0.13 if len(drawn) <= 6 else 0.06)
            axes.set_ylim(*limits)
            shown = {one.label: style[one.row.method] for one in drawn}
            told = "; ".join(f"{one.label} ends at {one.curve(metric).values[-1].mean:.3f}" for one in drawn)
            if way is not None:
                _log_bytes(axes, [mb for one in drawn for mb in _megabytes(one.curve(metric), way) if mb > 0])
                if front := [group[index] for index in comparison.front(number, metric, way)]:
                    front.sort(key=lambda one: one.curve(metric).spent(way)[-1])
                    _draw_front(axes, [one.curve(metric) for one in front], way)
                    shown["Pareto front"] = Look(GREY, (), "o")
                    told += f". On the Pareto front: {', '.join(one.label for one in front)}"
            if alone:
                explain(figure, title, shown)
            charts.append(Chart(title, f"Line chart. {title}. {told}.", as_svg(figure), _methods(drawn)))
    return charts


def _megabytes(line: Curve, way: Way) -> list[float]:
    return [spent / 1e6 for spent in line.spent(way)]


def _draw_front(axes: "Axes", lines: Sequence[Curve], way: Way) -> None:
    """A broad line behind the others, through the ends of these, with dots: it may be one alone."""
    xs, means = [_megabytes(line, way)[-1] for line in lines], [line.values[-1].mean for line in lines]
    axes.plot(xs, means, color=GREY, alpha=0.35, linewidth=6, marker="o", markersize=12, zorder=1.5)


def gap_charts(comparison: Comparison, *, alone: bool = False) -> list[Chart]:
    """Final accuracy minus that of the reference method, against the number of clients.

    Args:
        comparison: the results.
        alone: with a title and a legend.
    """
    axis = "num-clients"
    if len(comparison.results.axes.get(axis, [])) < 2:
        return []
    style = looks(list(comparison.results.labels))
    reference = comparison.results.labels[comparison.results.reference]
    others = []
    for at in comparison.combinations:
        if same_but(at, axis) not in others:
            others.append(same_but(at, axis))
    charts = []
    for other in others:
        numbers = [n for n, at in enumerate(comparison.combinations) if same_but(at, axis) == other]
        points: dict[str, list[tuple[float, Stat]]] = {}
        for number in numbers:
            base = comparison.reference(number)
            for one in comparison.groups[number]:
                gap = measures.paired_gap(_by_seed(one), _by_seed(base)) if base is not None else None
                if gap is not None:
                    points.setdefault(one.row.method, []).append((float(comparison.combinations[number][axis]), gap))
        if not points:
            continue
        head = describe(other)
        title = f"Gap to {reference} against the number of clients" + (f", {head}" if head else "")
        figure, axes = figure_of("clients", f"final accuracy minus that of {reference}")
        axes.axhline(0, color=GREY, linewidth=0.8)
        for shift, (method, line) in enumerate(points.items()):
            look = style[method]
            # Side by side, so that the bars of one number of clients can be told apart.
            factor = 1.0 + 0.012 * (shift - (len(points) - 1) / 2)
            line.sort(key=lambda point: point[0])
            axes.errorbar(
                [x * factor for x, _ in line],
                [gap.mean for _, gap in line],
                yerr=[gap.std or 0.0 for _, gap in line],
                color=look.colour,
                linestyle=look.style,
                marker=look.marker,
                markersize=4.5,
                linewidth=1.6,
                elinewidth=0.9,
                capsize=2,
            )
        axes.set_xscale("log")
        _plain_ticks(axes, sorted({float(comparison.combinations[number][axis]) for number in numbers}))
        if alone:
            explain(figure, title, {comparison.results.labels[method]: style[method] for method in points})
        told = "; ".join(
            f"{comparison.results.labels[method]} " + ", ".join(f"{gap.mean:+.3f} at {x:g}" for x, gap in line)
            for method, line in points.items()
        )
        charts.append(Chart(title, f"Line chart. {title}. {told}.", as_svg(figure), tuple(points)))
    return charts


def error_charts(comparison: Comparison) -> list[Chart]:
    """Aggregation error over rounds, of the methods that are not exact."""
    style = looks(list(comparison.results.labels))
    charts = []
    for number, group in enumerate(comparison.groups):
        drawn = [one for one in group if one.errors and not measures.is_exact(one.errors)]
        if not drawn:
            continue
        head = describe(comparison.combinations[number])
        title = "Aggregation error over rounds" + (f", {head}" if head else "")
        figure, axes = figure_of("round", "relative aggregation error")
        for one in drawn:
            look, shown = style[one.row.method], [(n, error) for n, error in one.errors if error > 0]
            axes.plot(
                [n for n, _ in shown],
                [error for _, error in shown],
                color=look.colour,
                linestyle=look.style,
                linewidth=1.7,
                marker=look.marker if len(shown) == 1 else None,
            )
        axes.set_yscale("log")
        told = "; ".join(f"{one.label} ends at {one.errors[-1][1]:.3g}" for one in drawn)
        charts.append(Chart(title, f"Line chart. {title}. {told}.", as_svg(figure), _methods(drawn)))
    return charts


def spread_charts(comparison: Comparison) -> list[Chart]:
    """Mean and worst decile of the clients' accuracy, a line a method."""
    charts = []
    for number, group in enumerate(comparison.groups):
        found = {
            kind: [(one, stats) for one in group if (stats := measures.spread(one.runs, kind)) is not None]
            for kind in ("accuracy", "personal-accuracy")
        }
        if not any(found.values()):
            continue
        head = describe(comparison.combinations[number])
        title = "Mean and worst decile of the clients" + (f", {head}" if head else "")
        lines = [(one, kind, stats) for one in group for kind in found for o, stats in found[kind] if o is one]
        figure, axes = figure_of("accuracy on the clients' own held-out samples", "", height=0.9 + 0.27 * len(lines))
        style = looks(list(comparison.results.labels))
        for place, (one, kind, (mean, _, worst)) in enumerate(reversed(lines)):
            look, own = style[one.row.method], kind == "personal-accuracy"
            axes.plot([worst.mean, mean.mean], [place, place], color=look.colour, linewidth=1.6)
            fill = "white" if own else look.colour
            axes.plot([mean.mean], [place], "o", color=look.colour, markerfacecolor=fill, markersize=6)
            axes.plot([worst.mean], [place], "|", color=look.colour, markersize=10, markeredgewidth=1.8)
        names = [
            one.label + (", own models" if kind == "personal-accuracy" else "") for one, kind, _ in reversed(lines)
        ]
        axes.set_yticks(range(len(lines)), [_shortened(name) for name in names])
        axes.set_ylim(-0.7, len(lines) - 0.3)
        axes.minorticks_off()
        told = "; ".join(
            f"{one.label}{', own models' * (kind != 'accuracy')} mean {mean.mean:.3f}, worst decile {worst.mean:.3f}"
            for one, kind, (mean, _, worst) in lines
        )
        charts.append(Chart(title, f"Dot chart. {title}. {told}.", as_svg(figure)))
    return charts


def partition_charts(comparison: Comparison) -> list[Chart]:
    """How many samples of each class each client has, a picture a partition."""
    charts = []
    for entry in comparison.results.partitions:
        counts: list[list[int]] = entry["counts"]
        clients, classes = len(counts), len(counts[0])
        settings: Mapping[str, Any] = entry["settings"]
        what = f"{settings['dataset']}, {settings['partitioner']}, {settings['num-clients']} clients"
        shown = f" (the first {clients})" if clients < settings["num-clients"] else ""
        title = f"Partition: {what}{shown}"
        figure, axes = figure_of("client", "class", height=1.5 + 0.14 * min(max(classes, 8), 40))
        axes.grid(False, which="both")
        axes.minorticks_off()
        by_class = [[client[label] for client in counts] for label in range(classes)]
        image = axes.imshow(by_class, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, origin="lower")
        _integer_ticks(axes)
        bar = figure.colorbar(image, ax=axes, pad=0.02)
        bar.set_label("samples", color=INK, fontsize=10)
        bar.ax.tick_params(labelsize=9, labelcolor=INK)
        bar.outline.set_visible(False)
        sizes = [sum(client) for client in counts]
        held = [sum(count > 0 for count in client) for client in counts]
        alt = (
            f"Heat map of {clients} clients by {classes} classes ({what}). Clients have {min(sizes)} to {max(sizes)} "
            f"samples of {min(held)} to {max(held)} classes."
        )
        charts.append(Chart(title, alt, as_svg(figure)))
    return charts


def _methods(drawn: Sequence[Judged]) -> tuple[str, ...]:
    return tuple(one.row.method for one in drawn)


def _by_seed(one: Judged) -> dict[int, Record]:
    return {seed: record for seed, record in one.row.runs.items() if record.finished}


def _band(axes: "Axes", xs: Sequence[float], values: Sequence[Stat], look: Look, opacity: float) -> None:
    means = [stat.mean for stat in values]
    stds = [stat.std or 0.0 for stat in values]
    if any(stds):
        low = [mean - std for mean, std in zip(means, stds, strict=True)]
        high = [mean + std for mean, std in zip(means, stds, strict=True)]
        axes.fill_between(xs, low, high, color=look.colour, alpha=opacity, linewidth=0)
    axes.plot(xs, means, color=look.colour, linestyle=look.style, linewidth=1.7)
    axes.plot(xs[-1:], means[-1:], color=look.colour, marker=look.marker, markersize=5)


def _limits(values: Sequence[Stat]) -> tuple[float, float]:
    """The same for all panels, so that they can be compared."""
    if not values:
        return 0.0, 1.0
    low = min(stat.mean - (stat.std or 0.0) for stat in values)
    high = max(stat.mean + (stat.std or 0.0) for stat in values)
    room = 0.04 * (high - low or 0.1)
    return max(low - room, -0.02), min(high + room, 1.02)


def _log_bytes(axes: "Axes", xs: Sequence[float]) -> None:
    """A log axis; the origin has no place on it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    if not xs:
        return
    axes.set_xscale("log", nonpositive="mask")
    axes.set_xlim(min(xs) / 1.25, max(xs) * 1.35)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if max(xs) > 100 * min(xs) else (1.0, 2.0, 5.0)))
    axes.xaxis.set_minor_locator(LogLocator(subs=list(range(2, 10))))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())


def _plain_ticks(axes: "Axes", xs: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    axes.xaxis.set_major_locator(FixedLocator(list(xs)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _integer_ticks(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=10))


def _shortened(text: str, most: int = 34) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}\u2026"
