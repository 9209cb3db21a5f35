"""The operating points' plot: one curve a method over its strengths, the chosen points ringed."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dcr import storage
from dcr.config import Kind
from dcr.report import printed
from dcr.report.entries import about, flattened
from dcr.report.figures import INK, MARKERS, PALETTE
from dcr.report.operating_points import Arena, Operating, arenas, label, told
from dcr.report.printed import Printed
from dcr.report.printing import printable
from dcr.report.records import RunRecord
from dcr.statistics import Interval

HEADER = ("model", "data", "seed", "method", "weights", "strength", "step", "compliance",
          "compliance_low", "compliance_high", "safety", "safety_low", "safety_high", "safety_by",
          "over_refusal_sets", "safety_sets", "reference", "chosen", "folder")  # fmt: skip


def operating_points(records: Sequence[RunRecord], margin: float, data: str | None) -> Printed:
    """One panel an arena. UserError where nothing was evaluated alike."""
    found = arenas(records, margin, data)
    safety = list(dict.fromkeys(arena.safety for arena in found))
    return Printed(
        "operating_points",
        "Operating points",
        "Compliance with seemingly toxic prompts (keywords, sets pooled) against safety "
        f"({' or '.join(safety)}), with 95% Wilson intervals; a curve a method, and choice of "
        "its other settings, over strengths, from the unsteered STL on; pale: snapshots. "
        "Dashed: the least safety that the rule allows; rings: the points it chooses.",
        HEADER,
        [row for arena in found for row in _rows(arena)],
        lambda: _draw(found, margin),
        told=tuple(line for arena in found for line in told(arena, margin)),
    )


def _rows(arena: Arena) -> list[tuple[object, ...]]:
    chosen = [point for point in arena.chosen.values() if point]
    return [
        (
            *(about(p.run, p.evaluation, key) for key in ("model", "data", "seed")),
            p.method, p.evaluation.weights, p.strength, p.step,
            p.compliance.estimate, p.compliance.low, p.compliance.high,
            p.safety.estimate, p.safety.low, p.safety.high, arena.safety,
            " ".join(arena.sets[Kind.seemingly_toxic]), " ".join(arena.sets[Kind.toxic]),
            int(p is arena.reference), int(any(p is other for other in chosen)),
            printable(str(p.evaluation.folder)),
        )
        for p in arena.points
    ]  # fmt: skip


def _draw(found: Sequence[Arena], margin: float) -> Figure:
    methods = list(dict.fromkeys(p.method for a in found for p in a.points if p.method != "stl"))
    figure, axes = printed.panels(len(found), 3.4, 3.2, 2)
    for place, arena in zip(axes, found, strict=True):
        _draw_arena(place, arena, methods, margin)
        if len(found) > 1:
            printed.heading(place, arena.title, 46)
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=1, label=label(method))
        for method, (colour, marker) in [("stl", _style("stl", methods)),
                                         *((m, _style(m, methods)) for m in methods)]
    ]  # fmt: skip
    printed.key(figure, handles)
    return figure


def _style(method: str, methods: Sequence[str]) -> tuple[str, str]:
    if method == "stl":
        return INK, "X"
    place = methods.index(method)
    return PALETTE[1 + place % (len(PALETTE) - 1)], MARKERS[place % len(MARKERS)]


def _draw_arena(axes: Axes, arena: Arena, methods: Sequence[str], margin: float) -> None:
    least = 100 * arena.reference.safety.estimate - margin
    axes.axhline(least, color=INK, linestyle=(0, (4, 3)), linewidth=0.8, alpha=0.6)
    for method in ("stl", *methods):
        colour, marker = _style(method, methods)
        own = [p for p in arena.points if p.method == method]
        swept = sorted((p for p in own if p.strength is not None), key=lambda p: p.strength or 0)
        _draw_sweeps(axes, arena, swept, colour)
        for point in own:
            _draw_point(axes, point, colour, marker)
        chosen = arena.chosen.get(method)
        if chosen:
            axes.plot(100 * chosen.compliance.estimate, 100 * chosen.safety.estimate, "o",
                      markersize=11, markerfacecolor="none", markeredgecolor=colour,
                      markeredgewidth=1.2, zorder=4)  # fmt: skip
    axes.set_xlabel("compliance with seemingly toxic prompts, %")
    axes.set_ylabel(f"{arena.safety}, %")
    axes.margins(0.08)


def _draw_sweeps(axes: Axes, arena: Arena, swept: Sequence[Operating], colour: str) -> None:
    """A line a run and choice of other settings; from the reference on where its run is steered."""
    for folder, rest in dict.fromkeys(map(_sweep, swept)):
        line = [point for point in swept if _sweep(point) == (folder, rest)]
        if arena.reference.run.folder == folder and all(point.strength for point in line):
            line = [arena.reference, *line]
        xs, ys = ([100 * end.estimate for end in ends] for ends in _ends(line))
        axes.plot(xs, ys, color=colour, linewidth=1.2, zorder=2)
    for point in swept:
        axes.annotate(f"{point.strength:g}",
                      (100 * point.compliance.estimate, 100 * point.safety.estimate),
                      xytext=(6, 5), textcoords="offset points", fontsize=6.5, color=colour,
                      zorder=5)  # fmt: skip


def _sweep(point: Operating) -> tuple[Path, str]:
    """What all points of one curve share: the run, and every setting but the strength."""
    edit = flattened({"": point.evaluation.settings.get("steering")})
    rest = {key: value for key, value in edit.items() if key.rpartition(".")[2] != "strength"}
    return point.run.folder, storage.fingerprint(rest)


def _ends(line: Sequence[Operating]) -> tuple[list[Interval], list[Interval]]:
    return [point.compliance for point in line], [point.safety for point in line]


def _draw_point(axes: Axes, point: Operating, colour: str, marker: str) -> None:
    x, y = point.compliance, point.safety
    if point.evaluation.weights == "snapshot":  # intervals of every checkpoint would hide all else
        axes.plot(100 * x.estimate, 100 * y.estimate, marker, color=printed.shade(colour, 0.2),
                  markersize=3, zorder=1)  # fmt: skip
        return
    axes.errorbar(
        100 * x.estimate, 100 * y.estimate, xerr=_arms(x), yerr=_arms(y), fmt=marker,
        color=colour, markersize=5, elinewidth=0.6, ecolor=printed.shade(colour, 0.45), zorder=3,
    )  # fmt: skip


def _arms(interval: Interval) -> list[list[float]]:
    below, above = interval.estimate - interval.low, interval.high - interval.estimate
    return [[100 * max(0.0, below)], [100 * max(0.0, above)]]
