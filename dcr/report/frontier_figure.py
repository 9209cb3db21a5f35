"""Figure 4: compliance against rejection over the checkpoints of SFT."""

from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dcr.config import Kind, UserError
from dcr.report import printed
from dcr.report.figures import MARKERS, PALETTE
from dcr.report.printed import Printed
from dcr.report.records import Evaluation, RunRecord
from dcr.report.refusal_figures import BOTH, rate_of, scoring_command
from dcr.report.tables import together
from dcr.report.trajectories import config_of, folders, names, shared_sets, snapshots
from dcr.statistics import Interval

XSTEST = {Kind.seemingly_toxic: ["xstest_safe"], Kind.toxic: ["xstest_unsafe"]}
HEADER = ("run", "method", "model", "step", "compliance", "compliance_low", "compliance_high",
          "rejection", "rejection_low", "rejection_high", "compliance_of",
          "rejection_of")  # fmt: skip


def figure4(records: Sequence[RunRecord]) -> Printed:
    """The frontier over checkpoints: compliance against rejection, light to dark."""
    chosen = [r for r in records if config_of(r, "method") in ("stl", "dcr")] or list(records)
    found = [(run, snapshots(run, lambda e: e.sets)) for run in chosen]
    have = [(run, scored) for run, scored in found if scored]
    if not have:
        raise UserError(
            f"figure 4: no scored snapshots in {folders(chosen)}; {scoring_command(chosen)}"
        )
    sets, told = _frontier_sets([e for _, scored in have for e in scored])
    if not all(sets.values()):
        raise UserError(
            f"figure 4: the snapshots of {folders(r for r, _ in have)} share no sets of both "
            f"kinds; {scoring_command(chosen)}"
        )
    called = names([run for run, _ in have])
    frontiers = [
        (name, run, [(e.step or 0, *_pair(e, sets)) for e in scored])
        for name, (run, scored) in zip(called, have, strict=True)
    ]
    rows = [
        (name, config_of(run, "method"), config_of(run, "model"), step,
         x.estimate, x.low, x.high, y.estimate, y.low, y.high, told["x"], told["y"])
        for name, run, points in frontiers
        for step, x, y in points
    ]  # fmt: skip
    return Printed(
        "figure4",
        "Figure 4: the frontier over checkpoints",
        f"Compliance with {told['x']} against the keyword rejection rate of {told['y']}: one point "
        "a checkpoint, from light (early) to dark (late); the numbers are the first and the last "
        "step. Top right is best. Of several evaluation settings, that of the most snapshots.",
        HEADER,
        rows,
        lambda: _draw_frontiers([(n, points) for n, _, points in frontiers], told),
        notes=tuple(
            f"figure 4: no scored snapshots in {folders([r])}" for r, scored in found if not scored
        ),
    )


def _frontier_sets(scored: Sequence[Evaluation]) -> tuple[dict[Kind, list[str]], dict[str, str]]:
    """XSTest where every snapshot was evaluated on it, else all that they share, and its name."""
    shared = shared_sets(scored)
    if all(name in shared for chosen in XSTEST.values() for name in chosen):
        return XSTEST, {"x": "XSTest-safe", "y": "XSTest-unsafe"}
    sets = {
        kind: together([name for name, score in shared.items() if score.kind is kind])
        for kind in BOTH
    }
    of = {kind: "one set" if len(chosen) == 1 else "sets pooled" for kind, chosen in sets.items()}
    return sets, {
        "x": f"seemingly toxic prompts ({of[Kind.seemingly_toxic]}, XSTest not evaluated)",
        "y": f"toxic prompts ({of[Kind.toxic]}, XSTest not evaluated)",
    }


def _pair(e: Evaluation, sets: dict[Kind, list[str]]) -> tuple[Interval, Interval]:
    x, y = (rate_of(e, kind, sets[kind], wanted=True) for kind in BOTH)
    nothing = Interval(float("nan"), float("nan"), float("nan"))
    return x or nothing, y or nothing


Frontier = tuple[str, Sequence[tuple[int, Interval, Interval]]]


def _draw_frontiers(frontiers: Sequence[Frontier], told: dict[str, str]) -> Figure:
    figure, (axes,) = printed.panels(1, 3.8, 3.5)
    handles = []
    for place, (name, points) in enumerate(frontiers):
        colour = PALETTE[1 + place % (len(PALETTE) - 1)]
        marker = MARKERS[place % len(MARKERS)]
        xs, ys = [100 * x.estimate for _, x, _ in points], [100 * y.estimate for *_, y in points]
        axes.plot(xs, ys, color=printed.shade(colour, 0.25), linewidth=0.9, zorder=2)
        last = max(1, len(points) - 1)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            axes.plot(x, y, marker, color=printed.shade(colour, i / last), markersize=5,
                      markeredgecolor=colour, markeredgewidth=0.4, zorder=3)  # fmt: skip
        for i in sorted({0, len(points) - 1}):
            up = 5 if i else 5 - 10 * (place % 2)  # frontiers often begin in one point
            axes.annotate(f"{points[i][0]}", (xs[i], ys[i]), xytext=(5, up), fontsize=7,
                          textcoords="offset points", color=colour, zorder=5)  # fmt: skip
        handles.append(
            Line2D([], [], color=colour, marker=marker, markersize=5, linewidth=0.9, label=name)
        )
    axes.set(xlim=(-3, 108), ylim=(-3, 106))
    axes.set_xlabel(_folded(f"compliance with {told['x']}, %"))
    axes.set_ylabel(_folded(f"rejection of {told['y']}, %"))
    printed.key(figure, handles, columns=2)
    return figure


def _folded(text: str) -> str:
    return text.replace(" (", "\n(")
