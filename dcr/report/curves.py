"""Figures 1, 3, 5 and 9: quantities over the steps of SFT; and the page's curves of training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dcr.core import storage
from dcr.core.config import Kind, UserError
from dcr.core.results.schema import Estimate, SetCounts, interval
from dcr.core.runs import last_stage
from dcr.core.statistics import Interval
from dcr.core.text import printable
from dcr.report import figures
from dcr.report.figures import Curve, Drawing, Drawings, Panel, kind_name
from dcr.report.records import (
    METHODS,
    Evaluation,
    RunRecord,
    Style,
    TrackedStep,
    called,
    config_of,
    other_preset,
    run_styles,
    style_of,
    unedited,
)
from dcr.report.sections import Selection
from dcr.report.tables import rate, together

PREFIXES = {"plain": "refusal_probability", "prefix_free": "refusal_probability_prefix_free"}
TRACKED, KEPT, SCORED = "metrics.csv", "tracking", "snapshots"
STAGES = {
    **{"base": "base model", "contrastive": "after stage one"},
    **{"sft": "after SFT", "readout": "after the readout"},
}
BOTH = (Kind.seemingly_toxic, Kind.toxic)
NORM = "mean normalised ‖K‖"
SCORE = (
    "train with tracking.snapshots=20, then run python eval.py run={run} snapshots=true "
    "tasks=[over_refusal,safety]"
)
Key = tuple[str, ...]
# values by key and step; the ends are nan if only the value is known
Series = dict[Key, dict[int, Interval]]
Values = Callable[[TrackedStep | Evaluation], Iterator[tuple[Key, Estimate]]]


# --- runs, their names and their evaluations -----------------------------------------------------


def named(records: Sequence[RunRecord], weights: str | None = None) -> list[tuple[RunRecord, str]]:
    """Each run with a name that no other has: method, preset, seed, and, of several, the model.

    The stages that made `weights` name the method; by default these are the run's last weights.
    """
    several = len({config_of(run, "model") for run in records} - {""}) > 1
    plain = []
    for run in records:
        method, seed = config_of(run, "method"), config_of(run, "seed")
        parts = (
            called(run, method, weights or last_stage(run.config))
            if method
            else printable(run.folder.name),
            other_preset(config_of(run, "preset_name")),
            f"seed {seed}" if seed else "",
            config_of(run, "model") if several else "",
        )
        plain.append(", ".join(filter(None, parts)))
    for distinct in (lambda folder: folder.name, str):
        plain = [
            f"{name} ({printable(distinct(run.folder))})" if plain.count(name) > 1 else name
            for name, run in zip(plain, records, strict=True)
        ]
    return list(zip(records, plain, strict=True))


def name_of_weights(run_name: str, run: RunRecord, evaluation: Evaluation) -> str:
    """The name of the evaluated weights: a run after a stage or step of SFT, or the base model."""
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
    """Unsteered evaluations of snapshots by step, under the one setting with the most steps."""
    by_setting: dict[str, dict[int, Evaluation]] = {}
    for e in run.evaluations:
        has_step = e.weights == "snapshot" and e.step is not None
        if has_step and unedited(e) and has(e):
            setting = storage.fingerprint([e.settings, e.data])
            by_setting.setdefault(setting, {})[e.step or 0] = e
    most = max(by_setting.values(), key=len, default={})
    return [most[step] for step in sorted(most)]


def shared_sets(evaluations: Sequence[Evaluation]) -> dict[str, SetCounts]:
    """The sets that all these evaluations share, with the first one's counts."""
    if not evaluations:
        return {}
    first, *others = evaluations
    return {
        name: counts for name, counts in first.sets.items() if all(name in e.sets for e in others)
    }


def shared_by_kind(evaluations: Sequence[Evaluation]) -> dict[Kind, list[str]]:
    """The shared sets that may be summed up, by kind."""
    shared = shared_sets(evaluations)
    return {
        kind: together(name for name, counts in shared.items() if counts.kind is kind)
        for kind in BOTH
    }


# --- measurements of a run ----------------------------------------------------------------------


