"""Operating points: the most compliance that a method has at about the safety of plain STL."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from dcr import results
from dcr.core import storage
from dcr.core.config import ConfigError, Kind, UserError
from dcr.ending import printable
from dcr.report import figures
from dcr.report.columns import METHODS, Column, evaluated, told
from dcr.report.figures import INK, Curve, Drawing, Look, Panel, look_of
from dcr.report.grids import NAMES, Cell, judges_of, rate, shared_by_kind
from dcr.report.records import STEERED, flattened, folders
from dcr.report.sections import Selection
from dcr.report.trade_offs import COMPLIANCE, ENDS, points, trained_on
from dcr.results.frame import CONTRASTS

SWEEP = "run python eval.py -m run=<stl run> steering=scans steering.strength=0,0.5,1,2"
LABELS = {**METHODS, "ablation": "ablation", "probe": "probe-gated", **CONTRASTS}
NAMED = ("model", "data", "seed")


@dataclass(frozen=True)
class Operating:
    """One evaluation as a point; a `strength` belongs to points of a sweep."""

    column: Column
    method: str
    strength: float | None
    compliance: Cell
    safety: Cell

    @property
    def sweep(self) -> str:
        """The key of one curve: the run, and every setting but the strength."""
        edit = flattened({"": self.column.evaluation.settings.get("steering")})
        rest = {key: value for key, value in edit.items() if key.rpartition(".")[2] != "strength"}
        return storage.fingerprint([str(self.column.run.folder), rest])

    def __str__(self) -> str:
        step = self.column.evaluation.step
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
        step = point.column.evaluation.step
        rates = point.compliance.estimate, point.safety.estimate
        return *rates, -(point.strength or 0.0), -math.inf if step is None else -step

    return max((p for p in points if p.safety.estimate >= least), key=rank, default=None)


def _groups(chosen: Selection) -> list[Alike]:
    """A group for each model, data label, seed and evaluation setting with STL and another point.

    Raises UserError if there is none, or if a group has several unsteered STL models, and
    ConfigError for a label that no evaluation has.
    """
    columns, data = evaluated(chosen.records), chosen.data
    labels = dict.fromkeys(column.about("data") for column in columns)
    if data is not None and data not in labels:
        raise ConfigError(f"data={data}: no evaluation has it; choose from {', '.join(labels)}")
    grouped: dict[str, list[Column]] = {}
    for column in columns:
        if data is None or column.about("data") == data:
            key = storage.fingerprint([[column.about(key) for key in NAMED], _shared(column)])
            grouped.setdefault(key, []).append(column)
    groups = [group for of in grouped.values() if (group := _alike(of, chosen.margin))]
    settings = [flattened(_shared(group.reference.column)) for group in groups]
    if not groups:
        raise UserError(
            f"figure operating_points: no unsteered STL evaluation with steered or other ones on "
            f"the same prompts in {folders(chosen.records)}; {SWEEP}"
        )
    keys = dict.fromkeys(chain(*settings))
    apart = [key for key in keys if len({told(of, key) for of in settings}) > 1]
    return [
        replace(group, title=", ".join([group.title, *(f"{key}={told(of, key)}" for key in apart)]))
        for group, of in zip(groups, settings, strict=True)
    ]


def _shared(column: Column) -> dict[str, Any]:
    """The settings that all points of a panel have in common."""
    edits = ("steering", *CONTRASTS)
    return {key: value for key, value in column.evaluation.settings.items() if key not in edits}


def _alike(columns: Sequence[Column], margin: float) -> Alike | None:
    trained = ("sft", "readout", "snapshot")
    columns = [c for c in columns if c.evaluation.sets and c.evaluation.weights in trained]
    stl = [c for c in columns if c.evaluation.weights == "sft" and _method(c) == "stl"]
    evaluations = [column.evaluation for column in columns]
    sets = shared_by_kind(evaluations)
    if not stl or len(columns) < 2 or not all(sets.values()):
        return None
    if len(stl) > 1:
        raise UserError(
            "figure operating_points: several unsteered STL evaluations alike "
            f"({', '.join(str(c.evaluation.folder) for c in stl)}); give the folders of one STL run"
        )
    # the first judge that judged all sets for safety counts, else keywords do
    by, safety = ("refused",), "keyword refusal of toxic prompts"
    for judge in judges_of(evaluations)[::-1]:
        if all(rate(e, sets[Kind.toxic], "safe", *judge) for e in evaluations):
            by, safety = ("safe", *judge), f"DSR by {NAMES.get(judge[0], judge[0])}"
    found = []
    for column in columns:
        compliance = rate(column.evaluation, sets[Kind.seemingly_toxic], "complied")
        refusal = rate(column.evaluation, sets[Kind.toxic], *by)
        if compliance and refusal:
            strength = _strength(column.evaluation.settings)
            found.append(Operating(column, _method(column), strength, compliance, refusal))
    reference = next(point for point in found if point.column is stl[0])
    methods = dict.fromkeys(point.method for point in found if point.method != "stl")
    chosen = {m: choose([p for p in found if p.method == m], reference, margin) for m in methods}
    model, data, seed = map(stl[0].about, NAMED)
    asked = results.edit(_shared(stl[0]))
    title = ", ".join(filter(None, (model, f"{data} data", f"seed {seed}" if seed else "", asked)))
    return Alike(title, safety, sets, reference, tuple(found), chosen)


def _method(column: Column) -> str:
    """The training, or the edit of an STL run, or both of any other run.

    A preset other than the paper's is a method of its own.
    """
    e, trained = column.evaluation, column.about("method")
    edit = e.steered_by or next((name for name in CONTRASTS if name in e.settings), "")
    read = "readout" if "readout" in column.stages else ""
    if trained == "stl" and not read:
        return edit or trained
    return " + ".join(filter(None, (trained, read, edit, column.preset)))


def _label(method: str) -> str:
    return " + ".join(LABELS.get(part, part) for part in method.split(" + "))


def _strength(settings: Mapping[str, Any]) -> float | None:
    node = settings.get("steering")
    if isinstance(node, Mapping) and (node.get("method") in STEERED or "sha256" in node):
        return float(node["strength"])
    return next((float(settings[name]) for name in CONTRASTS if name in settings), None)


OPERATING = (*NAMED, "method", "weights", "strength", "step", *(f"compliance{e}" for e in ENDS),
             *(f"safety{end}" for end in ENDS), "safety_by", "over_refusal_sets", "safety_sets",
             "reference", "chosen", "folder")  # fmt: skip


def figure(chosen: Selection) -> Drawing:
    """Draws a panel for each group of evaluations alike. Raises UserError if there is none."""
    groups, margin = _groups(chosen), chosen.margin
    drawn = [(group, point) for group in groups for point in group.points]
    safety = list(dict.fromkeys(group.safety for group in groups))
    methods = dict.fromkeys(p.method for _, p in drawn if p.method != "stl")
    looks: dict[str, Look] = {"stl": {"color": INK, "marker": "X"}}
    looks |= {method: look_of(place) for place, method in enumerate(methods)}
    rows = [
        (
            *map(p.column.about, NAMED),
            p.method, p.column.evaluation.weights, p.strength, p.column.evaluation.step,
            *vars(p.compliance.interval).values(), *vars(p.safety.interval).values(), group.safety,
            " ".join(group.sets[Kind.seemingly_toxic]), " ".join(group.sets[Kind.toxic]),
            int(p is group.reference), int(any(p is other for other in group.chosen.values())),
            printable(str(p.column.evaluation.folder)),
        )
        for group, p in drawn
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
        + trained_on(
            (point.column.evaluation for _, point in drawn),
            (names for group in groups for names in group.sets.values()),
        ),
        [(_label(m), {**look, "markersize": 5, "linewidth": 1}) for m, look in looks.items()],
        size=(3.4, 3.2),
        across=2,
        sentences=tuple(sentences),
    )


def _panel(group: Alike, looks: dict[str, Look], margin: float, titled: bool) -> Panel:
    drawn: list[Curve] = []

    def add(own: Sequence[Operating], look: Look, arms: bool = False, **words: Any) -> None:
        values = points([(point.compliance, point.safety) for point in own], arms)
        drawn.append(Curve(values, look, **words))

    for method, look in looks.items():
        colour = look["color"]
        own = [point for point in group.points if point.method == method]
        swept = sorted((p for p in own if p.strength is not None), key=lambda p: p.strength or 0)
        for sweep in dict.fromkeys(point.sweep for point in swept):
            curve = [point for point in swept if point.sweep == sweep]
            steered, plain = all(point.strength for point in curve), group.reference
            if steered and plain.column.run is curve[0].column.run:  # its own run, unsteered
                curve = [plain, *curve]
            add(curve, {"color": colour, "linewidth": 1.2, "zorder": 2})
        # intervals of every checkpoint would hide all else
        pale = [point for point in own if point.column.evaluation.weights == "snapshot"]
        full = [point for point in own if point.column.evaluation.weights != "snapshot"]
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
