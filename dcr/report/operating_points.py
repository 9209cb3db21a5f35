"""Compliance against safety over steering strengths, and one operating point a method by a rule."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dcr import storage
from dcr.config import Kind, UserError
from dcr.report.entries import METHODS, STEERED, about, steering
from dcr.report.judged import NAMES, defended, judges_of, verdicts_of
from dcr.report.records import Evaluation, RunRecord
from dcr.report.tables import Count, keyword, pooled, together
from dcr.report.trajectories import folders, shared_sets
from dcr.statistics import Interval

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
    compliance: Interval
    safety: Interval

    @property
    def setting(self) -> str:
        if self.strength is not None:
            return f"strength {self.strength:g}"
        return f"step {self.step}" if self.step is not None else "final weights"


@dataclass(frozen=True)
class Arena:
    """What was evaluated alike: the unsteered STL, all points, and one choice a method."""

    title: str
    safety: str  # how safety was told
    sets: dict[Kind, tuple[str, ...]]
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


def arenas(records: Sequence[RunRecord], margin: float, data: str | None) -> list[Arena]:
    """One for each model, data label, seed and evaluation setting that has STL and another point.

    Raises UserError if there is none, or if an arena has several unsteered STL models.
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
    made = [arena for pairs in grouped.values() if (arena := _arena(pairs, margin))]
    if not made:
        raise UserError(
            f"figure operating_points: no unsteered STL evaluation with steered or other ones on "
            f"the same prompts in {folders(records)}; {SWEEP}"
        )
    return made


def _alike(run: RunRecord, found: Evaluation) -> str:
    settings = {k: v for k, v in found.settings.items() if k not in ("steering", "self_cd")}
    told = [about(run, found, key) for key in ("model", "data", "seed")]
    return storage.fingerprint([told, settings])


def _arena(pairs: Sequence[tuple[RunRecord, Evaluation]], margin: float) -> Arena | None:
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
    sets = _sets([found for _, found in pairs])
    if sets is None:
        return None
    counted, told = _safety([found for _, found in pairs], sets[Kind.toxic])
    points = [point for run, found in pairs if (point := _point(run, found, sets, counted))]
    reference = next(p for p in points if p.evaluation is stl[0][1])
    methods = dict.fromkeys(p.method for p in points if p.method != "stl")
    chosen = {m: choose([p for p in points if p.method == m], reference, margin) for m in methods}
    keys = ("model", "data", "seed")
    model, data, seed = (about(*stl[0], key) for key in keys)
    asked = "validation prompts" if stl[0][1].settings.get("validation") else ""
    named = (model, f"{data} data", f"seed {seed}" if seed else "", asked)
    title = ", ".join(filter(None, named))
    return Arena(title, told, sets, reference, tuple(points), chosen)


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
    told = [trained, edit, preset if preset not in ("", "-", "paper") else ""]
    return " + ".join(filter(None, told))


def _sets(evaluations: Sequence[Evaluation]) -> dict[Kind, tuple[str, ...]] | None:
    """The sets that every evaluation has, by kind, without those whose prompts others hold."""
    shared = shared_sets(evaluations)
    sets = {
        kind: tuple(together([name for name, score in shared.items() if score.kind is kind]))
        for kind in (Kind.seemingly_toxic, Kind.toxic)
    }
    return sets if all(sets.values()) else None


def _safety(evaluations: Sequence[Evaluation], names: Sequence[str]) -> tuple[Count, str]:
    """DSR by the first judge of safety that judged every set of every evaluation, else keywords."""
    for judge, model in judges_of(score for e in evaluations for score in e.sets.values()):
        count = defended(verdicts_of(judge, model))
        if all(count(e.sets[name]) for e in evaluations for name in names):
            return count, f"DSR by {NAMES.get(judge, judge)}"
    return keyword("paper"), "keyword refusal of toxic prompts"


def _point(
    run: RunRecord, found: Evaluation, sets: dict[Kind, tuple[str, ...]], counted: Count
) -> Operating | None:
    compliance = pooled([found.sets[name] for name in sets[Kind.seemingly_toxic]], keyword("paper"))
    safety = pooled([found.sets[name] for name in sets[Kind.toxic]], counted)
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


def told(arena: Arena, margin: float) -> list[str]:
    """The rule and its choices, for the terminal and the caption."""
    return [
        f"operating points, {arena.title}: per method the highest compliance among points with "
        f"{arena.safety} of at least {_percent(arena.reference.safety)} (unsteered STL) less "
        f"{margin:g} points; on the evaluations given",
        *(f"  {label(method)}: {_told(point)}" for method, point in arena.chosen.items()),
    ]


def _told(point: Operating | None) -> str:
    if point is None:
        return "no point is safe enough"
    return (
        f"{point.setting} (compliance {_percent(point.compliance)}, "
        f"safety {_percent(point.safety)})"
    )


def _percent(interval: Interval) -> str:
    return f"{100 * interval.estimate:.1f}%"