def logged(run: RunRecord, stage: str, prefix: str, parts: int) -> Series:
    """The curves of keys `<stage>/<prefix>/…` with `parts` more parts; the last value counts."""
    curves: Series = {}
    start = f"{stage}/{prefix}/"
    for row in run.metrics:
        key = tuple(str(row["key"]).removeprefix(start).split("/"))
        if str(row["key"]).startswith(start) and len(key) == parts:
            value = Interval(row["value"], math.nan, math.nan)
            curves.setdefault(tuple(map(printable, key)), {})[row["step"]] = value
    return curves


def measured(steps: Iterable[TrackedStep | Evaluation], values: Values) -> Series:
    """The curves of the steps' values without means that are not finite; such ends become nan."""
    curves: Series = {}
    for step in steps:
        for key, estimate in values(step):
            mean = interval(estimate)
            if not all(map(math.isfinite, (mean.low, mean.high))):
                mean = Interval(mean.estimate, math.nan, math.nan)
            if math.isfinite(mean.estimate):
                curves.setdefault(key, {})[step.step or 0] = mean
    return curves


def _joined(run: RunRecord, stage: str, curves: Series, values: Values) -> tuple[Series, bool]:
    """The logged curves by step, and whether tracking kept anything.

    Tracking's value of a step, with its interval, replaces the logged value.
    """
    kept = measured((tracked for tracked in run.tracked if tracked.stage == stage), values)
    joined = {key: curves.get(key, {}) | kept.get(key, {}) for key in {**curves, **kept}}
    return {key: dict(sorted(curve.items())) for key, curve in joined.items()}, bool(kept)


def _over_sft(run: RunRecord, curves: Series, values: Values) -> tuple[Series, str]:
    """The logged curves joined with tracking's, or, without either, those of snapshots."""
    joined, kept = _joined(run, "sft", curves, values)
    if joined:
        return joined, KEPT if kept else TRACKED
    return measured(snapshots(run, lambda e: next(values(e), None)), values), SCORED


def _by_kind(measures: TrackedStep | Evaluation) -> Iterator[tuple[Key, Estimate]]:
    kinds = measures.refusal_probability.kinds if measures.refusal_probability else {}
    for quantity in PREFIXES:
        for kind, means in kinds.items():
            yield (quantity, kind), getattr(means, quantity)


def _by_followed(measures: TrackedStep | Evaluation) -> Iterator[tuple[Key, Estimate]]:
    followed = measures.refusal_probability.followed if measures.refusal_probability else {}
    for quantity in PREFIXES:
        for kind, prompt in followed.items():
            yield (quantity, kind), (getattr(prompt, quantity), None, None)


def _by_pair(measures: TrackedStep | Evaluation) -> Iterator[tuple[Key, Estimate]]:
    for params, matrix in (measures.kernel.params if measures.kernel else {}).items():
        for observer, row in matrix.items():
            for trained, mean in row.items():
                yield (params, observer, trained), mean


def _probabilities(run: RunRecord) -> tuple[Series, str]:
    """Mean refusal probabilities by (quantity, kind)."""
    curves = {
        (quantity, *kind): curve
        for quantity, prefix in PREFIXES.items()
        for kind, curve in logged(run, "sft", prefix, 1).items()
    }
    return _over_sft(run, curves, _by_kind)


def _followed(run: RunRecord) -> tuple[Series, str]:
    """The refusal probabilities of the followed prompts, single values each."""
    curves = logged(run, "sft", f"{PREFIXES['plain']}/followed", 1)
    return _over_sft(run, {("plain", *kind): c for kind, c in curves.items()}, _by_followed)


def _kernels(run: RunRecord) -> tuple[Series, str]:
    """Mean normalised norms by (params, observer, trained)."""
    return _over_sft(run, logged(run, "sft", "kernel", 3), _by_pair)


def tracked_kernels(run: RunRecord, stage: str) -> Series:
    """The kernel that tracking measured during a stage, by (params, observer, trained)."""
    return _joined(run, stage, logged(run, stage, "kernel", 3), _by_pair)[0]


def _rejections(run: RunRecord) -> tuple[Series, str]:
    scored = snapshots(run, lambda e: e.sets)
    curves: Series = {}
    for kind, names_of_kind in shared_by_kind(scored).items():
        cells = [(e.step or 0, rate(e, names_of_kind, "refused")) for e in scored]
        if rates := {step: cell.interval for step, cell in cells if cell}:
            curves["rejection_rate", kind.value] = rates
    return curves, SCORED


# --- figures of curves --------------------------------------------------------------------------


