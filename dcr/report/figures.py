"""How figures are drawn: one palette, SVG for the page, PNG, SVG and CSV for print."""

import io
import itertools
import math
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dcr import results
from dcr.report.records import Style
from dcr.report.tables import Cell
from dcr.statistics import Interval

# Okabe and Ito's palette, distinguishable without red-green vision, less black and yellow, which
# vanish on a dark or a white page; first the neutral colour of the base model.
PALETTE = ("#7a7a7a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK = "#101112"  # stands for the page's text colour, exchanged in the finished SVG
MARKERS = "os^DvP"
GLYPHS = "●■▲◆▼✚"  # the same markers in a legend's text
DPI = 200
ENDINGS = ("png", "svg", "csv")
Dashes = Literal["-", "--", "-.", ":"]
COLUMNS = 3  # panels side by side
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


Curves = tuple[Style, Sequence[Mapping[str, Any]]]  # a run's logged values
# Compliance with seemingly toxic prompts against refusal of toxic ones; over a run's snapshots in
# the order of their steps.
Point = tuple[Style, Cell, Cell]
Frontier = tuple[Style, Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Panel:
    """A drawing by name, as SVG text."""

    name: str
    title: str
    svg: str


# Panels of training curves: title, epoch-level key, step-level key if any.
TRAINING = (
    (
        "Stage one: Circle loss above its floor",
        "contrastive/above_floor",
        "contrastive/step_circle",
    ),
    ("Stage one: cosine within a class", "contrastive/within_cosine", None),
    ("Stage one: cosine across the classes", "contrastive/across_cosine", None),
    ("Stage two: SFT loss of each step", None, "sft/step_nll"),
    ("Stage two: NLL a token, general rows", "sft/nll/general", None),
    ("Stage two: NLL a token, refusal rows", "sft/nll/refusal", None),
)


def training_curves(runs: Sequence[Curves]) -> list[Panel]:
    """One panel a quantity that at least one run has logged; held-out values are dashed."""
    panels = []
    for index, (title, epoch_key, step_key) in enumerate(TRAINING):
        with matplotlib.rc_context(SCREEN):
            figure, axes = _axes(4.2, 2.9)
            for style, metrics in runs:
                _draw_run(axes, style, metrics, epoch_key, step_key)
            axes.set_title(title)
            axes.set_xlabel("optimiser step")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
            if axes.lines:
                panels.append(Panel(f"curve{index}", title, _svg(figure, f"curve{index}")))
    return panels


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _draw_run(
    axes: Axes,
    style: Style,
    metrics: Sequence[Mapping[str, Any]],
    epoch_key: str | None,
    step_key: str | None,
) -> None:
    colour, marker = PALETTE[style.colour], MARKERS[style.marker]
    if step_key:
        steps = (
            above_floor(metrics)
            if step_key == "contrastive/step_circle"
            else _logged(metrics, step_key)
        )
        faint = 0.35 if epoch_key else 0.85
        if steps:
            axes.plot(*_columns(steps), color=colour, linewidth=0.9, alpha=faint)
    if epoch_key:
        for key, dashes in ((epoch_key, "-"), (f"{epoch_key}/heldout", "--")):
            points = _logged(metrics, key)
            if points:
                axes.plot(
                    *_columns(points), dashes, color=colour, marker=marker, markersize=4,
                    linewidth=1.4,
                )  # fmt: skip


def _logged(metrics: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    """(step, value) of a key; the last value of a step counts, what is not finite is left out."""
    points = {row["step"]: row["value"] for row in metrics if row["key"] == key}
    return sorted((step, value) for step, value in points.items() if math.isfinite(value))


def above_floor(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[float, float]]:
    """The loss of each step less the mean floor of its epoch, which balanced batches all share."""
    circle = dict(_logged(metrics, "contrastive/circle"))
    floors = sorted(
        (step, circle[step] - above)
        for step, above in _logged(metrics, "contrastive/above_floor")
        if step in circle
    )
    if not floors:
        return []
    points = []
    for step, value in _logged(metrics, "contrastive/step_circle"):
        floor = next((floor for end, floor in floors if step <= end), floors[-1][1])
        points.append((step, value - floor))
    return points


def trade_off(
    name: str, title: str, points: Sequence[Point], frontiers: Sequence[Frontier]
) -> Panel:
    """Where every run stands between refusing too much and too little, in percent."""
    with matplotlib.rc_context(SCREEN):
        figure, axes = _axes(5.4, 4.6)
        axes.plot([0, 100], [100, 0], ":", color=INK, alpha=0.5, linewidth=1)
        for frontier in frontiers:
            _draw_frontier(axes, frontier)
        for style, x, y in points:
            axes.errorbar(
                100 * x.estimate,
                100 * y.estimate,
                xerr=arms(x.interval),
                yerr=arms(y.interval),
                fmt=MARKERS[style.marker],
                color=PALETTE[style.colour],
                markersize=8,
                elinewidth=1.1,
                capsize=2.5,
                zorder=3,
            )
        axes.set(xlim=(-2, 102), ylim=(-2, 102))
        axes.set_xlabel("compliance with seemingly toxic prompts, %")
        axes.set_ylabel("keyword refusal of toxic prompts, %")
        axes.set_title(title)
        return Panel(name, title, _svg(figure, name))


def _draw_frontier(axes: Axes, frontier: Frontier) -> None:
    style, points = frontier
    colour, marker = PALETTE[style.colour], MARKERS[style.marker]
    scaled = [(100 * x, 100 * y) for x, y in points]
    shades = [0.25 + 0.75 * (i + 1) / len(scaled) for i in range(len(scaled))]
    for (start, end), shade in zip(itertools.pairwise(scaled), shades[1:], strict=True):
        axes.plot(*_columns([start, end]), color=colour, alpha=shade, linewidth=1.3)
    for place, shade in zip(scaled, shades, strict=True):
        axes.plot(*place, marker, color=colour, alpha=shade, markersize=4)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    xs, ys = zip(*points, strict=True)
    return list(xs), list(ys)


def _svg(figure: Figure, name: str) -> str:
    """SVG to stand inside HTML: ids unique on the page, colours by the page's variables."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Glyph .* missing"
        )  # the browser has its own fonts
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
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


# Kinds of prompts everywhere: colour, marker and dashes differ, so that grey print tells them too.
KINDS: dict[str, tuple[str, str, Dashes]] = {
    "seemingly_toxic": (PALETTE[1], "o", "-"),
    "toxic": (PALETTE[2], "s", "--"),
    "normal": (PALETTE[3], "^", "-."),
}


@dataclass(frozen=True)
class Drawing:
    """A figure: what it shows, its values row by row, and how it is drawn."""

    name: str  # of its files, such as figure5a
    title: str
    caption: str
    header: tuple[str, ...]
    rows: Sequence[Sequence[object]]
    draw: Callable[[], Figure]
    lines: tuple[str, ...] = ()  # for the terminal
    notes: tuple[str, ...] = ()  # what was left out


def file_name(figure: str) -> str:
    """`figure5a` for 5a; a figure with a name of its own keeps it."""
    return f"figure{figure}" if figure[0].isdigit() else figure


def files(figure: Drawing) -> dict[str, bytes]:
    """By ending; the same bytes whenever the values are the same."""
    with matplotlib.rc_context(PRINT), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # of names in other scripts
        drawn = figure.draw()
        png, svg = io.BytesIO(), io.BytesIO()
        drawn.savefig(png, format="png", dpi=DPI, metadata={"Software": None})
        drawn.savefig(svg, format="svg", dpi=DPI, metadata={"Date": None})
    return {
        "png": png.getvalue(),
        "svg": svg.getvalue(),
        "csv": results.csv_text(figure.header, figure.rows).encode(),
    }


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


def handle(label: str, **style: Any) -> Line2D:
    """A legend's entry."""
    return Line2D([], [], label=label, **style)


def kind_handles(kinds: Sequence[str]) -> list[Line2D]:
    return [
        handle(kind_name(kind), color=colour, marker=marker, linestyle=dashes)
        for kind in kinds
        for colour, marker, dashes in [kind_style(kind)]
    ]


def ordered(kinds: Sequence[str]) -> list[str]:
    """In the paper's order, others after."""
    known = [kind for kind in KINDS if kind in kinds]
    return known + [kind for kind in dict.fromkeys(kinds) if kind not in known]


def line_style(place: int) -> tuple[str, str]:
    """Colour and marker of the line at a place, other than those of the base model."""
    return PALETTE[1 + place % (len(PALETTE) - 1)], MARKERS[place % len(MARKERS)]


def arms(interval: Interval) -> list[list[float]]:
    """Error bars in percent."""
    below, above = interval.estimate - interval.low, interval.high - interval.estimate
    return [[100 * max(0.0, below)], [100 * max(0.0, above)]]


def shade(colour: str, share: float) -> tuple[float, float, float]:
    """A colour mixed with white: pale at a share of 0, itself at 1."""
    strength = 0.22 + 0.78 * share
    mixed = [1 - strength * (1 - int(colour[i : i + 2], 16) / 255) for i in (1, 3, 5)]
    return mixed[0], mixed[1], mixed[2]
