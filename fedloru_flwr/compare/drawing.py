"""How every picture of the package's reports looks: colours, lines, axes, and SVG of the same bytes each time."""

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which the colour-blind can tell apart. With five line styles (7 and 5 have no common divisor)
# it gives 35 looks; neighbours in the list differ in both.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#B77B00", "#56B4E9", "#000000")
_DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.5), (1.2, 1.2), (5, 1.5, 1.2, 1.5), (9, 2))
_MARKERS = ("o", "s", "^", "D", "v", "P")
GREY, INK = "#6B7079", "#23272E"
_SIZE = (5.2, 3.7)  # inches: about 375 points, the width of a phone, so that text keeps its size there


@dataclass(frozen=True)
class Look:
    """How a method is drawn, everywhere."""

    colour: str
    dashes: tuple[float, ...]
    marker: str

    @property
    def style(self) -> Any:
        """For matplotlib."""
        return (0, self.dashes) if self.dashes else "-"


def looks(names: Sequence[str]) -> dict[str, Look]:
    """A look for each method, by its place in the list."""
    cycles = zip(names, itertools.cycle(COLOURS), itertools.cycle(_DASHES), itertools.cycle(_MARKERS), strict=False)
    return {name: Look(colour, dashes, marker) for name, colour, dashes, marker in cycles}


def figure_of(xlabel: str, ylabel: str, height: float = _SIZE[1]) -> "tuple[Figure, Axes]":
    """An empty figure with one pair of axes, which stands alone."""
    # Standing alone: pyplot's figures, backend and settings remain the user's.
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(
        figsize=(_SIZE[0], height), facecolor="white", layout=ConstrainedLayoutEngine(w_pad=0.04, h_pad=0.04)
    )
    axes = figure.subplots()
    axes.set_axisbelow(True)
    axes.minorticks_on()
    axes.grid(which="major", color="#DADDE2", linewidth=0.7)
    axes.grid(which="minor", color="#EEF0F3", linewidth=0.5)
    axes.tick_params(which="both", color="#B5BAC2", labelcolor=INK, labelsize=10)
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#B5BAC2")
    axes.set_xlabel(xlabel, fontsize=10.5, color=INK)
    axes.set_ylabel(ylabel, fontsize=10.5, color=INK)
    return figure, axes


def explain(figure: "Figure", title: str, drawn: Mapping[str, Look]) -> None:
    """Add a title, and below the axes a legend."""
    from matplotlib.lines import Line2D

    columns = 2
    figure.set_figheight(figure.get_figheight() + 0.3 + 0.19 * -(-len(drawn) // columns))
    figure.suptitle(title, fontsize=11, color=INK)
    handles = [
        Line2D([], [], color=look.colour, linestyle=look.style, marker=look.marker, markersize=4.5, label=label)
        for label, look in drawn.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def as_svg(figure: "Figure") -> bytes:
    """The same bytes for the same picture."""
    return as_picture(figure, "svg")


def as_picture(figure: "Figure", kind: Literal["svg", "png"]) -> bytes:
    """A figure as a file of this kind: the same bytes for the same picture."""
    from matplotlib import rc_context

    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with rc_context({"svg.hashsalt": "fedloru", "svg.fonttype": "path"}):
        figure.savefig(buffer, format=kind, metadata=metadata)
    return buffer.getvalue()


def picture_name(title: str) -> str:
    """A file's name, without its ending, that says what the picture says: letters from a to z, digits, dots."""
    return re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-")