@dataclass(frozen=True)
class OverSft:
    """A figure over the steps of SFT: its curves, its runs, and the command that measures them.

    Without runs of its `method` it shows every run. If it can only show that method's runs, `alone`
    is the setting that they need.
    """

    read: Callable[[RunRecord], tuple[Series, str]]
    lack: str
    cure: str
    title: str
    caption: str
    axis: str
    method: str = "stl"
    alone: str = ""
    others: bool | None = None  # True: without the first folder's model; False: only that model


REFUSAL_QUANTITY = "tracking.quantities=[refusal_probability]"
MEANS = (
    _probabilities,
    "refusal probabilities over SFT steps",
    f"train with {REFUSAL_QUANTITY}",
    "Mean refusal probability by kind: SFT {} stage one",
    "Mean refusal probability (plain sum over the refusal phrases) of seemingly toxic, toxic and "
    "normal prompts against the step of SFT; bands are 95% bootstrap intervals over prompts where "
    "they were kept. The prefix-free probability is in the CSV.",
    "mean refusal probability",
)
FOLLOWED = (
    _followed,
    "refusal probabilities of followed prompts over SFT steps",
    f"train with {REFUSAL_QUANTITY}",
    "Refusal probability of three prompts during SFT",
    "Refusal probability (plain sum over the refusal phrases) of one seemingly toxic, one toxic "
    "and one normal prompt against the step of SFT. STL where it was given, else every run.",
    "refusal probability",
)
CURVES = {
    "1a": OverSft(
        _rejections,
        "scored snapshots",
        SCORE,
        "Rejection rates while STL trains",
        "Keyword rejection rate of toxic and of seemingly toxic prompts, sets pooled, against the "
        "step of SFT, with 95% Wilson intervals. Of several evaluation settings of its snapshots, "
        "that of the most.",
        "rejection rate",
        alone="tracking.snapshots=20",
    ),
    "1b": OverSft(*FOLLOWED, others=False),
    "3": OverSft(
        _kernels,
        "kernels over SFT steps",
        "train with tracking.quantities=[kernel]",
        "the kernel between kinds of prompts during SFT",
        "Mean normalised ‖K(x′,x)‖ for all nine pairs of kinds against the step of SFT: a panel "
        "for each kind of observer x′, a line for each kind of trained prompt x, a row for each "
        "choice of parameters. STL where it was given, else every run.",
        NORM,
    ),
    "5a": OverSft(*MEANS, alone=REFUSAL_QUANTITY),
    "5b": OverSft(*MEANS, method="dcr", alone=REFUSAL_QUANTITY),
    "9": OverSft(*FOLLOWED, others=True),
}


def over_sft(chosen: Selection, figure: str) -> Drawing:
    """Draws every run's curves, with a note on each run without. UserError if no run has one."""
    declared, records = CURVES[figure], list(chosen.records)
    if declared.others is not None:
        models = [config_of(run, "model") for run in records]
        of_first = [model == models[0] for model in models]
        pairs = zip(records, of_first, strict=True)
        # with a single model there are no others
        records = [run for run, first in pairs if first != declared.others] or records
    runs = of_method(records, declared.method)
    if declared.alone and not runs:
        raise UserError(
            f"figure {figure}: no {METHODS[declared.method]} run among {folders(records)}; train "
            f"one with method={declared.method} {declared.alone}"
        )
    runs = runs or list(records)
    by_run = [(run, *declared.read(run)) for run in runs]
    shown = [run for run, curves, _ in by_run if curves]
    if not shown:
        cure = declared.cure.format(run=folders(runs[:1]))
        raise UserError(f"figure {figure}: no {declared.lack} in {folders(runs)}; {cure}")
    name_of = {run.folder: name for run, name in named(shown, "snapshot")}
    keys = ("params", "observer", "trained") if declared.read is _kernels else ("quantity", "kind")
    values = figures.frame(
        [
            (name_of[run.folder], config_of(run, "method"), config_of(run, "model"), *key, step,
             *vars(value).values(), source)
            for run, curves, source in by_run
            for key, curve in curves.items()
            for step, value in curve.items()
        ],
        *("run", "method", "model", *keys, "step", "estimate", "low", "high", "source"),
    )  # fmt: skip
    drawn = _pairs(values) if declared.read is _kernels else _kinds(values, declared.axis)
    title = declared.title.format("after" if declared.method == "dcr" else "without")
    return Drawing(
        f"figure{figure}",
        f"Figure {figure}: {title}",
        values=values,
        caption=declared.caption,
        notes=tuple(
            f"figure {figure}: no {declared.lack} in {folders([run])}"
            for run in runs
            if run not in shown
        ),
        **drawn,
    )


