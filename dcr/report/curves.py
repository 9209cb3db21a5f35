"""Figures 1, 3, 4, 5 and 9: quantities over the steps of SFT, from tracking or scored snapshots."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dcr import storage
from dcr.config import Kind, UserError
from dcr.report import figures
from dcr.report.figures import Drawing, kind_name, line_style
from dcr.report.records import (
    METHODS,
    Evaluation,
    RunRecord,
    TrackedStep,
    config_of,
    other_preset,
    unedited,
)
from dcr.report.tables import WANTED, Cell, rate, together
from dcr.results.schema import Estimate, SetCounts, interval
from dcr.text import printable

PREFIXES = {"plain": "refusal_probability", "prefix_free": "refusal_probability_prefix_free"}
TRACKED, KEPT, SCORED = "metrics.csv", "tracking", "snapshots"
STAGES = {"base": "base model", "contrastive": "after stage one", "sft": "after SFT"}
BOTH = (Kind.seemingly_toxic, Kind.toxic)
NORM = "mean normalised ‖K‖"
TRACK = "train with tracking.quantities=[refusal_probability]"
Key = tuple[str, ...]
Values = Callable[[TrackedStep | Evaluation], Iterator[tuple[Key, Estimate]]]


@dataclass(frozen=True)
class Reading:
    """A value after some steps; the interval is None where only the value was kept."""

    step: int
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Trajectory:
    """The curves of one run by what they are of, and where they were found."""

    run: RunRecord
    curves: dict[Key, list[Reading]]
    source: str


# --- runs, their names and what they have --------------------------------------------------------


def names(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run that no other has: method, preset, seed, model where there are more."""
    several = len({config_of(run, "model") for run in records} - {""}) > 1
    plain = []
    for run in records:
        method, seed = config_of(run, "method"), config_of(run, "seed")
        parts = (
            METHODS.get(method, method) or printable(run.folder.name),
            other_preset(config_of(run, "preset_name")),
            f"seed {seed}" if seed else "",
            config_of(run, "model") if several else "",
        )
        plain.append(", ".join(filter(None, parts)))
    return [
        f"{name} ({printable(run.folder.name)})" if plain.count(name) > 1 else name
        for name, run in zip(plain, records, strict=True)
    ]


def name_of_weights(run_name: str, run: RunRecord, evaluation: Evaluation) -> str:
    """Which weights were evaluated: of a run after a stage or step of SFT, or the base model."""
    if evaluation.weights == "base":
        model = evaluation.model or config_of(run, "model")
        return ", ".join(filter(None, (STAGES["base"], model)))
    stage = STAGES.get(evaluation.weights, evaluation.weights)
    return f"{run_name}, {stage if evaluation.step is None else f'SFT step {evaluation.step}'}"


def of_method(records: Sequence[RunRecord], method: str) -> list[RunRecord]:
    return [run for run in records if config_of(run, "method") == method]


def folders(records: Iterable[RunRecord]) -> str:
    return ", ".join(printable(str(run.folder)) for run in records)


def snapshots(run: RunRecord, has: Callable[[Evaluation], object]) -> list[Evaluation]:
    """Unsteered evaluations of snapshots by step, all under one setting: that of the most steps."""
    by_setting: dict[str, dict[int, Evaluation]] = {}
    for found in run.evaluations:
        if (
            found.weights == "snapshot"
            and found.step is not None
            and unedited(found)
            and has(found)
        ):
            setting = storage.fingerprint([found.settings, found.data])
            by_setting.setdefault(setting, {})[found.step] = found
    most = max(by_setting.values(), key=len, default={})
    return [most[step] for step in sorted(most)]


def shared_sets(evaluations: Sequence[Evaluation]) -> dict[str, SetCounts]:
    """The sets that all of these were evaluated on, with the first one's counts."""
    if not evaluations:
        return {}
    first, *others = evaluations
    return {
        name: counts for name, counts in first.sets.items() if all(name in e.sets for e in others)
    }


def shared_by_kind(evaluations: Sequence[Evaluation]) -> dict[Kind, list[str]]:
    """Those of them that may be summed up, by kind."""
    shared = shared_sets(evaluations)
    return {
        kind: together(name for name, counts in shared.items() if counts.kind is kind)
        for kind in BOTH
    }


