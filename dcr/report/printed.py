"""One figure of the paper as it is printed: PNG, SVG and its values as CSV."""

import csv
import io
import math
import textwrap
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dcr.report.figures import INK, PALETTE
from dcr.report.markup import plain_cell

DPI = 200
ENDINGS = ("png", "svg", "csv")
Dashes = Literal["-", "--", "-.", ":"]
COLUMNS = 3  # panels side by side
PRINT: dict[Any, Any] = {  # pyright knows the keys as literals only
    "svg.fonttype": "none",
    "svg.hashsalt": "dcr",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",  # which comes with matplotlib
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
}
# Kinds of prompts everywhere: colour, marker and dashes differ, so that grey print tells them too.
KINDS: dict[str, tuple[str, str, Dashes]] = {
    "seemingly_toxic": (PALETTE[1], "o", "-"),
    "toxic": (PALETTE[2], "s", "--"),
    "normal": (PALETTE[3], "^", "-."),
}


@dataclass(frozen=True)
class Printed:
    """A figure: what it shows, its values row by row, and how it is drawn."""

    name: str  # of its files, such as figure5a
    title: str
    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    draw: Callable[[], Figure]
    told: tuple[str, ...] = ()  # lines for the terminal
    notes: tuple[str, ...] = ()  # what was left out


def file_name(figure: str) -> str:
    """`figure5a` for 5a; a figure with a name of its own keeps it."""
    return f"figure{figure}" if figure[0].isdigit() else figure


def files(figure: Printed) -> dict[str, bytes]:
    """By ending; the same bytes whenever the values are the same."""
    with matplotlib.rc_context(PRINT), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of names in other scripts
        drawn = figure.draw()
        png, svg = io.BytesIO(), io.BytesIO()
        drawn.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
        drawn.savefig(svg, format="svg", dpi=DPI, metadata={"Date": None})
    return {"png": png.getvalue(), "svg": svg.getvalue(), "csv": _csv(figure).encode()}


def _csv(figure: Printed) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(figure.header)
    writer.writerows([_cell(value) for value in row] for row in figure.rows)
    return buffer.getvalue()


def _cell(value: object) -> object:
    if isinstance(value, str):
        return plain_cell(value)
    return "" if isinstance(value, float) and math.isnan(value) else value


def kind_name(kind: str) -> str:
    return kind.replace("_", " ")


def kind_style(kind: str) -> tuple[str, str, Dashes]:
    """Colour, marker and dashes; grey for a kind the paper does not know."""
    return KINDS.get(kind, (PALETTE[0], "D", ":"))


def panels(
    count: int, width: float = 2.3, height: float = 2.1, columns: int = COLUMNS
) -> tuple[Figure, list[Axes]]:
    """Axes in rows, inches each; one panel alone is as wide as a column of print."""
    if count == 1:
        width, height = max(width, 3.4), max(height, 2.6)
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Figure(figsize=(across * width + 0.4, down * height + 0.4), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False).ravel().tolist()
    for spare in axes[count:]:
        spare.set_visible(False)
    return figure, axes[:count]


def heading(axes: Axes, text: str, width: int = 34) -> None:
    """A panel's title, folded to what fits above it."""
    lines = textwrap.wrap(" ".join(text.split()), width)[:3]
    axes.set_title("\n".join(lines))


def step_axis(axes: Axes, label: str = "SFT step") -> None:
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def share_axis(axes: Axes) -> None:
    """Probabilities and rates, all of 0 to 1."""
    axes.set_ylim(-0.02, 1.02)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])


def key(figure: Figure, handles: Sequence[Line2D], columns: int = 4, title: str = "") -> None:
    """One legend above all panels, in as many rows as it takes."""
    figure.legend(
        handles=list(handles), loc="outside upper left", ncols=min(columns, max(1, len(handles))),
        title=title or None, title_fontsize=8, alignment="left", handlelength=2.4,
        columnspacing=1.4, borderaxespad=0.2,
    )  # fmt: skip


def kind_handles(kinds: Sequence[str]) -> list[Line2D]:
    return [
        Line2D([], [], color=colour, marker=marker, linestyle=dashes, label=kind_name(kind))
        for kind in kinds
        for colour, marker, dashes in [kind_style(kind)]
    ]


def shade(colour: str, share: float) -> tuple[float, float, float]:
    """A colour mixed with white: pale at a share of 0, itself at 1."""
    strength = 0.22 + 0.78 * share
    mixed = [1 - strength * (1 - int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]
    return mixed[0], mixed[1], mixed[2]
