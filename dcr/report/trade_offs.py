"""Compliance against safety: the page's trade-off, a setting's, and checkpoints (Figure 4)."""

from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path

import pandas as pd

from dcr import inference
from dcr.core import storage
from dcr.core.config import Kind, UserError
from dcr.report import figures, grids
from dcr.report.columns import Column, Style, evaluated, named, style_of
from dcr.report.curves import SCORE
from dcr.report.figures import INK, Curve, Drawing, Drawings, Panel, look_of
from dcr.report.grids import Cell
from dcr.report.records import Evaluation, folders
from dcr.report.sections import Selection

COMPLIANCE = "compliance with seemingly toxic prompts, %"
Rates = tuple[Cell, Cell]  # compliance with seemingly toxic prompts, refusal of toxic ones
ARMS = ("x", "x_low", "x_high", "y", "y_low", "y_high")


def points(rates: Sequence[Rates], arms: bool = False) -> pd.DataFrame:
    """The rates as points in percent."""
    ends = [(c.estimate, c.low, c.high, r.estimate, r.low, r.high) for c, r in rates]
    points = 100 * pd.DataFrame(ends, columns=list(ARMS), dtype=float)
    return points if arms else points.filter(["x", "y"])


def _rates(evaluation: Evaluation, sets: dict[Kind, list[str]]) -> Rates | None:
    compliance, refusal = (
        grids.rate(evaluation, sets[kind], grids.WANTED[kind]) for kind in grids.WANTED
    )
    return (compliance, refusal) if compliance and refusal else None


# --- the page's trade-off ------------------------------------------------------------------------


def trade_offs(chosen: Selection) -> Drawings:
    """The refusal trade-off.

    Top right is best. On the dotted line a model refuses toxic and seemingly toxic prompts alike.
    Thin lines run through snapshots of stage two, from light (early) to dark (late).
    """
    columns, drawings = chosen.columns, []
    marked = grids.marked_sets(columns)
    sets = {kind: grids.together(grids.set_names(columns, kind)) for kind in grids.WANTED}
    unmarked = {kind: [name for name in sets[kind] if name not in marked] for kind in sets}
    if all(sets.values()):
        drawings.append(_trade_off(chosen, "tradeoff", "All sets pooled", sets))
    if all(unmarked.values()) and unmarked != sets:
        title = "Sets that no run trained on, pooled"
        drawings.append(_trade_off(chosen, "tradeoff-unseen", title, unmarked))
    named = dict[Style, list[str]]()
    for column in columns:
        if _rates(column.evaluation, sets):
            named.setdefault(column.style, []).append(column.name)
    for run in chosen.records:
        if any(e.weights == "snapshot" and _rates(e, sets) for e in run.evaluations):
            named.setdefault(style_of(run, chosen.styles), [run.folder.name])
    legend = [(style, ", or ".join(names)) for style, names in named.items()]
    return Drawings(drawings, figures.style_legend(legend))


def _trade_off(chosen: Selection, name: str, title: str, sets: dict[Kind, list[str]]) -> Drawing:
    diagonal = pd.DataFrame({"x": [0, 100], "y": [100, 0]})
    drawn = [Curve(diagonal, {"color": INK, "linestyle": ":", "alpha": 0.5, "linewidth": 1})]
    # a curve for each run and evaluation setting, through its snapshots by step
    frontiers = dict[tuple[Path, str], tuple[Style, list[Rates]]]()
    for run in chosen.records:
        for column in sorted(evaluated([run]), key=lambda column: column.evaluation.step or 0):
            e = column.evaluation
            if e.weights == "snapshot" and (rates := _rates(e, sets)):
                key = run.folder, storage.fingerprint(e.settings_without_seed)
                _, own = frontiers.setdefault(key, (chosen.styles[column.look], []))
                own.append(rates)
    for style, own in frontiers.values():
        small = figures.run_look(style) | {"markersize": 4, "linewidth": 1.3}
        drawn.append(Curve(points(own), small, fading=True))
    for column in chosen.columns:
        if rates := _rates(column.evaluation, sets):
            more = {"markersize": 8, "elinewidth": 1.1, "capsize": 2.5, "zorder": 3}
            drawn.append(Curve(points([rates], arms=True), figures.run_look(column.style) | more))
    axes = {"xlim": (-2, 102), "ylim": (-2, 102), "xlabel": COMPLIANCE,
            "ylabel": "keyword refusal of toxic prompts, %"}  # fmt: skip
    return Drawing(name, title, {"": [Panel(drawn, title, axes)]}, size=(5.0, 4.2))


def ablations(chosen: Selection) -> Drawings:
    """Against a setting.

    Runs that differ by one setting alone; several seeds are one point, in a band of one standard
    deviation.
    """
    columns = chosen.columns
    leaves = [column.leaves for column in columns]
    numbers = {
        key
        for leaf in leaves
        for key, value in leaf.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool) and key != "eval.seed"
    }
    drawings = []
    for key in sorted(numbers):
        groups: dict[str, list[tuple[float, Column]]] = {}
        for leaf, column in zip(leaves, columns, strict=True):
            if isinstance(leaf.get(key), (int, float)):
                rest = {name: v for name, v in leaf.items() if name not in (key, "eval.seed")}
                about = [column.about("method"), column.about("model"), column.evaluation.weights]
                alike = groups.setdefault(storage.fingerprint([about, rest]), [])
                alike.append((leaf[key], column))
        for alike in groups.values():
            values = sorted({value for value, _ in alike})
            if len(values) > 1 and (drawn := _ablated(alike)):
                axes = {"xlabel": key, "ylabel": "%", "ylim": (-2, 102), "xticks": values,
                        "xticklabels": [f"{value:g}" for value in values]}  # fmt: skip
                panel = Panel(drawn, f"{alike[0][1].label[0]}: {key}", axes)
                name = f"ablation{len(drawings)}"
                drawings.append(Drawing(name, panel.title, {"": [panel]}, size=(3.8, 2.5)))
    legend = [
        (1, "●", "compliance with seemingly toxic prompts"),
        (2, "■", "keyword refusal of toxic prompts"),
        (0, "◆", "discernment AUROC, hundredths"),
    ]
    return Drawings(drawings, legend)