def logged(run: RunRecord, stage: str, prefix: str, parts: int) -> dict[Key, list[Reading]]:
    """Curves of the keys `<stage>/<prefix>/…` with `parts` more parts; the last value counts."""
    values: dict[Key, dict[int, float]] = {}
    start = f"{stage}/{prefix}/"
    for row in run.metrics:
        rest = tuple(str(row["key"]).removeprefix(start).split("/"))
        if str(row["key"]).startswith(start) and len(rest) == parts:
            values.setdefault(tuple(map(printable, rest)), {})[row["step"]] = row["value"]
    return {
        rest: [Reading(step, value) for step, value in sorted(by_step.items())]
        for rest, by_step in values.items()
    }


def _trajectory(
    run: RunRecord, curves: Mapping[Key, list[Reading]], values: Values
) -> Trajectory | None:
    """Curves that were logged, with what tracking kept; of neither, those of snapshots."""
    kept = _kept(run, "sft", values)
    if curves or kept:
        return Trajectory(run, _joined(curves, kept), KEPT if kept else TRACKED)
    scored = [
        reading
        for found in snapshots(run, lambda e: next(values(e), None))
        for reading in _readings(found.step or 0, values(found))
    ]
    return Trajectory(run, _joined({}, scored), SCORED) if scored else None


def _kept(run: RunRecord, stage: str, values: Values) -> list[tuple[Key, Reading]]:
    steps = [tracked for tracked in run.tracked if tracked.stage == stage]
    return [reading for step in steps for reading in _readings(step.step, values(step))]


def _readings(step: int, values: Iterable[tuple[Key, Estimate]]) -> Iterator[tuple[Key, Reading]]:
    """Nothing where there is no mean, as of a kind without a pair; ends that are not finite go."""
    for key, found in values:
        mean = interval(found)
        ends = (mean.low, mean.high) if all(map(math.isfinite, (mean.low, mean.high))) else ()
        if math.isfinite(mean.estimate):
            yield key, Reading(step, mean.estimate, *ends)


def _joined(
    curves: Mapping[Key, list[Reading]], kept: Iterable[tuple[Key, Reading]]
) -> dict[Key, list[Reading]]:
    """Curves by step, where what was kept of a step stands in place of its bare value."""
    by_step = {key: {reading.step: reading for reading in curve} for key, curve in curves.items()}
    for key, reading in kept:
        by_step.setdefault(key, {})[reading.step] = reading
    return {key: [curve[step] for step in sorted(curve)] for key, curve in by_step.items()}


def _by_kind(found: TrackedStep | Evaluation) -> Iterator[tuple[Key, Estimate]]:
    kinds = found.refusal_probability.kinds if found.refusal_probability else {}
    for quantity in PREFIXES:
        for kind, means in kinds.items():
            yield (quantity, kind), getattr(means, quantity)


def _by_followed(found: TrackedStep | Evaluation) -> Iterator[tuple[Key, Estimate]]:
    followed = found.refusal_probability.followed if found.refusal_probability else {}
    for quantity in PREFIXES:
        for kind, prompt in followed.items():
            yield (quantity, kind), (getattr(prompt, quantity), None, None)


def _by_pair(found: TrackedStep | Evaluation) -> Iterator[tuple[Key, Estimate]]:
    for params, matrix in (found.kernel.params if found.kernel else {}).items():
        for observer, row in matrix.items():
            for trained, mean in row.items():
                yield (params, observer, trained), mean


def kind_probabilities(run: RunRecord) -> Trajectory | None:
    """Mean refusal probabilities by (quantity, kind)."""
    curves = {
        (quantity, *kind): curve
        for quantity, prefix in PREFIXES.items()
        for kind, curve in logged(run, "sft", prefix, 1).items()
    }
    return _trajectory(run, curves, _by_kind)


def followed_probabilities(run: RunRecord) -> Trajectory | None:
    """Refusal probabilities of the followed prompts by (quantity, kind), single values each."""
    curves = logged(run, "sft", f"{PREFIXES['plain']}/followed", 1)
    return _trajectory(run, {("plain", *kind): c for kind, c in curves.items()}, _by_followed)


def kernels(run: RunRecord) -> Trajectory | None:
    """Mean normalised norms by (params, observer, trained)."""
    return _trajectory(run, logged(run, "sft", "kernel", 3), _by_pair)


def tracked_kernels(run: RunRecord, stage: str) -> dict[Key, list[Reading]]:
    """What tracking found of the kernel during a stage, by (params, observer, trained)."""
    return _joined(logged(run, stage, "kernel", 3), _kept(run, stage, _by_pair))


def _rejections(run: RunRecord) -> Trajectory | None:
    scored = snapshots(run, lambda e: e.sets)
    curves: dict[Key, list[Reading]] = {}
    for kind, chosen in shared_by_kind(scored).items():
        cells = [(e.step or 0, rate(e, chosen, "refused")) for e in scored] if chosen else []
        if chosen:
            curves["rejection_rate", kind.value] = [
                Reading(step, cell.estimate, cell.low, cell.high) for step, cell in cells if cell
            ]
    return Trajectory(run, curves, SCORED) if curves else None


