"""Compliance against safety: the page's trade-off, checkpoints (Figure 4) and operating points."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import pandas as pd

from dcr import inference, results
from dcr.core import storage
from dcr.core.config import ConfigError, Kind, UserError
from dcr.core.runs import stages
from dcr.ending import printable
from dcr.report import figures
from dcr.report.curves import SCORE, folders, named, shared_by_kind, snapshots
from dcr.report.figures import INK, Curve, Drawing, Drawings, Look, Panel, look_of
from dcr.report.grids import (
    NAMES,
    WANTED,
    Cell,
    in_words,
    judges_of,
    marked_sets,
    ranked,
    rate,
    set_names,
    together,
)
from dcr.report.records import (
    METHODS,
    STEERED,
    Column,
    Evaluation,
    RunRecord,
    Style,
    about,
    config_of,
    flattened,
    leaves_of,
    other_preset,
    run_styles,
    settings_without_seed,
    steering,
    style_of,
    told,
    variant,
)
from dcr.report.sections import Selection
from dcr.results.frame import CONTRASTS

COMPLIANCE = "compliance with seemingly toxic prompts, %"
Rates = tuple[Cell, Cell]  # compliance with seemingly toxic prompts, refusal of toxic ones
ARMS = ("x", "x_low", "x_high", "y", "y_low", "y_high")


def _points(rates: Sequence[Rates], arms: bool = False) -> pd.DataFrame:
    """The rates as points in percent."""
    ends = [(c.estimate, c.low, c.high, r.estimate, r.low, r.high) for c, r in rates]
    points = 100 * pd.DataFrame(ends, columns=list(ARMS), dtype=float)
    return points if arms else points.filter(["x", "y"])


def _rates(evaluation: Evaluation, sets: dict[Kind, list[str]]) -> Rates | None:
    compliance, refusal = (rate(evaluation, sets[kind], WANTED[kind]) for kind in WANTED)
    return (compliance, refusal) if compliance and refusal else None


# --- the page's trade-off ------------------------------------------------------------------------


def trade_offs(chosen: Selection) -> Drawings:
    """The refusal trade-off.

    Top right is best. On the dotted line a model refuses toxic and seemingly toxic prompts alike.
    Thin lines run through snapshots of stage two, from light (early) to dark (late).
    """
    records, columns = chosen.records, chosen.columns
    sets = {kind: together(set_names(columns, kind)) for kind in WANTED}
    marked = marked_sets(columns)
    unmarked = {kind: [name for name in sets[kind] if name not in marked] for kind in sets}
    drawings = []
    if all(sets.values()):
        drawings.append(_trade_off("tradeoff", "All sets pooled", records, columns, sets))
    if all(unmarked.values()) and unmarked != sets:
        title = "Sets that no run trained on, pooled"
        drawings.append(_trade_off("tradeoff-unseen", title, records, columns, unmarked))
    styles, named = run_styles(records), dict[Style, list[str]]()
    for column in columns:
        if _rates(column.evaluation, sets):
            named.setdefault(column.style, []).append(column.name)
    for run in records:
        if any(e.weights == "snapshot" and _rates(e, sets) for e in run.evaluations):
            named.setdefault(style_of(run, styles), [run.folder.name])
    legend = [(style, ", or ".join(names)) for style, names in named.items()]
    return Drawings(drawings, figures.style_legend(legend))


def _trade_off(
    name: str,
    title: str,
    records: Sequence[RunRecord],
    columns: Sequence[Column],
    sets: dict[Kind, list[str]],
) -> Drawing:
    diagonal = pd.DataFrame({"x": [0, 100], "y": [100, 0]})
    drawn = [Curve(diagonal, {"color": INK, "linestyle": ":", "alpha": 0.5, "linewidth": 1})]
    drawn += frontiers(records, sets)
    for column in columns:
        if rates := _rates(column.evaluation, sets):
            look = figures.run_look(column.style)
            more = {"markersize": 8, "elinewidth": 1.1, "capsize": 2.5, "zorder": 3}
            drawn.append(Curve(_points([rates], arms=True), look | more))
    axes = {"xlim": (-2, 102), "ylim": (-2, 102), "xlabel": COMPLIANCE,
            "ylabel": "keyword refusal of toxic prompts, %"}  # fmt: skip
    return Drawing(name, title, {"": [Panel(drawn, title, axes)]}, size=(5.0, 4.2))


def frontiers(records: Sequence[RunRecord], sets: dict[Kind, list[str]]) -> list[Curve]:
    """A curve for each run and evaluation setting, through its snapshots by step."""
    styles, rates = run_styles(records), {}
    for place, record in enumerate(records):
        for e in sorted(record.evaluations, key=lambda e: e.step or 0):
            if e.weights == "snapshot" and (own := _rates(e, sets)):
                key = place, storage.fingerprint(settings_without_seed(e))
                style = styles[variant(record, e), about(record, e, "seed")]
                rates.setdefault(key, (style, []))[1].append(own)
    small = {"markersize": 4, "linewidth": 1.3}
    return [
        Curve(_points(own), figures.run_look(style) | small, fading=True)
        for style, own in rates.values()
    ]


def ablations(chosen: Selection) -> Drawings:
    """Against a setting.

    Runs that differ by one setting alone; several seeds are one point, in a band of one standard
    deviation.
    """
    columns = chosen.columns
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
    sets = {kind: together(set_names(columns, kind)) for kind in WANTED}
    points = []
    for value, column in alike:
        if rates := _rates(column.evaluation, sets):
            of = zip(WANTED, rates, strict=True)
            points += [(kind.value, value, 100 * cell.estimate) for kind, cell in of]
        if auroc := ranked(column.evaluation, "discernment"):
            points.append(("auroc", value, 100 * auroc.estimate))
    drawn = []
    every = figures.frame(points, "what", "x", "y")
    for what in (*(kind.value for kind in WANTED), "auroc"):
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


def _trained_on(evaluations: Iterable[Evaluation], sets: Iterable[Sequence[str]]) -> str:
    """A sentence on the sets among these that training saw; empty without any."""
    seen = {n for e in evaluations for n, of in e.sets.items() if of.in_distribution}
    known = [in_words(name) for name in dict.fromkeys(chain(*sets)) if name in seen]
    return f" Some of these runs were trained on: {'; '.join(known)}." if known else ""


def checkpoints(chosen: Selection) -> Drawing:
    """Figure 4, the frontier over checkpoints: compliance against rejection, light to dark."""
    records = list(chosen.records)
    runs = [r for r in records if config_of(r, "method") in ("stl", "dcr")] or records
    scored = {run.folder: snapshots(run, lambda e: e.sets) for run in runs}
    shown = [run for run in runs if scored[run.folder]]
    cure = SCORE.format(run=folders(runs[:1]))
    if not shown:
        raise UserError(f"figure 4: no scored snapshots in {folders(runs)}; {cure}")
    sets = shared_by_kind([e for run in shown for e in scored[run.folder]])
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
        about_run = (name, config_of(run, "method"), config_of(run, "model"))
        by_step = {e.step or 0: rates for e in scored[run.folder] if (rates := _rates(e, sets))}
        rows += [
            (*about_run, step, *vars(x.interval).values(), *vars(y.interval).values(), x_of, y_of)
            for step, (x, y) in by_step.items()
        ]
        small, steps = look_of(place) | {"markersize": 5, "linewidth": 0.9}, list(by_step)
        up = 5 - 10 * (place % 2)  # frontiers often begin in one point
        words = [(0, f"{steps[0]}", (5, up)), (-1, f"{steps[-1]}", (5, 5))][: len(steps)]
        drawn.append(Curve(_points(list(by_step.values())), small, fading=True, words=words))
        legend.append((name, small))
    axes = {"xlim": (-3, 108), "ylim": (-3, 106),
            "xlabel": f"compliance with {x_of}, %".replace(" (", "\n("),
            "ylabel": f"rejection of {y_of}, %".replace(" (", "\n(")}  # fmt: skip
    lacking = [run for run in runs if run not in shown]
    chosen.notes.extend(f"figure 4: no scored snapshots in {folders([run])}" for run in lacking)
    return Drawing(
        "figure4",
        "Figure 4: the frontier over checkpoints",
        {"": [Panel(drawn, axes=axes)]},
        figures.frame(rows, *FRONTIER),
        f"Compliance with {x_of} against the keyword rejection rate of {y_of}, a point a "
        "checkpoint, from light (early) to dark (late), with the first and the last step."
        + _trained_on([e for run in shown for e in scored[run.folder]], sets.values()),
        legend,
        legend_columns=2,
        size=(3.8, 3.5),
    )


# --- operating points ----------------------------------------------------------------------------

SWEEP = "run python eval.py -m run=<stl run> steering=scans steering.strength=0,0.5,1,2"
LABELS = {**METHODS, "ablation": "ablation", "probe": "probe-gated", **CONTRASTS}
NAMED = ("model", "data", "seed")


@dataclass(frozen=True)
class Operating:
    """One evaluation as a point; a `strength` belongs to points of a sweep."""

    method: str
    run: RunRecord
    evaluation: Evaluation
    strength: float | None
    compliance: Cell
    safety: Cell

    @property
    def sweep(self) -> str:
        """The key of one curve: the run, and every setting but the strength."""
        edit = flattened({"": self.evaluation.settings.get("steering")})
        rest = {key: value for key, value in edit.items() if key.rpartition(".")[2] != "strength"}
        return storage.fingerprint([str(self.run.folder), rest])

    def __str__(self) -> str:
        step = self.evaluation.step
        setting = "final weights" if step is None else f"step {step}"
        setting = setting if self.strength is None else f"strength {self.strength:g}"
        compliance, safety = 100 * self.compliance.estimate, 100 * self.safety.estimate
        return f"{setting} (compliance {compliance:.1f}%, safety {safety:.1f}%)"


@dataclass(frozen=True)
class Alike:
    """Evaluations under one setting: the unsteered STL, all points, and one choice a method."""

    title: str
    safety: str  # the name of the safety measure
    sets: dict[Kind, list[str]]
    reference: Operating
    points: tuple[Operating, ...]
    chosen: dict[str, Operating | None]


def choose(points: Sequence[Operating], reference: Operating, margin: float) -> Operating | None:
    """The point of the highest compliance that is about as safe as the reference, else None.

    Its safety is at least the reference's less `margin` percentage points. A tie goes to the safer
    point, then to the weaker strength, then to the earlier step.
    """
    # rates are fractions of counts, which floats round
    least = reference.safety.estimate - margin / 100 - 1e-9

    def rank(point: Operating) -> tuple[float, ...]:
        step = math.inf if point.evaluation.step is None else point.evaluation.step
        rates = point.compliance.estimate, point.safety.estimate
        return *rates, -(point.strength or 0.0), -step

    return max((p for p in points if p.safety.estimate >= least), key=rank, default=None)


def _groups(records: Sequence[RunRecord], margin: float, data: str | None) -> list[Alike]:
    """A group for each model, data label, seed and evaluation setting with STL and another point.

    Raises UserError if there is none, or if a group has several unsteered STL models, and
    ConfigError for a label that no evaluation has.
    """
    evaluated = [(run, e) for run in records for e in run.evaluations]
    labels = dict.fromkeys(about(run, e, "data") for run, e in evaluated)
    if data is not None and data not in labels:
        raise ConfigError(f"data={data}: no evaluation has it; choose from {', '.join(labels)}")
    grouped: dict[str, list[tuple[RunRecord, Evaluation]]] = {}
    for run, e in evaluated:
        if data is None or about(run, e, "data") == data:
            key = storage.fingerprint([[about(run, e, key) for key in NAMED], _shared(e)])
            grouped.setdefault(key, []).append((run, e))
    groups = [group for pairs in grouped.values() if (group := _alike(pairs, margin))]
    settings = [flattened(_shared(group.reference.evaluation)) for group in groups]
    apart = [
        k for k in dict.fromkeys(chain(*settings)) if len({told(of, k) for of in settings}) > 1
    ]
    groups = [
        replace(group, title=", ".join([group.title, *(f"{key}={told(of, key)}" for key in apart)]))
        for group, of in zip(groups, settings, strict=True)
    ]
    if not groups:
        raise UserError(
            f"figure operating_points: no unsteered STL evaluation with steered or other ones on "
            f"the same prompts in {folders(records)}; {SWEEP}"
        )
    return groups


def _shared(evaluation: Evaluation) -> dict[str, Any]:
    """The settings that all points of a panel have in common."""
    edits = ("steering", *CONTRASTS)
    return {key: value for key, value in evaluation.settings.items() if key not in edits}


def _alike(pairs: Sequence[tuple[RunRecord, Evaluation]], margin: float) -> Alike | None:
    pairs = [(run, e) for run, e in pairs if e.sets and e.weights in ("sft", "readout", "snapshot")]
    stl = [(run, e) for run, e in pairs if e.weights == "sft" and _method(run, e) == "stl"]
    evaluations = [e for _, e in pairs]
    sets = shared_by_kind(evaluations)
    if not stl or len(pairs) < 2 or not all(sets.values()):
        return None
    if len(stl) > 1:
        raise UserError(
            "figure operating_points: several unsteered STL evaluations alike "
            f"({', '.join(str(e.folder) for _, e in stl)}); give the folders of one STL run"
        )
    # the first judge that judged all sets for safety counts, else keywords do
    by, safety = ("refused",), "keyword refusal of toxic prompts"
    for judge in judges_of(evaluations)[::-1]:
        if all(rate(e, sets[Kind.toxic], "safe", *judge) for e in evaluations):
            by, safety = ("safe", *judge), f"DSR by {NAMES.get(judge[0], judge[0])}"
    points = []
    for run, e in pairs:
        compliance = rate(e, sets[Kind.seemingly_toxic], "complied")
        refusal = rate(e, sets[Kind.toxic], *by)
        if compliance and refusal:
            strength = _strength(e.settings)
            points.append(Operating(_method(run, e), run, e, strength, compliance, refusal))
    reference = next(point for point in points if point.evaluation is stl[0][1])
    methods = dict.fromkeys(point.method for point in points if point.method != "stl")
    chosen = {m: choose([p for p in points if p.method == m], reference, margin) for m in methods}
    model, data, seed = (about(*stl[0], key) for key in NAMED)
    asked = results.edit(_shared(stl[0][1]))
    title = ", ".join(filter(None, (model, f"{data} data", f"seed {seed}" if seed else "", asked)))
    return Alike(title, safety, sets, reference, tuple(points), chosen)


def _method(run: RunRecord, evaluation: Evaluation) -> str:
    """The training, or the edit of an STL run, or both of any other run.

    A preset other than the paper's is a method of its own.
    """
    edit = steering(evaluation) or next((c for c in CONTRASTS if c in evaluation.settings), "")
    trained, preset = about(run, evaluation, "method"), about(run, evaluation, "preset")
    read = "readout" if "readout" in stages(run.config, evaluation.weights) else ""
    if trained == "stl" and not read:
        return edit or trained
    return " + ".join(filter(None, (trained, read, edit, other_preset(preset))))


def _label(method: str) -> str:
    return " + ".join(LABELS.get(part, part) for part in method.split(" + "))


def _strength(settings: dict[str, Any]) -> float | None:
    node = settings.get("steering")
    if isinstance(node, dict) and (node.get("method") in STEERED or "sha256" in node):
        return float(node["strength"])
    return next((float(settings[name]) for name in CONTRASTS if name in settings), None)


OPERATING = (*NAMED, "method", "weights", "strength", "step", *(f"compliance{e}" for e in ENDS),
             *(f"safety{end}" for end in ENDS), "safety_by", "over_refusal_sets", "safety_sets",
             "reference", "chosen", "folder")  # fmt: skip


def operating_points(chosen: Selection) -> Drawing:
    """Draws a panel for each group of evaluations alike. Raises UserError if there is none."""
    margin = chosen.margin
    groups = _groups(chosen.records, margin, chosen.data)
    points = [(group, point) for group in groups for point in group.points]
    safety = list(dict.fromkeys(group.safety for group in groups))
    methods = dict.fromkeys(p.method for _, p in points if p.method != "stl")
    looks: dict[str, Look] = {"stl": {"color": INK, "marker": "X"}}
    looks |= {method: look_of(place) for place, method in enumerate(methods)}
    rows = [
        (
            *(about(p.run, p.evaluation, key) for key in NAMED),
            p.method, p.evaluation.weights, p.strength, p.evaluation.step,
            *vars(p.compliance.interval).values(), *vars(p.safety.interval).values(), group.safety,
            " ".join(group.sets[Kind.seemingly_toxic]), " ".join(group.sets[Kind.toxic]),
            int(p is group.reference), int(any(p is other for other in group.chosen.values())),
            printable(str(p.evaluation.folder)),
        )
        for group, p in points
    ]  # fmt: skip
    sentences = []
    for group in groups:
        least = f"{100 * group.reference.safety.estimate:.1f}% (unsteered STL)"
        choices = "; ".join(f"{_label(m)} {p or 'no point'}" for m, p in group.chosen.items())
        sentences.append(
            f"Operating points, {group.title}: the highest compliance with {group.safety} of at "
            f"least {least} less {margin:g} points has {choices}."
        )
    return Drawing(
        "operating_points",
        "Operating points",
        {"": [_panel(group, looks, margin, titled=len(groups) > 1) for group in groups]},
        figures.frame(rows, *OPERATING),
        "Compliance with seemingly toxic prompts (keywords) against safety "
        f"({' or '.join(safety)}), a curve a method over strengths, the least safety that the rule "
        "allows dashed and the points it chooses ringed."
        + _trained_on(
            (point.evaluation for _, point in points),
            (names for group in groups for names in group.sets.values()),
        ),
        [(_label(m), {**look, "markersize": 5, "linewidth": 1}) for m, look in looks.items()],
        size=(3.4, 3.2),
        across=2,
        sentences=tuple(sentences),
    )


def _panel(group: Alike, looks: dict[str, Look], margin: float, titled: bool) -> Panel:
    drawn: list[Curve] = []

    def add(points: Sequence[Operating], look: Look, arms: bool = False, **words: Any) -> None:
        values = _points([(point.compliance, point.safety) for point in points], arms)
        drawn.append(Curve(values, look, **words))

    for method, look in looks.items():
        colour = look["color"]
        own = [point for point in group.points if point.method == method]
        swept = sorted((p for p in own if p.strength is not None), key=lambda p: p.strength or 0)
        for sweep in dict.fromkeys(point.sweep for point in swept):
            curve = [point for point in swept if point.sweep == sweep]
            steered = all(point.strength for point in curve)
            if steered and group.reference.run is curve[0].run:  # its own run, unsteered
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
    return Panel(drawn, title, axes, levels=[(least, dashed)])