def _ablated(alike: Sequence[tuple[float, Column]]) -> list[Curve]:
    columns = [column for _, column in alike]
    sets = {kind: grids.together(grids.set_names(columns, kind)) for kind in grids.WANTED}
    points = []
    for value, column in alike:
        if rates := _rates(column.evaluation, sets):
            of = zip(grids.WANTED, rates, strict=True)
            points += [(kind.value, value, 100 * cell.estimate) for kind, cell in of]
        if auroc := grids.ranked(column.evaluation, "discernment"):
            points.append(("auroc", value, 100 * auroc.estimate))
    drawn = []
    every = figures.frame(points, "what", "x", "y")
    for what in (*(kind.value for kind in grids.WANTED), "auroc"):
        rows = []
        for value, own in every[every.what == what].groupby("x"):
            mean, spread = inference.mean_and_spread([*own["y"]])
            rows.append((value, mean, mean - spread, mean + spread))
        if len(rows) > 1:
            frame = pd.DataFrame(rows, columns=["x", "y", "low", "high"], dtype=float)
            drawn.append(Curve(frame, figures.kind_look(what)))
    return drawn


# --- the frontier over checkpoints ---------------------------------------------------------------

XSTEST = {Kind.seemingly_toxic: ["xstest_safe"], Kind.toxic: ["xstest_unsafe"]}
ENDS = ("", "_low", "_high")
FRONTIER = ("run", "method", "model", "step", *(f"compliance{end}" for end in ENDS),
            *(f"rejection{end}" for end in ENDS), "compliance_of", "rejection_of")  # fmt: skip


def trained_on(evaluations: Iterable[Evaluation], sets: Iterable[Sequence[str]]) -> str:
    """A sentence on the sets among these that training saw; empty without any."""
    seen = {n for e in evaluations for n, of in e.sets.items() if of.in_distribution}
    known = [grids.in_words(name) for name in dict.fromkeys(chain(*sets)) if name in seen]
    return f" Some of these runs were trained on: {'; '.join(known)}." if known else ""


def checkpoints(chosen: Selection) -> Drawing:
    """Figure 4, the frontier over checkpoints: compliance against rejection, light to dark."""
    records = list(chosen.records)
    runs = [r for r in records if r.about("method") in ("stl", "dcr")] or records
    scored = {run.folder: run.snapshots(lambda e: e.sets) for run in runs}
    shown = [run for run in runs if scored[run.folder]]
    cure = SCORE.format(run=folders(runs[:1]))
    if not shown:
        raise UserError(f"figure 4: no scored snapshots in {folders(runs)}; {cure}")
    sets = grids.shared_by_kind([e for run in shown for e in scored[run.folder]])
    if not all(sets.values()):
        raise UserError(
            f"figure 4: the snapshots of {folders(shown)} share no sets of both kinds; {cure}"
        )
    x_of, y_of = (
        f"{kind} prompts ({'one set' if len(names) == 1 else 'sets pooled'}, XSTest not evaluated)"
        for kind, names in zip(("seemingly toxic", "toxic"), sets.values(), strict=True)
    )
    if all(set(names) <= set(sets[kind]) for kind, names in XSTEST.items()):
        sets, x_of, y_of = XSTEST, "XSTest-safe", "XSTest-unsafe"
    rows, drawn, legend = [], [], []
    for place, (run, name) in enumerate(named(shown, "snapshot")):
        about_run = (name, run.about("method"), run.about("model"))
        by_step = {e.step or 0: rates for e in scored[run.folder] if (rates := _rates(e, sets))}
        rows += [
            (*about_run, step, *vars(x.interval).values(), *vars(y.interval).values(), x_of, y_of)
            for step, (x, y) in by_step.items()
        ]
        small, steps = look_of(place) | {"markersize": 5, "linewidth": 0.9}, list(by_step)
        up = 5 - 10 * (place % 2)  # frontiers often begin in one point
        words = [(0, f"{steps[0]}", (5, up)), (-1, f"{steps[-1]}", (5, 5))][: len(steps)]
        drawn.append(Curve(points(list(by_step.values())), small, fading=True, words=words))
        legend.append((name, small))
    axes = {"xlim": (-3, 108), "ylim": (-3, 106),
            "xlabel": f"compliance with {x_of}, %".replace(" (", "\n("),
            "ylabel": f"rejection of {y_of}, %".replace(" (", "\n(")}  # fmt: skip
    chosen.leave_out("4", "scored snapshots", [run for run in runs if run not in shown])
    return Drawing(
        "figure4",
        "Figure 4: the frontier over checkpoints",
        {"": [Panel(drawn, axes=axes)]},
        figures.frame(rows, *FRONTIER),
        f"Compliance with {x_of} against the keyword rejection rate of {y_of}, a point a "
        "checkpoint, from light (early) to dark (late), with the first and the last step."
        + trained_on([e for run in shown for e in scored[run.folder]], sets.values()),
        legend,
        legend_columns=2,
        size=(3.8, 3.5),
    )