# --- figures of curves --------------------------------------------------------------------------


def _curves(
    figure: str,
    records: Sequence[RunRecord],
    reader: Callable[[RunRecord], Trajectory | None],
    lacking: tuple[str, str],
    title: str,
    caption: str,
    draw: Callable[[Sequence[tuple[str, Trajectory]]], Figure],
    keys: Key = ("quantity", "kind"),
) -> Drawing:
    """Every run's curves, with a note on each run without; UserError where no run has one."""
    what, cure = lacking
    pairs = [(run, reader(run)) for run in records]
    have = [trajectory for _, trajectory in pairs if trajectory]
    if not have:
        raise UserError(f"figure {figure}: no {what} in {folders(records)}; {cure}")
    named = list(zip(names([trajectory.run for trajectory in have]), have, strict=True))
    rows = [
        (name, config_of(t.run, "method"), config_of(t.run, "model"), *key, r.step, r.value,
         r.low, r.high, t.source)
        for name, t in named
        for key, curve in t.curves.items()
        for r in curve
    ]  # fmt: skip
    lack = (run for run, trajectory in pairs if not trajectory)
    return Drawing(
        f"figure{figure}",
        f"Figure {figure}: {title}",
        caption,
        ("run", "method", "model", *keys, "step", "estimate", "low", "high", "source"),
        rows,
        partial(draw, named),
        notes=tuple(f"figure {figure}: no {what} in {folders([run])}" for run in lack),
    )


def _draw_kinds(axis: str, named: Sequence[tuple[str, Trajectory]]) -> Figure:
    """A panel a run, a line a kind."""
    figure, axes = figures.panels(len(named))
    for place, (name, trajectory) in zip(axes, named, strict=True):
        for (quantity, kind), curve in trajectory.curves.items():
            if quantity != "prefix_free":
                _draw_curve(place, kind, curve)
        figures.heading(place, name)
        figures.step_axis(place)
        figures.share_axis(place)
        place.set_ylabel(axis)
    present = {kind for _, t in named for _, kind in t.curves}
    figures.key(figure, figures.kind_handles([k for k in figures.KINDS if k in present]))
    return figure


def _draw_curve(axes: Axes, kind: str, curve: Sequence[Reading]) -> None:
    """A kind's line with markers, and a band between readings that have an interval."""
    colour, marker, dashes = figures.kind_style(kind)
    steps = [reading.step for reading in curve]
    axes.plot(steps, [r.value for r in curve], color=colour, marker=marker, linestyle=dashes)
    lows, highs = (
        [math.nan if end is None else end for end in ends]
        for ends in ([r.low for r in curve], [r.high for r in curve])
    )
    if not all(map(math.isnan, lows)):
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)


def figure1a(records: Sequence[RunRecord]) -> Drawing:
    """STL: rejection rates of toxic and seemingly toxic prompts, one panel a run."""
    stl = _stl("1a", records, "tracking.snapshots=20")
    return _curves(
        "1a",
        stl,
        _rejections,
        ("scored snapshots", scoring_command(stl)),
        "Rejection rates while STL trains",
        "Keyword rejection rate of toxic and of seemingly toxic prompts, sets pooled, against the "
        "step of SFT, with 95% Wilson intervals. Of several evaluation settings of its snapshots, "
        "that of the most.",
        partial(_draw_kinds, "rejection rate"),
    )


def scoring_command(records: Sequence[RunRecord]) -> str:
    """How snapshots come to be scored, for the first of these runs."""
    return (
        f"train with tracking.snapshots=20, then run python eval.py run={folders(records[:1])} "
        "snapshots=true tasks=[over_refusal,safety]"
    )


def figure1b(records: Sequence[RunRecord]) -> Drawing:
    """The followed prompts' refusal probability: runs of the first folder's model."""
    first = config_of(records[0], "model")
    return _followed("1b", [run for run in records if config_of(run, "model") == first])


def figure9(records: Sequence[RunRecord]) -> Drawing:
    """As Figure 1(b), for the models that it leaves out; the only one where there is one alone."""
    first = config_of(records[0], "model")
    others = [run for run in records if config_of(run, "model") != first]
    return _followed("9", others or records)


