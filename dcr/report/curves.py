"""Figures 1, 3, 5 and 9: quantities over the steps of SFT; and the page's curves of training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from dcr import results
from dcr.core import storage
from dcr.core.config import Kind, UserError
from dcr.core.results import Estimate
from dcr.core.runs import last_stage
from dcr.ending import printable
from dcr.report import figures
from dcr.report.figures import Curve, Drawing, Drawings, Panel, kind_name
from dcr.report.grids import rate, together
from dcr.report.records import (
    METHODS,
    Evaluation,
    RunRecord,
    Style,
    TrackedStep,
    about,
    config_of,
    label_of,
    run_styles,
    style_of,
    unedited,
)
from dcr.report.sections import Selection
from dcr.results.schema import interval

TRACKED, KEPT, SCORED = "metrics.csv", "tracking", "snapshots"  # sources of curves
STAGES = {
    **{"base": "base model", "contrastive": "after stage one"},
    **{"sft": "after SFT", "readout": "after the readout"},
}
NORM = "mean normalised ‖K‖"
SCORE = (
    "train with tracking.snapshots=20, then run python eval.py run={run} snapshots=true "
    "tasks=[over_refusal,safety]"
)
Key = tuple[str, ...]
Measures = TrackedStep | Evaluation
CurveRow = tuple[Any, ...]  # key, step, estimate, low, high, source; nan where no end is known


# --- runs, their names and their evaluations -----------------------------------------------------


def named(records: Sequence[RunRecord], weights: str | None = None) -> list[tuple[RunRecord, str]]:
    """Each run with a name that no other has: method, preset, seed, and, of several, the model.

    The stages that made `weights` name the method; by default these are the run's last weights.
    """
    several = len({config_of(run, "model") for run in records} - {""}) > 1
    plain = []
    for run in records:
        made = {"folder": run.folder, "weights": weights or last_stage(run.config)}
        label = label_of(run, Evaluation.model_validate(made), several)
        plain.append(", ".join(label if config_of(run, "method") else [printable(run.folder.name)]))
    for distinct in (lambda folder: folder.name, str):
        plain = [
            f"{name} ({printable(distinct(run.folder))})" if plain.count(name) > 1 else name
            for name, run in zip(plain, records, strict=True)
        ]
    return list(zip(records, plain, strict=True))


def name_of_weights(run_name: str, run: RunRecord, evaluation: Evaluation) -> str:
    """The name of the evaluated weights: a run after a stage or step of SFT, or the base model.

    An edit of activations follows.
    """
    edit = edit_of(evaluation)
    if evaluation.weights == "base":
        return ", ".join(filter(None, (STAGES["base"], about(run, evaluation, "model"), edit)))
    stage = STAGES.get(evaluation.weights, evaluation.weights)
    stage = stage if evaluation.step is None else f"SFT step {evaluation.step}"
    return ", ".join(filter(None, (run_name, stage, edit)))


def edit_of(evaluation: Evaluation) -> str:
    """The edit of activations that an evaluation was made under; empty without one."""
    return printable(results.edit({"steering": evaluation.settings.get("steering")}))


def folders(records: Iterable[RunRecord]) -> str:
    return ", ".join(printable(str(run.folder)) for run in records)


def snapshots(run: RunRecord, has: Callable[[Evaluation], object]) -> list[Evaluation]:
    """Unsteered evaluations of snapshots by step, under the one setting with the most steps."""
    by_setting: dict[str, dict[int, Evaluation]] = {}
    for e in run.evaluations:
        if e.weights == "snapshot" and e.step is not None and unedited(e) and has(e):
            by_setting.setdefault(storage.fingerprint([e.settings, e.data]), {})[e.step] = e
    most = max(by_setting.values(), key=len, default={})
    return [most[step] for step in sorted(most)]


def shared_by_kind(evaluations: Sequence[Evaluation]) -> dict[Kind, list[str]]:
    """The sets that all these evaluations share and that may be summed up, by kind."""
    first = evaluations[0].sets if evaluations else {}
    shared = {name: of for name, of in first.items() if all(name in e.sets for e in evaluations)}
    return {
        kind: together(name for name, counts in shared.items() if counts.kind is kind)
        for kind in (Kind.seemingly_toxic, Kind.toxic)
    }


# --- measurements of a run ----------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """Curves by `keys`: the first keys by prefix in metrics.csv, and the values of a step."""

    keys: tuple[str, ...]
    logged: Mapping[str, Key]
    values: Callable[[Measures], Iterator[tuple[Key, Estimate]]]


def _by_kind(measures: Measures) -> Iterator[tuple[Key, Estimate]]:
    kinds = measures.refusal_probability.kinds if measures.refusal_probability else {}
    for kind, means in kinds.items():
        yield ("plain", kind), means.plain
        yield ("prefix_free", kind), means.prefix_free


def _by_followed(measures: Measures) -> Iterator[tuple[Key, Estimate]]:
    followed = measures.refusal_probability.followed if measures.refusal_probability else {}
    for kind, prompt in followed.items():
        yield ("plain", kind), (prompt.plain, None, None)
        yield ("prefix_free", kind), (prompt.prefix_free, None, None)


def _by_pair(measures: Measures) -> Iterator[tuple[Key, Estimate]]:
    for params, matrix in (measures.kernel.params if measures.kernel else {}).items():
        for observer, row in matrix.items():
            for trained, mean in row.items():
                yield (params, observer, trained), mean


LOGGED = {"refusal_probability": ("plain",), "refusal_probability_prefix_free": ("prefix_free",)}
PROBABILITIES = Quantity(("quantity", "kind"), LOGGED, _by_kind)
FOLLOWED = Quantity(
    ("quantity", "kind"), {"refusal_probability/followed": ("plain",)}, _by_followed
)
KERNELS = Quantity(("params", "observer", "trained"), {"kernel": ()}, _by_pair)


def curves(run: RunRecord, of: Quantity, stage: str = "sft") -> list[CurveRow]:
    """The quantity over a stage by key and step: from metrics.csv and tracking, else snapshots.

    Tracking's value of a step, with its interval, replaces the logged value; the last of several
    logged values counts.
    """
    values: dict[tuple[Key, int], tuple[float, float, float]] = {}
    for row in run.metrics:
        for prefix, first in of.logged.items():
            head, _, rest = str(row["key"]).partition(f"{stage}/{prefix}/")
            key = (*first, *map(printable, rest.split("/")))
            if not head and rest and len(key) == len(of.keys):
                values[key, row["step"]] = (row["value"], math.nan, math.nan)
    kept = _measured((tracked for tracked in run.tracked if tracked.stage == stage), of)
    values, source = values | kept, KEPT if kept else TRACKED
    if not values and stage == "sft":
        scored = snapshots(run, lambda e: next(of.values(e), None))
        values, source = _measured(scored, of), SCORED
    order = {key: place for place, key in enumerate(dict.fromkeys(key for key, _ in values))}
    return [
        (*key, step, *values[key, step], source)
        for key, step in sorted(values, key=lambda at: (order[at[0]], at[1]))
    ]


def _measured(
    steps: Iterable[Measures], of: Quantity
) -> dict[tuple[Key, int], tuple[float, float, float]]:
    """The steps' values without means that are not finite; such ends become nan."""
    values = {}
    for step in steps:
        for key, estimate in of.values(step):
            mean, *ends = vars(interval(estimate)).values()
            known = ends if all(map(math.isfinite, ends)) else (math.nan, math.nan)
            if math.isfinite(mean):
                values[key, step.step or 0] = (mean, *known)
    return values