def _kinds(values: pd.DataFrame, axis: str) -> dict[str, Any]:
    """A panel a run, a line a kind."""
    panels = [
        Panel(
            [_line(curve, kind) for kind, curve in figures.parts(own, "kind")],
            figures.folded(name),
            {**figures.SHARES, "xlabel": "SFT step", "ylabel": axis},
            steps=5,
        )
        for (name, quantity), own in figures.parts(values, "run", "quantity")
        if quantity != "prefix_free"
    ]
    kinds = [kind for kind in figures.KINDS if kind in list(values["kind"])]
    return {"blocks": {"": panels}, "legend": figures.kind_legend(kinds)}


def _line(curve: pd.DataFrame, kind: str) -> Curve:
    named = curve.rename(columns={"step": "x", "estimate": "y"})
    return Curve(named.filter(["x", "y", "low", "high"]), figures.kind_look(kind))


def _pairs(values: pd.DataFrame) -> dict[str, Any]:
    """All nine pairs of kinds: a row of panels a run and choice of parameters."""
    kinds = figures.ordered([*values["observer"], *values["trained"]])
    choices = figures.parts(values, "run", "params")
    panels = []
    for (name, params), own in choices:
        title = f"{name}, {params}" if len(choices) > 1 else params
        by_observer = dict(figures.parts(own, "observer"))
        # a row shares its scale
        lacking = [] if len(by_observer) == len(kinds) else [1.0]
        top: float = max([*own["estimate"], *lacking])
        for kind in kinds:
            first = kind == kinds[0]
            by_trained = dict(figures.parts(by_observer.get(kind, own.head(0)), "trained"))
            panels.append(
                Panel(
                    [
                        _line(by_trained[trained], trained)
                        for trained in kinds
                        if trained in by_trained
                    ],
                    f"{title if first else ''}\nx′: {kind_name(kind)}",
                    {
                        "ylim": (0, 1.05 * top),
                        "xlabel": "SFT step",
                        "ylabel": NORM if first else "",
                    },
                    steps=5,
                )
            )
    return {
        "blocks": {"": panels},
        "across": len(kinds),
        "legend": figures.kind_legend(kinds),
        "legend_title": "trained on x",
    }


# --- the page's curves of training ---------------------------------------------------------------

# Panels: title, epoch-level key, step-level key if any.
TRAINING = (
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
    ("Stage three: readout's contrast of each step", None, "readout/step_contrast"),
)


def by_seed(chosen: Selection) -> list[tuple[Style, str, list[RunRecord]]]:
    """Runs that logged something; those that differ only by their seed share one name."""
    records, groups = chosen.records, {}
    styles = run_styles(records)
    labels = {run.folder: tuple(name.split(", ")) for run, name in named(records)}
    trained = [column for column in chosen.columns if column.evaluation.weights != "base"]
    labels |= {column.run.folder: column.label for column in reversed(trained)}
    for run in records:
        if run.metrics or run.tracked:
            style = style_of(run, styles)
            # neutral ones may differ
            alike = groups.setdefault(style.variant or run.folder, [])
            alike.append((style, labels[run.folder], run))
    found = []
    for alike in groups.values():
        style, label, _ = alike[0]
        if len(alike) > 1:
            label = [*(p for p in label if not p.startswith("seed ")), f"{len(alike)} seeds"]
        found.append((style, " ".join(label), [run for *_, run in alike]))
    return found