def _followed(figure: str, records: Sequence[RunRecord]) -> Drawing:
    return _curves(
        figure,
        of_method(records, "stl") or records,
        followed_probabilities,
        ("refusal probabilities of followed prompts over SFT steps", TRACK),
        "Refusal probability of three prompts during SFT",
        "Refusal probability (plain sum over the refusal phrases) of one seemingly toxic, one "
        "toxic and one normal prompt against the step of SFT. STL where it was given, else every "
        "run.",
        partial(_draw_kinds, "refusal probability"),
    )


def figure5a(records: Sequence[RunRecord]) -> Drawing:
    """Mean refusal probability by kind while STL trains."""
    stl = _stl("5a", records, "tracking.quantities=[refusal_probability]")
    return _mean_probability("5a", stl, "SFT without stage one")


def figure5b(records: Sequence[RunRecord]) -> Drawing:
    """Mean refusal probability by kind while SFT follows stage one."""
    chosen = of_method(records, "dcr")
    if not chosen:
        raise UserError(
            f"figure 5b: no DCR run among {folders(records)}; train one with method=dcr "
            "tracking.quantities=[refusal_probability]"
        )
    return _mean_probability("5b", chosen, "SFT after stage one")


def _stl(figure: str, records: Sequence[RunRecord], needed: str) -> list[RunRecord]:
    chosen = of_method(records, "stl")
    if not chosen:
        raise UserError(
            f"figure {figure}: no STL run among {folders(records)}; train one with method=stl "
            f"{needed}"
        )
    return chosen


def _mean_probability(figure: str, chosen: Sequence[RunRecord], title: str) -> Drawing:
    return _curves(
        figure,
        chosen,
        kind_probabilities,
        ("refusal probabilities over SFT steps", TRACK),
        f"Mean refusal probability by kind: {title}",
        "Mean refusal probability (plain sum over the refusal phrases) of seemingly toxic, toxic "
        "and normal prompts against the step of SFT; bands are 95% bootstrap intervals over "
        "prompts where they were kept. The prefix-free probability is in the CSV.",
        partial(_draw_kinds, "mean refusal probability"),
    )


def figure3(records: Sequence[RunRecord]) -> Drawing:
    """All nine pairs of kinds over SFT: a row of panels a run and choice of parameters."""
    return _curves(
        "3",
        of_method(records, "stl") or records,
        kernels,
        ("kernels over SFT steps", "train with tracking.quantities=[kernel]"),
        "the kernel between kinds of prompts during SFT",
        "Mean normalised ‖K(x′,x)‖ for all nine pairs of kinds against the step of SFT: a panel "
        "for each kind of observer x′, a line for each kind of trained prompt x, a row for each "
        "choice of parameters. STL where it was given, else every run.",
        _draw_pairs,
        ("params", "observer", "trained"),
    )


def _draw_pairs(named: Sequence[tuple[str, Trajectory]]) -> Figure:
    blocks: list[tuple[str, dict[Key, list[Reading]]]] = []
    for name, t in named:
        choices = list(dict.fromkeys(key[0] for key in t.curves))
        for params in choices:
            own = {key[1:]: curve for key, curve in t.curves.items() if key[0] == params}
            several = len(named) > 1 or len(choices) > 1
            blocks.append((f"{name}, {params}" if several else params, own))
    kinds = figures.ordered([kind for _, curves in blocks for key in curves for kind in key])
    figure, axes = figures.panels(len(kinds) * len(blocks), columns=len(kinds))
    for start, (name, curves) in zip(range(0, len(axes), len(kinds)), blocks, strict=True):
        row = axes[start : start + len(kinds)]
        for place, observer in zip(row, kinds, strict=True):
            for trained in kinds:
                if curve := curves.get((observer, trained)):
                    _draw_curve(place, trained, curve)
            first = place is row[0]
            place.set_title(f"{name if first else ''}\nx′: {kind_name(observer)}")
            figures.step_axis(place)
            place.set_ylabel(NORM if first else "")
        # a row shares its scale
        values = [reading.value for curve in curves.values() for reading in curve]
        values += [1.0 for place in row if not place.lines]
        for place in row:
            place.set_ylim(0, 1.05 * max(values))
    figures.key(figure, figures.kind_handles(kinds), title="trained on x")
    return figure


# --- the frontier over checkpoints --------------------------------------------------------------

XSTEST = {Kind.seemingly_toxic: ["xstest_safe"], Kind.toxic: ["xstest_unsafe"]}
HEADER = ("run", "method", "model", "step", "compliance", "compliance_low", "compliance_high",
          "rejection", "rejection_low", "rejection_high", "compliance_of",
          "rejection_of")  # fmt: skip
