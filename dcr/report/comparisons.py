"""Comparisons of methods: paired prompt by prompt, and at matched safety."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dcr import statistics, storage
from dcr.config import Kind, UserError
from dcr.report import figures
from dcr.report.curves import folders, shared_by_kind
from dcr.report.figures import INK, Drawing, arms, handle, line_style
from dcr.report.records import (
    METHODS,
    STEERED,
    Answer,
    Column,
    Evaluation,
    RunRecord,
    about,
    flattened,
    other_preset,
    steering,
)
from dcr.report.tables import NAMES, TITLES, Cell, judges_of, rate, set_names, together
from dcr.statistics import Interval
from dcr.text import printable

PAIRED_SEED = 0  # of the bootstrap, fixed so that a report is reproducible


@dataclass(frozen=True)
class PairedLine:
    """a - b over the same prompts: compliance if seemingly toxic, keyword refusal if toxic."""

    label: str
    kind: Kind
    n: int
    difference: Interval
    p: float
    pooled: bool = False
    holm: float = 1.0  # p adjusted for all lines of the comparison


@dataclass(frozen=True)
class Comparison:
    """DCR minus STL, with the settings besides method in which they differ."""

    a: Column
    b: Column
    lines: list[PairedLine]
    differing: list[str]


def comparisons(
    columns: Sequence[Column], completions: Callable[[Column, str], list[Answer]]
) -> list[Comparison]:
    """DCR against STL of the same model, seed, data and evaluation settings, prompt by prompt.

    Of several STL runs only those nearest in the settings of stage two are compared with.
    """
    found = []
    for a in columns:
        if a.about("method") != "dcr":
            continue
        partners = [
            (differing_settings(a, b), b)
            for b in columns
            if b.about("method") == "stl" and _comparable(a, b)
        ]
        fewest = min((len(differing) for differing, _ in partners), default=0)
        for differing, b in partners:
            if len(differing) == fewest:
                lines = _paired_lines(a, b, completions)
                if lines:
                    found.append(Comparison(a, b, lines, differing))
    return found


def _comparable(a: Column, b: Column) -> bool:
    same = all(a.about(key) == b.about(key) for key in ("model", "seed", "data"))
    one, other = a.evaluation, b.evaluation
    return same and (one.weights, one.settings) == (other.weights, other.settings)


def differing_settings(a: Column, b: Column) -> list[str]:
    """Settings of stage two in which two runs differ, which no comparison should hide."""
    configs = []
    for column in (a, b):
        config = column.run.config
        data = found if isinstance(found := config.get("data"), dict) else {}
        parts = {"sft": config.get("sft"), "data.safety": data.get("safety")}
        configs.append(flattened(parts | {"data.normal": data.get("normal")}))
    return storage.differences(configs[1], configs[0])


def _paired_lines(
    a: Column, b: Column, completions: Callable[[Column, str], list[Answer]]
) -> list[PairedLine]:
    lines = []
    for kind in TITLES:
        pools: tuple[list[bool], list[bool]] = ([], [])
        names = [name for name in set_names([a], kind) if name in b.evaluation.sets]
        summed = together(names)
        for name in names:
            verdicts = _verdicts(completions(a, name), completions(b, name), kind)
            if verdicts[0]:
                lines.append(_paired_line(name, kind, verdicts, pooled=summed == [name]))
            for pool, part in zip(pools, verdicts, strict=True):
                pool += part if name in summed else []
        if pools[0] and len(summed) > 1:
            lines.append(_paired_line("pooled", kind, pools, pooled=True))
    adjusted = statistics.holm([line.p for line in lines])
    return [replace(line, holm=p) for line, p in zip(lines, adjusted, strict=True)]


def _verdicts(a: list[Answer], b: list[Answer], kind: Kind) -> tuple[list[bool], list[bool]]:
    """What is wanted of a kind of prompt, for the prompts that both runs answered."""
    others = {(completion.id, completion.prompt): completion for completion in b}
    both = [(c, others[c.id, c.prompt]) for c in a if (c.id, c.prompt) in others]
    wanted = kind is Kind.toxic
    return (
        [(first.verdict == "refused") is wanted for first, _ in both],
        [(second.verdict == "refused") is wanted for _, second in both],
    )


def _paired_line(
    label: str, kind: Kind, verdicts: tuple[list[bool], list[bool]], pooled: bool = False
) -> PairedLine:
    a, b = verdicts
    difference = statistics.paired_difference(a, b, seed=PAIRED_SEED)
    return PairedLine(label, kind, len(a), difference, statistics.mcnemar(a, b), pooled)


def points(difference: Interval) -> str:
    """`+3.0 [-1.2, +7.0]`: an interval in percentage points."""
    ends = (difference.estimate, difference.low, difference.high)
    estimate, low, high = (100 * end for end in ends)
    return f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


MARGIN = 2.0  # percentage points
SWEEP = "run python eval.py -m run=<stl run> steering=scans steering.strength=0,0.5,1,2"
LABELS = {**METHODS, "ablation": "ablation", "self_cd": "Self-CD"}


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


@dataclass(frozen=True)
class OperatingPanel:
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


def operating_panels(
    records: Sequence[RunRecord], margin: float, data: str | None
) -> list[OperatingPanel]:
    """One for each model, data label, seed and evaluation setting that has STL and another point.

    Raises UserError if there is none, or if a panel has several unsteered STL models.
    """
    grouped: dict[str, list[tuple[RunRecord, Evaluation]]] = {}
    labels = set()
    for run in records:
        for found in run.evaluations:
            labels.add(about(run, found, "data"))
            if data is None or about(run, found, "data") == data:
                grouped.setdefault(_alike(run, found), []).append((run, found))
    if data is not None and data not in labels:
        raise UserError(f"data={data}: no evaluation has it; choose from {', '.join(labels)}")
    made = [panel for pairs in grouped.values() if (panel := _operating_panel(pairs, margin))]
    if not made:
        raise UserError(
            f"figure operating_points: no unsteered STL evaluation with steered or other ones on "
            f"the same prompts in {folders(records)}; {SWEEP}"
        )
    return made


def _alike(run: RunRecord, found: Evaluation) -> str:
    settings = {k: v for k, v in found.settings.items() if k not in ("steering", "self_cd")}
    named = [about(run, found, key) for key in ("model", "data", "seed")]
    return storage.fingerprint([named, settings])


def _operating_panel(
    pairs: Sequence[tuple[RunRecord, Evaluation]], margin: float
) -> OperatingPanel | None:
    pairs = [
        (run, found) for run, found in pairs if found.sets and found.weights in ("sft", "snapshot")
    ]
    stl = [pair for pair in pairs if _is_reference(*pair)]
    if not stl or len(pairs) < 2:
        return None
    if len(stl) > 1:
        raise UserError(
            "figure operating_points: several unsteered STL evaluations alike "
            f"({', '.join(str(found.folder) for _, found in stl)}); give the folders of one STL run"
        )
    sets = shared_by_kind([found for _, found in pairs])
    if not all(sets.values()):
        return None
    by, safety = _safety([found for _, found in pairs], sets[Kind.toxic])
    points = [point for run, found in pairs if (point := _point(run, found, sets, by))]
    reference = next(p for p in points if p.evaluation is stl[0][1])
    methods = dict.fromkeys(p.method for p in points if p.method != "stl")
    chosen = {m: choose([p for p in points if p.method == m], reference, margin) for m in methods}
    keys = ("model", "data", "seed")
    model, data, seed = (about(*stl[0], key) for key in keys)
    asked = "validation prompts" if stl[0][1].settings.get("validation") else ""
    named = (model, f"{data} data", f"seed {seed}" if seed else "", asked)
    title = ", ".join(filter(None, named))
    return OperatingPanel(title, safety, sets, reference, tuple(points), chosen)


def _is_reference(run: RunRecord, found: Evaluation) -> bool:
    return found.weights == "sft" and _method(run, found) == "stl"


def _method(run: RunRecord, found: Evaluation) -> str:
    """How it was trained, or what was done to STL in evaluation; both where another was edited.

    A preset other than the paper's is a method of its own.
    """
    edit = steering(found) or ("self_cd" if "self_cd" in found.settings else "")
    trained, preset = about(run, found, "method"), about(run, found, "preset")
    if trained == "stl":
        return edit or trained
    return " + ".join(filter(None, (trained, edit, other_preset(preset))))


def _safety(evaluations: Sequence[Evaluation], names: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """DSR by the first judge of safety that judged every set of every evaluation, else keywords.

    As the quantity and judge of `tables.rate`.
    """
    for judge, model in judges_of(evaluations):
        if all(rate(e, names, "safe", judge, model) for e in evaluations):
            return ("safe", judge, model), f"DSR by {NAMES.get(judge, judge)}"
    return ("refused",), "keyword refusal of toxic prompts"


def _point(
    run: RunRecord, found: Evaluation, sets: dict[Kind, list[str]], by: tuple[str, ...]
) -> Operating | None:
    compliance = rate(found, sets[Kind.seemingly_toxic], "complied")
    safety = rate(found, sets[Kind.toxic], *by)
    if compliance is None or safety is None:
        return None
    return Operating(
        _method(run, found), run, found, _strength(found.settings), found.step, compliance, safety
    )


def _strength(settings: dict[str, Any]) -> float | None:
    node = settings.get("steering")
    if isinstance(node, dict) and node.get("method") in STEERED:
        return float(node["strength"])
    return None if settings.get("self_cd") is None else float(settings["self_cd"])


def label(method: str) -> str:
    return " + ".join(LABELS.get(part, part) for part in method.split(" + "))


def rule_lines(panel: OperatingPanel, margin: float) -> list[str]:
    """The rule and its choices, for the terminal and the caption."""
    return [
        f"operating points, {panel.title}: per method the highest compliance among points with "
        f"{panel.safety} of at least {_percent(panel.reference.safety)} (unsteered STL) less "
        f"{margin:g} points; on the evaluations given",
        *(f"  {label(method)}: {_choice(point)}" for method, point in panel.chosen.items()),
    ]


def _choice(point: Operating | None) -> str:
    if point is None:
        return "no point is safe enough"
    return (
        f"{point.setting} (compliance {_percent(point.compliance)}, "
        f"safety {_percent(point.safety)})"
    )


def _percent(cell: Cell) -> str:
    return f"{100 * cell.estimate:.1f}%"


HEADER = ("model", "data", "seed", "method", "weights", "strength", "step", "compliance",
          "compliance_low", "compliance_high", "safety", "safety_low", "safety_high", "safety_by",
          "over_refusal_sets", "safety_sets", "reference", "chosen", "folder")  # fmt: skip


def operating_points(records: Sequence[RunRecord], margin: float, data: str | None) -> Drawing:
    """One panel a panel. UserError where nothing was evaluated alike."""
    found = operating_panels(records, margin, data)
    safety = list(dict.fromkeys(panel.safety for panel in found))
    return Drawing(
        "operating_points",
        "Operating points",
        "Compliance with seemingly toxic prompts (keywords, sets pooled) against safety "
        f"({' or '.join(safety)}), with 95% Wilson intervals; a curve a method, and choice of "
        "its other settings, over strengths, from the unsteered STL on; pale: snapshots. "
        "Dashed: the least safety that the rule allows; rings: the points it chooses.",
        HEADER,
        [row for panel in found for row in _rows(panel)],
        lambda: _draw(found, margin),
        lines=tuple(line for panel in found for line in rule_lines(panel, margin)),
    )


def _rows(panel: OperatingPanel) -> list[tuple[object, ...]]:
    chosen = [point for point in panel.chosen.values() if point]
    return [
        (
            *(about(p.run, p.evaluation, key) for key in ("model", "data", "seed")),
            p.method, p.evaluation.weights, p.strength, p.step,
            p.compliance.estimate, p.compliance.low, p.compliance.high,
            p.safety.estimate, p.safety.low, p.safety.high, panel.safety,
            " ".join(panel.sets[Kind.seemingly_toxic]), " ".join(panel.sets[Kind.toxic]),
            int(p is panel.reference), int(any(p is other for other in chosen)),
            printable(str(p.evaluation.folder)),
        )
        for p in panel.points
    ]  # fmt: skip


def _draw(found: Sequence[OperatingPanel], margin: float) -> Figure:
    methods = list(dict.fromkeys(p.method for a in found for p in a.points if p.method != "stl"))
    figure, axes = figures.panels(len(found), 3.4, 3.2, 2)
    for place, panel in zip(axes, found, strict=True):
        _draw_panel(place, panel, methods, margin)
        if len(found) > 1:
            figures.heading(place, panel.title, 46)
    styles = [(method, *_style(method, methods)) for method in ("stl", *methods)]
    figures.key(figure, [
        handle(label(method), color=colour, marker=marker, markersize=5, linewidth=1)
        for method, colour, marker in styles
    ])  # fmt: skip
    return figure


def _style(method: str, methods: Sequence[str]) -> tuple[str, str]:
    return (INK, "X") if method == "stl" else line_style(methods.index(method))


def _draw_panel(axes: Axes, panel: OperatingPanel, methods: Sequence[str], margin: float) -> None:
    least = 100 * panel.reference.safety.estimate - margin
    axes.axhline(least, color=INK, linestyle=(0, (4, 3)), linewidth=0.8, alpha=0.6)
    for method in ("stl", *methods):
        colour, marker = _style(method, methods)
        own = [p for p in panel.points if p.method == method]
        swept = sorted((p for p in own if p.strength is not None), key=lambda p: p.strength or 0)
        _draw_sweeps(axes, panel, swept, colour)
        for point in own:
            _draw_point(axes, point, colour, marker)
        chosen = panel.chosen.get(method)
        if chosen:
            axes.plot(100 * chosen.compliance.estimate, 100 * chosen.safety.estimate, "o",
                      markersize=11, markerfacecolor="none", markeredgecolor=colour,
                      markeredgewidth=1.2, zorder=4)  # fmt: skip
    axes.set_xlabel("compliance with seemingly toxic prompts, %")
    axes.set_ylabel(f"{panel.safety}, %")
    axes.margins(0.08)


def _draw_sweeps(
    axes: Axes, panel: OperatingPanel, swept: Sequence[Operating], colour: str
) -> None:
    """A line a run and choice of other settings; from the reference on where its run is steered."""
    for folder, rest in dict.fromkeys(map(_sweep, swept)):
        line = [point for point in swept if _sweep(point) == (folder, rest)]
        if panel.reference.run.folder == folder and all(point.strength for point in line):
            line = [panel.reference, *line]
        xs = [100 * point.compliance.estimate for point in line]
        ys = [100 * point.safety.estimate for point in line]
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


def _draw_point(axes: Axes, point: Operating, colour: str, marker: str) -> None:
    x, y = point.compliance, point.safety
    if point.evaluation.weights == "snapshot":  # intervals of every checkpoint would hide all else
        axes.plot(100 * x.estimate, 100 * y.estimate, marker, color=figures.shade(colour, 0.2),
                  markersize=3, zorder=1)  # fmt: skip
        return
    axes.errorbar(
        100 * x.estimate, 100 * y.estimate, xerr=arms(x.interval), yerr=arms(y.interval),
        fmt=marker,
        color=colour, markersize=5, elinewidth=0.6, ecolor=figures.shade(colour, 0.45), zorder=3,
    )  # fmt: skip
