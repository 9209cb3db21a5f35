"""The drawings of a report, as SVG that takes its colours from the page it stands in."""

import io
import itertools
import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dcr.report.entries import Style
from dcr.statistics import Interval

# Okabe and Ito's palette, distinguishable without red-green vision, less black and yellow, which
# vanish on a dark or a white page; first the neutral colour of the base model.
PALETTE = ("#7a7a7a", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK = "#101112"  # stands for the page's text colour, exchanged in the finished SVG
MARKERS = "os^DvP"
GLYPHS = "●■▲◆▼✚"  # the same markers in a legend's text
SETTINGS: dict[Any, Any] = {  # pyright knows the keys as literals only
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.15,
    "grid.color": INK,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "xtick.color": INK,
    "ytick.color": INK,
}


@dataclass(frozen=True)
class Curves:
    """The logged values of one run."""

    style: Style
    metrics: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Point:
    """Compliance with seemingly toxic prompts against refusal of toxic ones, with intervals."""

    style: Style
    x: Interval
    y: Interval


@dataclass(frozen=True)
class Frontier:
    """Such points over the snapshots of a run, in the order of their steps."""

    style: Style
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Panel:
    """A drawing by name, as SVG text."""

    name: str
    title: str
    svg: str


# Panels of training curves: title, epoch-level key, step-level key if any.
CURVES = (
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
    for index, (title, epoch_key, step_key) in enumerate(CURVES):
        with matplotlib.rc_context(SETTINGS):
            figure, axes = _axes(4.2, 2.9)
            for run in runs:
                _draw_run(axes, run, epoch_key, step_key)
            axes.set_title(title)
            axes.set_xlabel("optimiser step")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
            if axes.lines:
                panels.append(Panel(f"curve{index}", title, _svg(figure, f"curve{index}")))
    return panels


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _draw_run(axes: Axes, run: Curves, epoch_key: str | None, step_key: str | None) -> None:
    colour, marker = PALETTE[_colour(run.style)], _marker(run.style)
    if step_key:
        steps = (
            _above_floor(run) if step_key == "contrastive/step_circle" else _logged(run, step_key)
        )
        faint = 0.35 if epoch_key else 0.85
        if steps:
            axes.plot(*_columns(steps), color=colour, linewidth=0.9, alpha=faint)
    if epoch_key:
        for key, dashes in ((epoch_key, "-"), (f"{epoch_key}/heldout", "--")):
            points = _logged(run, key)
            if points:
                axes.plot(
                    *_columns(points), dashes, color=colour, marker=marker, markersize=4,
                    linewidth=1.4,
                )  # fmt: skip


def _logged(run: Curves, key: str) -> list[tuple[float, float]]:
    """(step, value) of a key; the last value of a step counts, what is not finite is left out."""
    points = {row["step"]: row["value"] for row in run.metrics if row["key"] == key}
    return sorted((step, value) for step, value in points.items() if math.isfinite(value))


def _above_floor(run: Curves) -> list[tuple[float, float]]:
    """The loss of each step less the mean floor of its epoch, which balanced batches all share."""
    circle = dict(_logged(run, "contrastive/circle"))
    floors = sorted(
        (step, circle[step] - above)
        for step, above in _logged(run, "contrastive/above_floor")
        if step in circle
    )
    if not floors:
        return []
    points = []
    for step, value in _logged(run, "contrastive/step_circle"):
        floor = next((floor for end, floor in floors if step <= end), floors[-1][1])
        points.append((step, value - floor))
    return points


def trade_off(
    name: str, title: str, points: Sequence[Point], frontiers: Sequence[Frontier]
) -> Panel:
    """Where every run stands between refusing too much and too little, in percent."""
    with matplotlib.rc_context(SETTINGS):
        figure, axes = _axes(5.4, 4.6)
        axes.plot([0, 100], [100, 0], ":", color=INK, alpha=0.5, linewidth=1)
        for frontier in frontiers:
            _draw_frontier(axes, frontier)
        for point in points:
            x, y = point.x, point.y
            axes.errorbar(
                100 * x.estimate,
                100 * y.estimate,
                xerr=[[100 * max(0.0, x.estimate - x.low)], [100 * max(0.0, x.high - x.estimate)]],
                yerr=[[100 * max(0.0, y.estimate - y.low)], [100 * max(0.0, y.high - y.estimate)]],
                fmt=_marker(point.style),
                color=PALETTE[_colour(point.style)],
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
    colour, marker = PALETTE[_colour(frontier.style)], _marker(frontier.style)
    scaled = [(100 * x, 100 * y) for x, y in frontier.points]
    shades = [0.25 + 0.75 * (i + 1) / len(scaled) for i in range(len(scaled))]
    for (start, end), shade in zip(itertools.pairwise(scaled), shades[1:], strict=True):
        axes.plot(*_columns([start, end]), color=colour, alpha=shade, linewidth=1.3)
    for place, shade in zip(scaled, shades, strict=True):
        axes.plot(*place, marker, color=colour, alpha=shade, markersize=4)


def glyph(style: Style) -> str:
    """The character that stands for a style's marker."""
    return GLYPHS[_marker_place(style)]


def colour_class(style: Style) -> str:
    """The name of the page's colour for a style, as in `var(--series-1)`."""
    return f"series-{_colour(style)}"


def _colour(style: Style) -> int:
    return 0 if not style.colour else 1 + (style.colour - 1) % (len(PALETTE) - 1)


def _marker_place(style: Style) -> int:
    # where colours come round again, the marker moves on, so that no two variants look alike
    return (style.marker + max(0, style.colour - 1) // (len(PALETTE) - 1)) % len(MARKERS)


def _marker(style: Style) -> str:
    return MARKERS[_marker_place(style)]


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