NOTHING = Cell(math.nan, math.nan, math.nan)
Points = list[tuple[int, Cell, Cell]]  # step, compliance, rejection


def figure4(records: Sequence[RunRecord]) -> Drawing:
    """The frontier over checkpoints: compliance against rejection, light to dark."""
    chosen = [r for r in records if config_of(r, "method") in ("stl", "dcr")] or list(records)
    found = [(run, snapshots(run, lambda e: e.sets)) for run in chosen]
    have = [(run, scored) for run, scored in found if scored]
    if not have:
        raise UserError(
            f"figure 4: no scored snapshots in {folders(chosen)}; {scoring_command(chosen)}"
        )
    sets, x_of, y_of = _frontier_sets([e for _, scored in have for e in scored])
    if not all(sets.values()):
        raise UserError(
            f"figure 4: the snapshots of {folders(r for r, _ in have)} share no sets of both "
            f"kinds; {scoring_command(chosen)}"
        )
    frontiers: list[tuple[str, Points]] = []
    rows = []
    for name, (run, scored) in zip(names([run for run, _ in have]), have, strict=True):
        points: Points = []
        for e in scored:
            x, y = (rate(e, chosen, WANTED[kind]) or NOTHING for kind, chosen in sets.items())
            points.append((e.step or 0, x, y))
        frontiers.append((name, points))
        rows += [
            (name, config_of(run, "method"), config_of(run, "model"), step,
             x.estimate, x.low, x.high, y.estimate, y.low, y.high, x_of, y_of)
            for step, x, y in points
        ]  # fmt: skip
    return Drawing(
        "figure4",
        "Figure 4: the frontier over checkpoints",
        f"Compliance with {x_of} against the keyword rejection rate of {y_of}: one point "
        "a checkpoint, from light (early) to dark (late); the numbers are the first and the last "
        "step. Top right is best. Of several evaluation settings, that of the most snapshots.",
        HEADER,
        rows,
        partial(_draw_frontiers, frontiers, x_of, y_of),
        notes=tuple(
            f"figure 4: no scored snapshots in {folders([r])}" for r, scored in found if not scored
        ),
    )


def _frontier_sets(scored: Sequence[Evaluation]) -> tuple[dict[Kind, list[str]], str, str]:
    """XSTest where every snapshot was evaluated on it, else all that they share, and the names."""
    shared = shared_sets(scored)
    if all(name in shared for chosen in XSTEST.values() for name in chosen):
        return XSTEST, "XSTest-safe", "XSTest-unsafe"
    sets = shared_by_kind(scored)
    x, y = ("one set" if len(chosen) == 1 else "sets pooled" for chosen in sets.values())
    return (
        sets,
        f"seemingly toxic prompts ({x}, XSTest not evaluated)",
        f"toxic prompts ({y}, XSTest not evaluated)",
    )


def _draw_frontiers(frontiers: Sequence[tuple[str, Points]], x_of: str, y_of: str) -> Figure:
    figure, (axes,) = figures.panels(1, 3.8, 3.5)
    handles = []
    for place, (name, points) in enumerate(frontiers):
        colour, marker = line_style(place)
        xs, ys = [100 * x.estimate for _, x, _ in points], [100 * y.estimate for *_, y in points]
        axes.plot(xs, ys, color=figures.shade(colour, 0.25), linewidth=0.9, zorder=2)
        last = max(1, len(points) - 1)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
            axes.plot(x, y, marker, color=figures.shade(colour, i / last), markersize=5,
                      markeredgecolor=colour, markeredgewidth=0.4, zorder=3)  # fmt: skip
        for i in sorted({0, len(points) - 1}):
            up = 5 if i else 5 - 10 * (place % 2)  # frontiers often begin in one point
            axes.annotate(f"{points[i][0]}", (xs[i], ys[i]), xytext=(5, up), fontsize=7,
                          textcoords="offset points", color=colour, zorder=5)  # fmt: skip
        handles.append(
            figures.handle(name, color=colour, marker=marker, markersize=5, linewidth=0.9)
        )
    axes.set(xlim=(-3, 108), ylim=(-3, 106))
    axes.set_xlabel(f"compliance with {x_of}, %".replace(" (", "\n("))
    axes.set_ylabel(f"rejection of {y_of}, %".replace(" (", "\n("))
    figures.key(figure, handles, columns=2)
    return figure


CURVES: dict[str, Callable[[Sequence[RunRecord]], Drawing]] = {
    "1a": figure1a,
    "1b": figure1b,
    "3": figure3,
    "4": figure4,
    "5a": figure5a,
    "5b": figure5b,
    "9": figure9,
}