def training(chosen: Selection) -> Drawings:
    """One panel a quantity that at least one run has logged; held-out values are dashed."""
    drawings, groups = [], by_seed(chosen)
    for index, (title, epoch_key, step_key) in enumerate(TRAINING):
        drawn: list[Curve] = []
        for style, _, runs in groups:
            look = figures.run_look(style)
            parts: list[tuple[list[pd.Series], dict[str, Any]]] = []
            if step_key:
                circle = step_key == "contrastive/step_circle"
                faint = {"color": look["color"], "linewidth": 0.9}
                steps = [
                    above_floor(run.metrics) if circle else _series(run.metrics, step_key)
                    for run in runs
                ]
                parts.append((steps, faint | {"alpha": 0.35 if epoch_key else 0.85}))
            if epoch_key:
                look |= {"markersize": 4, "linewidth": 1.4}
                for key, dashes in ((epoch_key, "-"), (f"{epoch_key}/heldout", "--")):
                    ends = [_series(run.metrics, key) for run in runs]
                    parts.append((ends, look | {"linestyle": dashes}))
            drawn += [Curve(own, lk) for series, lk in parts for own in over_seeds(series)]
        if drawn:
            panel = Panel(drawn, title, {"xlabel": "optimiser step"}, steps=7)
            drawings.append(Drawing(f"curve{index}", title, {"": [panel]}, size=(3.8, 2.5)))
    return Drawings(drawings, figures.style_legend([(style, name) for style, name, _ in groups]))


def over_seeds(curves: Sequence[pd.Series]) -> list[pd.DataFrame]:
    """The mean at the places that all share, within one standard deviation.

    A single curve stays as it is, and so does each if they share fewer than two places.
    """
    known = [curve for curve in curves if len(curve)]
    if len(known) > 1:
        shared = pd.concat(known, axis=1, join="inner")
        mean, spread = shared.mean(axis=1), shared.std(axis=1)
        if len(shared) > 1:
            band = {"x": shared.index, "y": mean, "low": mean - spread, "high": mean + spread}
            return [pd.DataFrame(band)]
    return [pd.DataFrame({"x": curve.index, "y": curve.to_numpy()}) for curve in known]


def probabilities(chosen: Selection) -> Drawings:
    """The plain refusal probability over SFT, each group's mean over seeds by itself."""
    return _over_steps(
        chosen, _probabilities, "probability", figures.SHARES, lambda _: "refusal probability"
    )


def kernels(chosen: Selection) -> Drawings:
    """The kernel over SFT, a panel for each choice of parameters and kind of observer."""
    return _over_steps(
        chosen, _kernels, "kernel", {}, lambda of: f"‖K‖ on {kind_name(of[1])} x′, {of[0]}"
    )


def _over_steps(
    chosen: Selection,
    read: Callable[[RunRecord], tuple[Series, str]],
    what: str,
    axes: dict[str, Any],
    title_of: Callable[[Key], str],
) -> Drawings:
    """A panel for each key without its last part, a kind, and a curve for each kind."""
    drawings = []
    for place, (_, name, runs) in enumerate(by_seed(chosen)):
        panels: dict[Key, dict[str, list[pd.Series]]] = {}
        for run in runs:
            for (*of, kind), curve in read(run)[0].items():
                values = pd.Series({step: value.estimate for step, value in curve.items()})
                panels.setdefault(tuple(of), {}).setdefault(kind, []).append(values)
        panels.pop(("prefix_free",), None)
        for number, (of, by_kind) in enumerate(panels.items()):
            title = f"{name}: {title_of(of)}"
            drawn = [
                Curve(own, figures.kind_look(kind))
                for kind in figures.ordered(list(by_kind))
                for own in over_seeds(by_kind[kind])
            ]
            panel = Panel(drawn, figures.folded(title, 44), {"xlabel": "SFT step"} | axes, steps=7)
            called = f"{what}{place}-{number}"
            drawings.append(Drawing(called, title, {"": [panel]}, size=(3.8, 2.5)))
    return Drawings(drawings, figures.kind_glyphs(*map(kind_name, figures.KINDS)))


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> pd.Series:
    """The finite values by step; the last value of a step counts."""
    points = {row["step"]: row["value"] for row in metrics if row["key"] == key}
    finite = {step: value for step, value in sorted(points.items()) if math.isfinite(value)}
    return pd.Series(finite, dtype=float)


def above_floor(metrics: Sequence[Mapping[str, Any]]) -> pd.Series:
    """The loss of each step less the mean floor of its epoch, which all balanced batches share."""
    circle, above = (_series(metrics, f"contrastive/{name}") for name in ("circle", "above_floor"))
    floors = (circle - above).dropna()
    steps = _series(metrics, "contrastive/step_circle")
    if floors.empty:
        return floors
    return steps - floors.reindex(steps.index, method="bfill").fillna(floors.iloc[-1])
