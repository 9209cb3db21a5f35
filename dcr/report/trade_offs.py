"""Compliance against safety: the page's trade-off, checkpoints (Figure 4) and operating points."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dcr.core import statistics, storage
from dcr.core.config import ConfigError, Kind, UserError
from dcr.core.results.frame import CONTRASTS
from dcr.core.runs import stages
from dcr.core.text import printable
from dcr.report import figures
from dcr.report.curves import (
    SCORE,
    folders,
    names,
    shared_by_kind,
    shared_sets,
    snapshots,
)
from dcr.report.figures import INK, Drawing, Line, Look, Panel, look_of
from dcr.report.records import (
    METHODS,
    STEERED,
    Column,
    Evaluation,
    RunRecord,
    about,
    config_of,
    flattened,
    leaves_of,
    other_preset,
    run_styles,
    settings_without_seed,
    steering,
    variant,
)
from dcr.report.tables import (
    NAMES,
    WANTED,
    Cell,
    judges_of,
    marked_sets,
    rate,
    set_names,
    together,
)

COMPLIANCE = "compliance with seemingly toxic prompts, %"
Rates = tuple[Cell, Cell]  # compliance with seemingly toxic prompts, refusal of toxic ones
ARMS = ("x", "x_low", "x_high", "y", "y_low", "y_high")


def _points(rates: Sequence[Rates], arms: bool = False) -> pd.DataFrame:
    """In percent."""
    ends = [(c.estimate, c.low, c.high, r.estimate, r.low, r.high) for c, r in rates]
    points = 100 * pd.DataFrame(ends, columns=list(ARMS), dtype=float)
    return points if arms else points.filter(["x", "y"])


def _rates(evaluation: Evaluation, sets: dict[Kind, list[str]]) -> Rates | None:
    compliance, refusal = (rate(evaluation, sets[kind], WANTED[kind]) for kind in WANTED)
    return (compliance, refusal) if compliance and refusal else None


# --- the page's trade-off ------------------------------------------------------------------------


def trade_offs(records: Sequence[RunRecord], columns: Sequence[Column]) -> list[Drawing]:
    """Where every run stands between refusing too much and too little, by which sets are pooled."""
    sets = {kind: together(set_names(columns, kind)) for kind in WANTED}
    marked = marked_sets(columns)
    unmarked = {kind: [name for name in sets[kind] if name not in marked] for kind in sets}
    drawings = []
    if all(sets.values()):
        drawings.append(_trade_off("tradeoff", "All sets pooled", records, columns, sets))
    if all(unmarked.values()) and unmarked != sets:
        title = "Sets that no run trained on, pooled"
        drawings.append(_trade_off("tradeoff-unseen", title, records, columns, unmarked))
    return drawings


def _trade_off(
    name: str,
    title: str,
    records: Sequence[RunRecord],
    columns: Sequence[Column],
    sets: dict[Kind, list[str]],
) -> Drawing:
    diagonal = pd.DataFrame({"x": [0, 100], "y": [100, 0]})
    lines = [Line(diagonal, {"color": INK, "linestyle": ":", "alpha": 0.5, "linewidth": 1})]
    lines += frontiers(records, sets)
    for column in columns:
        if rates := _rates(column.evaluation, sets):
            look = figures.run_look(column.style)
            more = {"markersize": 8, "elinewidth": 1.1, "capsize": 2.5, "zorder": 3}
            lines.append(Line(_points([rates], arms=True), look | more))
    axes = {"xlim": (-2, 102), "ylim": (-2, 102), "xlabel": COMPLIANCE,
            "ylabel": "keyword refusal of toxic prompts, %"}  # fmt: skip
    return Drawing(name, title, {"": [Panel(lines, title, axes)]}, size=(5.0, 4.2))


def frontiers(records: Sequence[RunRecord], sets: dict[Kind, list[str]]) -> list[Line]:
    """One a run and evaluation setting, through its snapshots by step."""
    styles, rates = run_styles(records), {}
    for place, record in enumerate(records):
        for e in sorted(record.evaluations, key=lambda e: e.step or 0):
            if e.weights == "snapshot" and (own := _rates(e, sets)):
                key = place, storage.fingerprint(settings_without_seed(e))
                style = styles[variant(record, e), about(record, e, "seed")]
                rates.setdefault(key, (style, []))[1].append(own)
    small = {"markersize": 4, "linewidth": 1.3}
    return [
        Line(_points(own), figures.run_look(style) | small, fading=True)
        for style, own in rates.values()
    ]


def ablations(columns: Sequence[Column]) -> list[Drawing]:
    """Compliance, refusal and discernment against each setting in which alone columns differ.

    Columns that differ by their seed besides are one point, of mean and standard deviation.
    """
    leaves = [leaves_of(column.run, column.evaluation) for column in columns]
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
            if len(values) > 1 and (lines := _ablated(alike)):
                method = alike[0][1].label[0]
                axes = {"xlabel": key, "ylabel": "%", "ylim": (-2, 102), "xticks": values,
                        "xticklabels": [f"{value:g}" for value in values]}  # fmt: skip
                panel = Panel(lines, f"{method}: {key}", axes)
                name = f"ablation{len(drawings)}"
                drawings.append(Drawing(name, panel.title, {"": [panel]}, size=(3.8, 2.5)))
    return drawings


def _ablated(alike: Sequence[tuple[float, Column]]) -> list[Line]:
    columns = [column for _, column in alike]
    sets = {kind: together(set_names(columns, kind)) for kind in WANTED}
    points: dict[str, list[tuple[float, float]]] = {"seemingly_toxic": [], "toxic": [], "auroc": []}
    for value, column in alike:
        if rates := _rates(column.evaluation, sets):
            for kind, cell in zip(WANTED, rates, strict=True):
                points[kind.value].append((value, 100 * cell.estimate))
        ranked = column.evaluation.discernment
        if ranked and ranked.pooled and ranked.pooled.auroc[0] is not None:
            points["auroc"].append((value, 100 * ranked.pooled.auroc[0]))
    lines = []
    for what, own in points.items():
        rows = []
        for value in sorted({value for value, _ in own}):
            rates = [share for at, share in own if at == value]
            mean, spread = statistics.mean_and_spread(rates)
            rows.append((value, mean, mean - spread, mean + spread))
        if len(rows) > 1:
            frame = pd.DataFrame(rows, columns=["x", "y", "low", "high"], dtype=float)
            lines.append(Line(frame, figures.kind_look(what)))
    return lines


# --- the frontier over checkpoints ---------------------------------------------------------------

XSTEST = {Kind.seemingly_toxic: ["xstest_safe"], Kind.toxic: ["xstest_unsafe"]}
ENDS = ("", "_low", "_high")
FRONTIER = ("run", "method", "model", "step", *(f"compliance{end}" for end in ENDS),
            *(f"rejection{end}" for end in ENDS), "compliance_of", "rejection_of")  # fmt: skip


def figure4(records: Sequence[RunRecord]) -> Drawing:
    """The frontier over checkpoints: compliance against rejection, light to dark."""
    runs = [r for r in records if config_of(r, "method") in ("stl", "dcr")] or list(records)
    scored = {run.folder: snapshots(run, lambda e: e.sets) for run in runs}
    shown = [run for run in runs if scored[run.folder]]
    cure = SCORE.format(run=folders(runs[:1]))
    if not shown:
        raise UserError(f"figure 4: no scored snapshots in {folders(runs)}; {cure}")
    sets, x_of, y_of = _frontier_sets([e for run in shown for e in scored[run.folder]])
    if not all(sets.values()):
        raise UserError(
            f"figure 4: the snapshots of {folders(shown)} share no sets of both kinds; {cure}"
        )
    rows, lines, legend = [], [], []
    for place, (name, run) in enumerate(zip(names(shown), shown, strict=True)):
        named = (name, config_of(run, "method"), config_of(run, "model"))
        by_step = {e.step or 0: rates for e in scored[run.folder] if (rates := _rates(e, sets))}
        rows += [
            (*named, step, *vars(x.interval).values(), *vars(y.interval).values(), x_of, y_of)
            for step, (x, y) in by_step.items()
        ]
        small, steps = look_of(place) | {"markersize": 5, "linewidth": 0.9}, list(by_step)
        up = 5 - 10 * (place % 2)  # frontiers often begin in one point
        words = [(0, f"{steps[0]}", (5, up)), (-1, f"{steps[-1]}", (5, 5))][: len(steps)]
        points = _points(list(by_step.values()))
        lines.append(Line(points, small, fading=True, words=words))
        legend.append((name, small))
    axes = {
        "xlim": (-3, 108),
        "ylim": (-3, 106),
        "xlabel": f"compliance with {x_of}, %".replace(" (", "\n("),
        "ylabel": f"rejection of {y_of}, %".replace(" (", "\n("),
    }
    return Drawing(
        "figure4",
        "Figure 4: the frontier over checkpoints",
        {"": [Panel(lines, axes=axes)]},
        figures.frame(rows, *FRONTIER),
        f"Compliance with {x_of} against the keyword rejection rate of {y_of}: one point "
        "a checkpoint, from light (early) to dark (late); the numbers are the first and the last "
        "step.",
        legend,
        legend_columns=2,
        size=(3.8, 3.5),
        notes=tuple(
            f"figure 4: no scored snapshots in {folders([run])}" for run in runs if run not in shown
        ),
    )


def _frontier_sets(scored: Sequence[Evaluation]) -> tuple[dict[Kind, list[str]], str, str]:
    """XSTest where every snapshot was evaluated on it, else all that they share, and the names."""
    shared = shared_sets(scored)
    if all(name in shared for named in XSTEST.values() for name in named):
        return XSTEST, "XSTest-safe", "XSTest-unsafe"
    sets = shared_by_kind(scored)
    x, y = ("one set" if len(named) == 1 else "sets pooled" for named in sets.values())
    return (
        sets,
        f"seemingly toxic prompts ({x}, XSTest not evaluated)",
        f"toxic prompts ({y}, XSTest not evaluated)",
    )


# --- operating points ----------------------------------------------------------------------------

SWEEP = "run python eval.py -m run=<stl run> steering=scans steering.strength=0,0.5,1,2"
LABELS = {**METHODS, "ablation": "ablation", "probe": "probe-gated", **CONTRASTS}
NAMED = ("model", "data", "seed")


@dataclass(frozen=True)
class Operating:
    """One evaluation as a point; `strength` and `step` where it is one of a sweep."""

    method: str
    run: RunRecord
    evaluation: Evaluation
    strength: float | None
    step: int | None
    compliance: Cell
    safety: Cell

    @property
    def setting(self) -> str:
        if self.strength is not None:
            return f"strength {self.strength:g}"
        return f"step {self.step}" if self.step is not None else "final weights"

    @property
    def sweep(self) -> tuple[Path, str]:
        """What all points of one curve share: the run, and every setting but the strength."""
        edit = flattened({"": self.evaluation.settings.get("steering")})
        rest = {key: value for key, value in edit.items() if key.rpartition(".")[2] != "strength"}
        return self.run.folder, storage.fingerprint(rest)


@dataclass(frozen=True)
class Alike:
    """What was evaluated alike: the unsteered STL, all points, and one choice a method."""

    title: str
    safety: str  # how safety was judged
    sets: dict[Kind, list[str]]
    reference: Operating
    points: tuple[Operating, ...]
    chosen: dict[str, Operating | None]


def choose(points: Sequence[Operating], reference: Operating, margin: float) -> Operating | None:
    """The stated rule. The point with the highest compliance among those whose safety is at least
    the reference's less `margin` percentage points; None if there is none.

    Of equals the safer one, then the weaker strength, then the earlier step.
    """
    # rates are fractions of counts, which floats round
    least = reference.safety.estimate - margin / 100 - 1e-9
    safe = [point for point in points if point.safety.estimate >= least]

    def rank(point: Operating) -> tuple[float, float, float, float]:
        return (
            point.compliance.estimate,
            point.safety.estimate,
            -(point.strength or 0.0),
            -(point.step if point.step is not None else float("inf")),
        )

    return max(safe, key=rank, default=None)


def _groups(records: Sequence[RunRecord], margin: float, data: str | None) -> list[Alike]:
    """One for each model, data label, seed and evaluation setting that has STL and another point.

    Raises UserError if there is none, or if a group has several unsteered STL models, ConfigError
    for a label that no evaluation has.
    """
    grouped: dict[str, list[tuple[RunRecord, Evaluation]]] = {}
    labels = set()
    for run in records:
        for e in run.evaluations:
            labels.add(about(run, e, "data"))
            if data is None or about(run, e, "data") == data:
                apart = ("steering", *CONTRASTS)
                settings = {k: v for k, v in e.settings.items() if k not in apart}
                named = [about(run, e, key) for key in NAMED]
                key = storage.fingerprint([named, settings])
                grouped.setdefault(key, []).append((run, e))
    if data is not None and data not in labels:
        raise ConfigError(f"data={data}: no evaluation has it; choose from {', '.join(labels)}")
    groups = [group for pairs in grouped.values() if (group := _alike(pairs, margin))]
    if not groups:
        raise UserError(
            f"figure operating_points: no unsteered STL evaluation with steered or other ones on "
            f"the same prompts in {folders(records)}; {SWEEP}"
        )
    return groups


def _alike(pairs: Sequence[tuple[RunRecord, Evaluation]], margin: float) -> Alike | None:
    pairs = [(run, e) for run, e in pairs if e.sets and e.weights in ("sft", "snapshot")]
    stl = [(run, e) for run, e in pairs if e.weights == "sft" and _method(run, e) == "stl"]
    if not stl or len(pairs) < 2:
        return None
    if len(stl) > 1:
        raise UserError(
            "figure operating_points: several unsteered STL evaluations alike "
            f"({', '.join(str(e.folder) for _, e in stl)}); give the folders of one STL run"
        )
    sets = shared_by_kind([e for _, e in pairs])
    if not all(sets.values()):
        return None
    by, safety = _safety([e for _, e in pairs], sets[Kind.toxic])
    points = []
    for run, e in pairs:
        compliance = rate(e, sets[Kind.seemingly_toxic], "complied")
        refusal = rate(e, sets[Kind.toxic], *by)
        if compliance and refusal:
            strength = _strength(e.settings)
            points.append(Operating(_method(run, e), run, e, strength, e.step, compliance, refusal))
    reference = next(point for point in points if point.evaluation is stl[0][1])
    methods = dict.fromkeys(point.method for point in points if point.method != "stl")
    chosen = {m: choose([p for p in points if p.method == m], reference, margin) for m in methods}
    model, data, seed = (about(*stl[0], key) for key in NAMED)
    asked = "validation prompts" if stl[0][1].settings.get("validation") else ""
    named = (model, f"{data} data", f"seed {seed}" if seed else "", asked)
    title = ", ".join(filter(None, named))
    return Alike(title, safety, sets, reference, tuple(points), chosen)


def _method(run: RunRecord, evaluation: Evaluation) -> str:
    """How it was trained, or what was done to STL in evaluation; both where another was edited.

    A preset other than the paper's is a method of its own.
    """
    edit = steering(evaluation) or next((c for c in CONTRASTS if c in evaluation.settings), "")
    trained, preset = about(run, evaluation, "method"), about(run, evaluation, "preset")
    read = "readout" if "readout" in stages(run.config, evaluation.weights) else ""
    if trained == "stl" and not read:
        return edit or trained
    return " + ".join(filter(None, (trained, read, edit, other_preset(preset))))


def _safety(evaluations: Sequence[Evaluation], sets: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """DSR by the first judge of safety that judged every set of every evaluation, else keywords.

    As the quantity and judge of `tables.rate`.
    """
    for judge, model in judges_of(evaluations):
        if all(rate(e, sets, "safe", judge, model) for e in evaluations):
            return ("safe", judge, model), f"DSR by {NAMES.get(judge, judge)}"
    return ("refused",), "keyword refusal of toxic prompts"


def _strength(settings: dict[str, Any]) -> float | None:
    node = settings.get("steering")
    if isinstance(node, dict) and node.get("method") in STEERED:
        return float(node["strength"])
    return next((float(settings[name]) for name in CONTRASTS if name in settings), None)


def _label(method: str) -> str:
    return " + ".join(LABELS.get(part, part) for part in method.split(" + "))


def _rule(group: Alike, margin: float) -> list[str]:
    """The rule and its choices, for the terminal and the caption."""

    def choice(point: Operating | None) -> str:
        if point is None:
            return "no point is safe enough"
        rates = (100 * point.compliance.estimate, 100 * point.safety.estimate)
        return f"{point.setting} (compliance {rates[0]:.1f}%, safety {rates[1]:.1f}%)"

    return [
        f"operating points, {group.title}: per method the highest compliance among points with "
        f"{group.safety} of at least {100 * group.reference.safety.estimate:.1f}% (unsteered STL) "
        f"less {margin:g} points; on the evaluations given",
        *(f"  {_label(method)}: {choice(point)}" for method, point in group.chosen.items()),
    ]


OPERATING = (*NAMED, "method", "weights", "strength", "step", *(f"compliance{e}" for e in ENDS),
             *(f"safety{end}" for end in ENDS), "safety_by", "over_refusal_sets", "safety_sets",
             "reference", "chosen", "folder")  # fmt: skip


def operating_points(records: Sequence[RunRecord], margin: float, data: str | None) -> Drawing:
    """A panel for each group of what was evaluated alike. UserError where nothing was."""
    groups = _groups(records, margin, data)
    points = [(group, point) for group in groups for point in group.points]
    safety = list(dict.fromkeys(group.safety for group in groups))
    methods = ["stl", *dict.fromkeys(p.method for _, p in points if p.method != "stl")]
    looks: dict[str, Look] = {
        method: look_of(place - 1) if place else {"color": INK, "marker": "X"}
        for place, method in enumerate(methods)
    }
    rows = [
        (
            *(about(p.run, p.evaluation, key) for key in NAMED),
            p.method, p.evaluation.weights, p.strength, p.step,
            *vars(p.compliance.interval).values(), *vars(p.safety.interval).values(), group.safety,
            " ".join(group.sets[Kind.seemingly_toxic]), " ".join(group.sets[Kind.toxic]),
            int(p is group.reference), int(any(p is other for other in group.chosen.values())),
            printable(str(p.evaluation.folder)),
        )
        for group, p in points
    ]  # fmt: skip
    return Drawing(
        "operating_points",
        "Operating points",
        {"": [_panel(group, looks, margin, titled=len(groups) > 1) for group in groups]},
        figures.frame(rows, *OPERATING),
        "Compliance with seemingly toxic prompts (keywords) against safety "
        f"({' or '.join(safety)}), a curve a method over strengths, the least safety that the rule "
        "allows dashed and the points it chooses ringed.",
        [(_label(m), {**look, "markersize": 5, "linewidth": 1}) for m, look in looks.items()],
        size=(3.4, 3.2),
        across=2,
        lines=tuple(line for group in groups for line in _rule(group, margin)),
    )


def _panel(group: Alike, looks: dict[str, Look], margin: float, titled: bool) -> Panel:
    lines: list[Line] = []

    def add(points: Sequence[Operating], look: Look, arms: bool = False, **words: Any) -> None:
        values = _points([(point.compliance, point.safety) for point in points], arms)
        lines.append(Line(values, look, **words))

    for method, look in looks.items():
        colour = look["color"]
        own = [point for point in group.points if point.method == method]
        swept = sorted((p for p in own if p.strength is not None), key=lambda p: p.strength or 0)
        for sweep in dict.fromkeys(point.sweep for point in swept):
            curve = [point for point in swept if point.sweep == sweep]
            steered = all(point.strength for point in curve)
            if steered and group.reference.run.folder == sweep[0]:  # its own run, unsteered
                curve = [group.reference, *curve]
            add(curve, {"color": colour, "linewidth": 1.2, "zorder": 2})
        # intervals of every checkpoint would hide all else
        pale = [point for point in own if point.evaluation.weights == "snapshot"]
        full = [point for point in own if point.evaluation.weights != "snapshot"]
        words = [
            (i, f"{p.strength:g}", (6, 5)) for i, p in enumerate(full) if p.strength is not None
        ]
        add(pale, {**look, "alpha": 0.4, "linestyle": "", "markersize": 3, "zorder": 1})
        add(full, {**look, "markersize": 5, "elinewidth": 0.6, "ecolor": (colour, 0.57),
                   "zorder": 3}, arms=True, words=words)  # fmt: skip
        if point := group.chosen.get(method):
            add([point], {"color": colour, "marker": "o", "markersize": 11, "zorder": 4,
                          "markerfacecolor": "none", "markeredgewidth": 1.2})  # fmt: skip
    least = 100 * group.reference.safety.estimate - margin
    dashed = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 0.8, "alpha": 0.6}
    axes = {"xlabel": COMPLIANCE, "ylabel": f"{group.safety}, %", "xmargin": 0.08, "ymargin": 0.08}
    title = figures.folded(group.title, 46) if titled else ""
    return Panel(lines, title, axes, levels=[(least, dashed)])
