"""Figures 1, 3, 5 and 9: quantities over the steps of SFT; and the page's curves of training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from dcr.core.config import UserError
from dcr.ending import printable
from dcr.report import figures
from dcr.report.columns import METHODS, Style, named, shared_label, style_of
from dcr.report.figures import Curve, Drawing, Drawings, Panel
from dcr.report.grids import plain, rate, shared_by_kind
from dcr.report.records import Evaluation, RunRecord, TrackedStep, folders
from dcr.report.sections import Selection
from dcr.results.schema import Estimate, interval

TRACKED, KEPT, SCORED = "metrics.csv", "tracking", "snapshots"  # sources of curves
NORM = "mean normalised ‖K‖"
SCORE = (
    "train with tracking.snapshots=20, then run python eval.py run={run} snapshots=true "
    "tasks=[over_refusal,safety]"
)
Key = tuple[str, ...]
Measures = TrackedStep | Evaluation
CurveRow = tuple[Any, ...]  # key, step, estimate, low, high, source; nan where no end is known


# --- measurements of a run ----------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """Curves by `keys`: the first keys by prefix in metrics.csv, and the values of a step."""

    keys: tuple[str, ...]
    logged: Mapping[str, Key]
    values: Callable[[Measures], Iterator[tuple[Key, Estimate]]]


def _refusals(measures: Measures, followed: bool = False) -> Iterator[tuple[Key, Estimate]]:
    """Means by kind, or the one `followed` prompt of each, which has no interval."""
    if found := measures.refusal_probability:
        for kind, of in (found.followed if followed else found.kinds).items():
            for quantity, value in (("plain", of.plain), ("prefix_free", of.prefix_free)):
                yield (quantity, kind), value if isinstance(value, tuple) else (value, None, None)


def _by_pair(measures: Measures) -> Iterator[tuple[Key, Estimate]]:
    for params, matrix in (measures.kernel.params if measures.kernel else {}).items():
        for observer, row in matrix.items():
            for trained, mean in row.items():
                yield (params, observer, trained), mean


LOGGED = {"refusal_probability": ("plain",), "refusal_probability_prefix_free": ("prefix_free",)}
PROBABILITIES = Quantity(("quantity", "kind"), LOGGED, _refusals)
FOLLOWED = Quantity(
    PROBABILITIES.keys,
    {"refusal_probability/followed": ("plain",)},
    partial(_refusals, followed=True),
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
        scored = run.snapshots(lambda e: next(of.values(e), None))
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
    scored = run.snapshots(lambda e: e.sets)
    return [
        ("rejection_rate", kind.value, e.step or 0, *vars(cell.interval).values(), SCORED)
        for kind, names in shared_by_kind(scored).items()
        for e in scored
        if (cell := rate(e, names, "refused"))
    ]


# --- figures of curves --------------------------------------------------------------------------


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


def _pairs(values: pd.DataFrame, axis: str) -> dict[str, Any]:
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
            named = f"{title if first else ''}\nx′: {plain(kind)}"
            axes = {"ylim": (0, 1.05 * top), "xlabel": "SFT step", "ylabel": axis if first else ""}
            panels.append(Panel(lines, named, axes, steps=5))
    return {
        "blocks": {"": panels},
        "across": len(kinds),
        "legend": figures.kind_legend(kinds),
        "legend_title": "trained on x",
    }


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
    keys: tuple[str, ...] = PROBABILITIES.keys
    panels: Callable[[pd.DataFrame, str], dict[str, Any]] = _kinds
    method: str = "stl"
    alone: str = ""
    others: bool | None = None  # True: without the first folder's model; False: only that model


REFUSAL_QUANTITY = "tracking.quantities=[refusal_probability]"
MEANS = OverSft(
    partial(curves, of=PROBABILITIES),
    "refusal probabilities over SFT steps",
    f"train with {REFUSAL_QUANTITY}",
    "Mean refusal probability by kind: SFT without stage one",
    "Mean refusal probability (plain sum over the refusal phrases) by kind of prompt, with 95% "
    "bootstrap intervals over prompts where they were kept; the CSV has the prefix-free one too.",
    "mean refusal probability",
    alone=REFUSAL_QUANTITY,
)
OF_THREE = OverSft(
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
    "1b": replace(OF_THREE, others=False),
    "3": OverSft(
        partial(curves, of=KERNELS),
        "kernels over SFT steps",
        "train with tracking.quantities=[kernel]",
        "the kernel between kinds of prompts during SFT",
        "Mean normalised ‖K(x′,x)‖ for all pairs of kinds, a panel for each kind of observer x′, a "
        "row for each choice of parameters, of STL where it was given, else of every run.",
        NORM,
        KERNELS.keys,
        _pairs,
    ),
    "5a": MEANS,
    "5b": replace(MEANS, method="dcr", title=MEANS.title.replace("without", "after")),
    "9": replace(OF_THREE, others=True),
}


def over_sft(chosen: Selection, figure: str) -> Drawing:
    """Draws every run's curves, with a note on each run without. UserError if no run has one."""
    declared, records = CURVES[figure], list(chosen.records)
    if declared.others is not None:
        of_first = [run.about("model") == records[0].about("model") for run in records]
        pairs = zip(records, of_first, strict=True)
        # with a single model there are no others
        records = [run for run, first in pairs if first != declared.others] or records
    runs = [run for run in records if run.about("method") == declared.method]
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
    chosen.leave_out(figure, declared.lack, lacking)
    name_of = {run.folder: name for run, name in named(shown, "snapshot")}
    rows = [
        (name_of[run.folder], run.about("method"), run.about("model"), *row)
        for run, own in by_run
        for row in own
    ]
    ends = ("step", "estimate", "low", "high", "source")
    values = figures.frame(rows, "run", "method", "model", *declared.keys, *ends)
    return Drawing(
        f"figure{figure}",
        f"Figure {figure}: {declared.title}",
        values=values,
        caption=declared.caption,
        **declared.panels(values, declared.axis),
    )


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
    labels = {run.folder: tuple(name.split(", ")) for run, name in named(records)}
    for column in reversed(chosen.columns):
        if column.evaluation.weights != "base" and column.evaluation.unedited:
            labels[column.run.folder] = column.label
    for run in records:
        if run.metrics or run.tracked:
            style = style_of(run, chosen.styles)
            # neutral ones may differ; a seed that was trained twice counts once
            seeds = groups.setdefault(style.variant or run.folder, {})
            seeds.setdefault(style.seed, (style, labels[run.folder], run))
    found = []
    for alike in (list(seeds.values()) for seeds in groups.values()):
        style, label, _ = alike[0]
        label = label if len(alike) == 1 else shared_label([of for _, of, _ in alike])
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