def _rejections(run: RunRecord) -> list[CurveRow]:
    scored = snapshots(run, lambda e: e.sets)
    return [
        ("rejection_rate", kind.value, e.step or 0, *vars(cell.interval).values(), SCORED)
        for kind, names in shared_by_kind(scored).items()
        for e in scored
        if (cell := rate(e, names, "refused"))
    ]


# --- figures of curves --------------------------------------------------------------------------


@dataclass(frozen=True)
class OverSft:
    """A figure over the steps of SFT: its curves, its runs, and the command that measures them.

    Without runs of its `method` it shows every run. If it can only show that method's runs, `alone`
    is the setting that they need.
    """

    read: Callable[[RunRecord], list[CurveRow]]
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
    partial(curves, of=PROBABILITIES),
    "refusal probabilities over SFT steps",
    f"train with {REFUSAL_QUANTITY}",
    "Mean refusal probability by kind: SFT {} stage one",
    "Mean refusal probability (plain sum over the refusal phrases) by kind of prompt, with 95% "
    "bootstrap intervals over prompts where they were kept; the CSV has the prefix-free one too.",
    "mean refusal probability",
)
OF_THREE = (
    partial(curves, of=FOLLOWED),
    "refusal probabilities of followed prompts over SFT steps",
    f"train with {REFUSAL_QUANTITY}",
    "Refusal probability of three prompts during SFT",
    "Refusal probability (plain sum over the refusal phrases) of one prompt of each kind, of STL "
    "where it was given, else of every run.",
    "refusal probability",
)
CURVES = {
    "1a": OverSft(
        _rejections,
        "scored snapshots",
        SCORE,
        "Rejection rates while STL trains",
        "Keyword rejection rate by kind of prompt, sets pooled, with 95% Wilson intervals; of "
        "several evaluation settings of its snapshots, that of the most.",
        "rejection rate",
        alone="tracking.snapshots=20",
    ),
    "1b": OverSft(*OF_THREE, others=False),
    "3": OverSft(
        partial(curves, of=KERNELS),
        "kernels over SFT steps",
        "train with tracking.quantities=[kernel]",
        "the kernel between kinds of prompts during SFT",
        "Mean normalised ‖K(x′,x)‖ for all pairs of kinds, a panel for each kind of observer x′, a "
        "row for each choice of parameters, of STL where it was given, else of every run.",
        NORM,
    ),
    "5a": OverSft(*MEANS, alone=REFUSAL_QUANTITY),
    "5b": OverSft(*MEANS, method="dcr", alone=REFUSAL_QUANTITY),
    "9": OverSft(*OF_THREE, others=True),
}


