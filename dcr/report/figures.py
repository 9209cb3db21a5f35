"""Draws panels of data frames in one palette: SVG for the page, files for print."""

import io
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import matplotlib
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dcr import results
from dcr.report.columns import Style
from dcr.report.grids import plain

# The neutral colour of the base model, then Okabe and Ito's palette, distinguishable without
# red-green vision, without black and yellow, which vanish on a dark or a white page.
PALETTE = ("#7a7a7a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK = "#101112"  # stands for the page's text colour, exchanged in the finished SVG
MARKERS = "os^DvP"
GLYPHS = "●■▲◆▼✚"  # the same markers in a legend's text
SHADES = colormaps["Blues"]
DPI = 200
BOTH: dict[Any, Any] = {  # pyright knows the keys as literals only
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
SCREEN: dict[Any, Any] = {
    **BOTH,
    "font.size": 10,
    "axes.titlesize": 10.5,
    "grid.alpha": 0.15,
    "grid.color": INK,
}
PRINT: dict[Any, Any] = {
    **BOTH,
    "svg.hashsalt": "dcr",
    "font.family": "DejaVu Sans",  # which comes with matplotlib
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "axes.linewidth": 0.7,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "lines.markersize": 3.2,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
}
Look = Mapping[str, Any]  # keywords of matplotlib's plot
# the looks of kinds of prompts; colour, marker and dashes differ, for grey print as well
KINDS: dict[str, Look] = {
    "seemingly_toxic": {"color": PALETTE[1], "marker": "o", "linestyle": "-"},
    "toxic": {"color": PALETTE[2], "marker": "s", "linestyle": "--"},
    "normal": {"color": PALETTE[3], "marker": "^", "linestyle": "-."},
}
OTHER_KIND: Look = {"color": PALETTE[0], "marker": "D", "linestyle": ":"}
# axes of probabilities and rates, all from 0 to 1
SHARES: dict[str, Any] = {"ylim": (-0.02, 1.02), "yticks": [0, 0.25, 0.5, 0.75, 1]}


@dataclass(frozen=True)
class Curve:
    """Points of one look in a panel: the columns `x` and `y` of a data frame.

    If present, `low` and `high` are a band around y, and `x_low`, `x_high`, `y_low`, `y_high` the
    ends of two arms of every point. `words` are (row, text, offset in points).
    """

    values: pd.DataFrame
    look: Look
    fading: bool = False  # from pale to full colour, row by row
    words: Sequence[tuple[int, str, tuple[float, float]]] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes: curves, or shaded cells of the columns `y`, `x`, `value`, `low`, `high`.

    `axes` are keywords of `Axes.set`. `paint` draws anything else, such as bars, on the axes.
    """

    curves: Sequence[Curve] = ()
    title: str = ""
    axes: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 0  # the most ticks of an axis of whole numbers
    levels: Sequence[tuple[float, Look]] = ()  # horizontal lines
    boxed: bool = False
    cells: pd.DataFrame | None = None
    top: float = 1.0  # the darkest cell's value
    paint: Callable[[Axes], object] | None = None


@dataclass(frozen=True)
class Drawing:
    """A figure: its title, its values row by row, and its panels in rows of `across`.

    `blocks` are panels below a title of their own; None leaves a place empty. `size` is a panel's
    size in inches.
    """

    macro: ClassVar[str] = "picture"
    name: str  # of its files, such as figure5a
    title: str
    blocks: Mapping[str, Sequence[Panel | None]]
    values: pd.DataFrame = field(default_factory=pd.DataFrame)
    caption: str = ""
    legend: Sequence[tuple[str, Look]] = ()
    legend_title: str = ""
    legend_columns: int = 4
    scale: str = ""  # the meaning of the shades of cells
    size: tuple[float, float] | None = None
    across: int = 3
    sentences: tuple[str, ...] = ()  # for the terminal, and behind the caption
    origin: str = ""  # path and source hash of a user's own


@dataclass(frozen=True)
class Drawings:
    """Drawings side by side on the page, below one legend: place in the palette, glyph, words."""

    macro: ClassVar[str] = "drawings"
    drawings: Sequence[Drawing]
    legend: Sequence[tuple[int, str, str]] = ()

    def __bool__(self) -> bool:
        return bool(self.drawings)


def style_legend(styles: Sequence[tuple[Style, str]]) -> list[tuple[int, str, str]]:
    return [(style.colour, GLYPHS[style.marker], words) for style, words in styles]


def draw(drawing: Drawing) -> Figure:
    """Draws a figure with the current settings of matplotlib; a row of cells shares its scale."""
    blocks = list(drawing.blocks.values())
    across = min(drawing.across, max(map(len, blocks)))
    rows = [math.ceil(len(block) / across) for block in blocks]
    # a single panel is as wide as a column of print
    width, height = drawing.size or ((3.4, 2.6) if len(blocks[0]) == 1 else (2.3, 2.1))
    titles = 0.3 * sum(map(bool, drawing.blocks))
    figure = Figure(
        figsize=(across * width + 0.4, sum(rows) * height + titles + 0.4),
        # "constrained" cuts labels off beside square panels
        layout="compressed" if drawing.scale else "constrained",
    )
    parts: Any = [figure]
    if len(rows) > 1:
        parts = figure.subfigures(len(rows), 1, height_ratios=[down + 0.25 for down in rows])
    for part, down, (title, panels) in zip(parts, rows, drawing.blocks.items(), strict=True):
        if title:
            size = matplotlib.rcParams["axes.titlesize"]
            part.suptitle(title, x=0.01, ha="left", fontsize=size)
        grid = part.subplots(down, across, squeeze=False)
        panels = [*panels, *[None] * (grid.size - len(panels))]
        for axes, panel in zip(grid.ravel(), panels, strict=True):
            axes.set_visible(panel is not None)
            if panel is not None:
                _draw_panel(axes, panel)
        for place, row in enumerate(grid if drawing.scale else ()):
            shown = [panel for panel in panels[place * across : (place + 1) * across] if panel]
            shades = ScalarMappable(Normalize(0, shown[0].top), SHADES)
            part.colorbar(shades, ax=list(row[: len(shown)]), shrink=0.75, pad=0.02, aspect=18,
                          label=drawing.scale)  # fmt: skip
    if drawing.legend:
        figure.legend(
            handles=[Line2D([], [], label=label, **look) for label, look in drawing.legend],
            loc="outside upper left", ncols=min(drawing.legend_columns, len(drawing.legend)),
            title=drawing.legend_title or None, title_fontsize=8, alignment="left",
            handlelength=2.4, columnspacing=1.4, borderaxespad=0.2,
        )  # fmt: skip
    return figure


def _draw_panel(axes: Axes, panel: Panel) -> None:
    for level, look in panel.levels:
        axes.axhline(level, **look)
    for curve in panel.curves:
        _draw_curve(axes, curve)
    if panel.cells is not None:
        _draw_cells(axes, panel.cells, panel.top)
    if panel.paint is not None:
        panel.paint(axes)
    axes.set_title(panel.title)
    axes.set(**panel.axes)
    if panel.steps:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=panel.steps, integer=True))
    for spine in axes.spines.values() if panel.boxed else ():
        spine.set(visible=True, color="#b5b5b5", linewidth=0.5)


def _draw_curve(axes: Axes, curve: Curve) -> None:
    values, look = curve.values.astype(float), dict(curve.look)
    xs, ys = values["x"].tolist(), values["y"].tolist()
    if curve.fading:
        axes.plot(xs, ys, color=look["color"], alpha=0.4, linewidth=look.pop("linewidth"), zorder=2)
        for place, point in enumerate(zip(xs, ys, strict=True)):
            face = (look["color"], 0.22 + 0.78 * place / max(1, len(xs) - 1))
            axes.plot(*point, markerfacecolor=face, markeredgewidth=0.4, zorder=3, **look)
    elif "x_low" in values:
        arms = {
            axis: [values[axis] - values[f"{axis}_low"], values[f"{axis}_high"] - values[axis]]
            for axis in "xy"
        }
        xerr, yerr = ([end.clip(lower=0).tolist() for end in ends] for ends in arms.values())
        axes.errorbar(xs, ys, xerr=xerr, yerr=yerr, linestyle="", **look)
    else:
        axes.plot(xs, ys, **look)
    low, high = (values[end].tolist() if end in values else [] for end in ("low", "high"))
    if not all(map(math.isnan, low)):
        axes.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)
    for place, text, offset in curve.words:
        axes.annotate(text, (xs[place], ys[place]), xytext=offset, textcoords="offset points",
                      fontsize=7, color=look["color"], zorder=5)  # fmt: skip


def _draw_cells(axes: Axes, cells: pd.DataFrame, top: float) -> None:
    kinds = ordered([*cells["y"], *cells["x"]])
    means = cells.pivot(index="y", columns="x", values="value").reindex(index=kinds, columns=kinds)
    axes.imshow(means.to_numpy(float), cmap=SHADES, vmin=0, vmax=top)
    for y, x, value, low, high in cells.dropna(subset="value").itertuples(index=False):
        i, j = kinds.index(y), kinds.index(x)
        style: dict[str, Any] = {
            "color": "white" if value > 0.6 * top else INK, "ha": "center", "va": "center"
        }  # fmt: skip
        ends = "" if math.isnan(low) else f"\n[{low:.2f}–{high:.2f}]"
        axes.text(j, i - (0.1 if ends else 0), f"{value:.2f}", fontsize=8.5, **style)
        axes.text(j, i + 0.12, ends, fontsize=5.5, **style)
    labels = [plain(kind).replace(" ", "\n") for kind in kinds]
    axes.set_xticks(range(len(kinds)), labels)
    axes.set_yticks(range(len(kinds)), labels)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)


def files(drawing: Drawing) -> dict[str, bytes]:
    """The files by ending; equal values give equal bytes."""
    with matplotlib.rc_context(PRINT), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of names in other scripts
        figure = draw(drawing)
        png, svg = io.BytesIO(), io.BytesIO()
        origin = {"Source": drawing.origin} if drawing.origin else {}
        figure.savefig(png, format="png", dpi=DPI, metadata={"Software": None, **origin})
        figure.savefig(svg, format="svg", dpi=DPI, metadata={"Date": None, **origin})
    return {
        "png": png.getvalue(),
        "svg": svg.getvalue(),
        "csv": results.csv_text(drawing.values).encode(),
    }


def inline(drawing: Drawing) -> str:
    """The SVG for inside HTML: ids are unique on the page, colours are the page's variables."""
    name, buffer = drawing.name, io.StringIO()
    with matplotlib.rc_context({**SCREEN, "svg.hashsalt": name}), warnings.catch_warnings():
        # the browser has its own fonts
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        draw(drawing).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    for place, colour in enumerate(PALETTE):
        text = text.replace(colour, f"var(--series-{place})")
    return text.replace(INK, "currentColor")


def frame(rows: Sequence[Sequence[object]], *columns: str) -> pd.DataFrame:
    """A frame of unchanged values: a column of whole numbers with gaps stays one."""
    return pd.DataFrame(rows, columns=list(columns), dtype=object)


def parts(values: pd.DataFrame, *columns: str) -> list[tuple[Any, pd.DataFrame]]:
    """The rows grouped by these columns, in order of appearance."""
    by = columns[0] if len(columns) == 1 else list(columns)
    return list(values.groupby(by, sort=False))


def folded(text: str, width: int = 34, lines: int = 3) -> str:
    """A name on as many lines as fit, with a mark where it goes on."""
    return textwrap.fill(" ".join(text.split()), width, max_lines=lines, placeholder=" …")


def kind_look(kind: str) -> Look:
    """The look of a kind, grey if the paper does not know it."""
    return KINDS.get(kind, OTHER_KIND)


def kind_legend(kinds: Sequence[str]) -> list[tuple[str, Look]]:
    return [(plain(kind), kind_look(kind)) for kind in kinds]


def ordered(kinds: Sequence[str]) -> list[str]:
    """Sorts kinds by the paper's order, others after them."""
    known = [kind for kind in KINDS if kind in kinds]
    return known + [kind for kind in dict.fromkeys(kinds) if kind not in known]


def run_look(style: Style) -> dict[str, Any]:
    """Colour and marker of a run wherever it is drawn."""
    return {"color": PALETTE[style.colour], "marker": MARKERS[style.marker]}


def look_of(place: int) -> dict[str, Any]:
    """Colour and marker of the line at a place, other than those of the base model."""
    return {
        "color": PALETTE[1 + place % (len(PALETTE) - 1)],
        "marker": MARKERS[place % len(MARKERS)],
    }