def over_sft(chosen: Selection, figure: str) -> Drawing:
    """Draws every run's curves, with a note on each run without. UserError if no run has one."""
    declared, records = CURVES[figure], list(chosen.records)
    if declared.others is not None:
        of_first = [config_of(run, "model") == config_of(records[0], "model") for run in records]
        pairs = zip(records, of_first, strict=True)
        # with a single model there are no others
        records = [run for run, first in pairs if first != declared.others] or records
    runs = [run for run in records if config_of(run, "method") == declared.method]
    if declared.alone and not runs:
        raise UserError(
            f"figure {figure}: no {METHODS[declared.method]} run among {folders(records)}; train "
            f"one with method={declared.method} {declared.alone}"
        )
    by_run = [(run, declared.read(run)) for run in runs or records]
    shown = [run for run, rows in by_run if rows]
    lacking = [run for run, rows in by_run if not rows]
    if not shown:
        cure = declared.cure.format(run=folders(lacking[:1]))
        raise UserError(f"figure {figure}: no {declared.lack} in {folders(lacking)}; {cure}")
    chosen.notes.extend(
        f"figure {figure}: no {declared.lack} in {folders([run])}" for run in lacking
    )
    name_of = {run.folder: name for run, name in named(shown, "snapshot")}
    rows = [
        (name_of[run.folder], config_of(run, "method"), config_of(run, "model"), *row)
        for run, own in by_run
        for row in own
    ]
    keys = ("params", "observer", "trained") if declared.axis == NORM else ("quantity", "kind")
    ends = ("step", "estimate", "low", "high", "source")
    values = figures.frame(rows, "run", "method", "model", *keys, *ends)
    drawn = _pairs(values) if declared.axis == NORM else _kinds(values, declared.axis)
    title = declared.title.format("after" if declared.method == "dcr" else "without")
    return Drawing(
        f"figure{figure}",
        f"Figure {figure}: {title}",
        values=values,
        caption=declared.caption,
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
        top: float = max([*own["estimate"], *([1.0] if len(by_observer) < len(kinds) else [])])
        for kind in kinds:
            first = kind == kinds[0]
            by_trained = dict(figures.parts(by_observer.get(kind, own.head(0)), "trained"))
            lines = [_line(by_trained[of], of) for of in kinds if of in by_trained]
            named = f"{title if first else ''}\nx′: {kind_name(kind)}"
            axes = {"ylim": (0, 1.05 * top), "xlabel": "SFT step", "ylabel": NORM if first else ""}
            panels.append(Panel(lines, named, axes, steps=5))
    return {
        "blocks": {"": panels},
        "across": len(kinds),
        "legend": figures.kind_legend(kinds),
        "legend_title": "trained on x",
    }


# --- the page's curves of training ---------------------------------------------------------------

STEP_LOSS = "contrastive/step_circle"
# Panels: title, epoch-level key, step-level key if any.
TRAINING = (
    ("Stage one: Circle loss above its floor", "contrastive/above_floor", STEP_LOSS),
    ("Stage one: cosine within a class", "contrastive/within_cosine", None),
    ("Stage one: cosine across the classes", "contrastive/across_cosine", None),
    ("Stage two: SFT loss of each step", None, "sft/step_nll"),
    ("Stage two: NLL a token, general rows", "sft/nll/general", None),
    ("Stage two: NLL a token, refusal rows", "sft/nll/refusal", None),
    ("Stage three: readout's contrast of each step", None, "readout/step_contrast"),
)  # fmt: skip


def by_seed(chosen: Selection) -> list[tuple[Style, str, list[RunRecord]]]:
    """Runs that logged something; those that differ only by their seed share one name."""
    records, groups = chosen.records, {}
    styles = run_styles(records)
    labels = {run.folder: tuple(name.split(", ")) for run, name in named(records)}
    plain = [c for c in chosen.columns if c.evaluation.weights != "base" and unedited(c.evaluation)]
    labels |= {column.run.folder: column.label for column in reversed(plain)}
    for run in records:
        if run.metrics or run.tracked:
            style = style_of(run, styles)
            # neutral ones may differ; a seed that was trained twice counts once
            seeds = groups.setdefault(style.variant or run.folder, {})
            seeds.setdefault(style.seed, (style, labels[run.folder], run))
    found = []
    for alike in (list(seeds.values()) for seeds in groups.values()):
        style, label, _ = alike[0]
        if len(alike) > 1:
            shared = (part for part in label if all(part in of for _, of, _ in alike))
            label = [*shared, f"{len(alike)} seeds"]
        found.append((style, " ".join(label), [run for *_, run in alike]))
    return found


def training(chosen: Selection) -> Drawings:
    """Training.

    Solid: training, markers at the ends of epochs. Dashed: held-out rows. Thin: single steps. Of
    runs that differ by their seed alone the mean, in a band of one standard deviation.
    """
    drawings, groups = [], by_seed(chosen)
    for index, (title, epoch_key, step_key) in enumerate(TRAINING):
        drawn: list[Curve] = []
        for style, _, runs in groups:
            look = figures.run_look(style)
            thin = {"color": look["color"], "linewidth": 0.9, "alpha": 0.35 if epoch_key else 0.85}
            parts = [(step_key, thin)] if step_key else []
            for key, dashes in ((epoch_key, "-"), (f"{epoch_key}/heldout", "--")):
                more = {"markersize": 4, "linewidth": 1.4, "linestyle": dashes}
                parts += [(key, look | more)] if epoch_key and key else []
            for key, own in parts:
                read = above_floor if key == STEP_LOSS else partial(_series, key=key)
                series = over_seeds([read(run.metrics) for run in runs])
                drawn += [Curve(curve, own) for curve in series]
        if drawn:
            panel = Panel(drawn, title, {"xlabel": "optimiser step"}, steps=7)
            drawings.append(Drawing(f"curve{index}", title, {"": [panel]}, size=(3.8, 2.5)))
    return Drawings(drawings, figures.style_legend([(style, name) for style, name, _ in groups]))


def over_seeds(series: Sequence[pd.Series]) -> list[pd.DataFrame]:
    """The mean at the places that all share, within one standard deviation.

    A single curve stays as it is, and so does each if they share fewer than two places.
    """
    known = [curve for curve in series if len(curve)]
    if len(known) > 1:
        shared = pd.concat(known, axis=1, join="inner")
        mean, spread = shared.mean(axis=1), shared.std(axis=1)
        if len(shared) > 1:
            band = {"x": shared.index, "y": mean, "low": mean - spread, "high": mean + spread}
            return [pd.DataFrame(band)]
    return [pd.DataFrame({"x": curve.index, "y": curve.to_numpy()}) for curve in known]


def _series(metrics: Sequence[Mapping[str, Any]], key: str) -> pd.Series:
    """The finite values by step; the last value of a step counts."""
    points = {row["step"]: row["value"] for row in metrics if row["key"] == key}
    finite = {step: value for step, value in sorted(points.items()) if math.isfinite(value)}
    return pd.Series(finite, dtype=float)


def above_floor(metrics: Sequence[Mapping[str, Any]]) -> pd.Series:
    """The loss of each step less the mean floor of its epoch, which all balanced batches share."""
    circle, above = (_series(metrics, f"contrastive/{name}") for name in ("circle", "above_floor"))
    floors = (circle - above).dropna()
    steps = _series(metrics, STEP_LOSS)
    if floors.empty:
        return floors
    return steps - floors.reindex(steps.index, method="bfill").fillna(floors.iloc[-1])
