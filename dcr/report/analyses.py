"""Figures 6, 7 and 8: the kernel between kinds of prompts, and their separability by layer."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dcr.config import UserError
from dcr.report import figures
from dcr.report.curves import (
    NORM,
    STAGES,
    TRACKED,
    folders,
    name_of_weights,
    names,
    tracked_kernels,
)
from dcr.report.figures import INK, Drawing, handle, kind_name, line_style
from dcr.report.records import Evaluation, RunRecord, config_of
from dcr.results.schema import Separability, interval
from dcr.statistics import Interval
from dcr.text import printable

SHADES = colormaps["Blues"]
MATRIX_HEADER = ("figure", "weights", "model", "run", "params", "normalise", "observer", "trained",
                 "estimate", "low", "high", "source")  # fmt: skip
# By weights: the figure, what it shows, and the command that measures it.
KERNELS = {
    "base": (
        "6a",
        "kernel of the base model",
        "run python eval.py model=<name> tasks=[kernel]",
    ),
    "contrastive": (
        "6b",
        "kernel after stage one",
        "run python eval.py run=<dcr run> stage=contrastive tasks=[kernel], or train "
        "method=dcr with tracking.quantities=[kernel]",
    ),
}


@dataclass(frozen=True)
class Matrix:
    """One 3×3 matrix, `[observer][trained]`, of certain weights and parameters."""

    weights: str
    run: RunRecord
    params: str
    normalise: str
    cells: Mapping[str, Mapping[str, Interval]]
    source: str

    @property
    def figure(self) -> str:
        return KERNELS[self.weights][0]

    @property
    def identity(self) -> tuple[object, ...]:
        """What is the same in several folders of one base model."""
        return config_of(self.run, "model"), self.params, self.cells


def figure6a(records: Sequence[RunRecord]) -> Drawing:
    """The 3×3 matrix of the base model."""
    return _matrices("6a", [_of_weights("base", records)])


def figure6b(records: Sequence[RunRecord]) -> Drawing:
    """The 3×3 matrix after stage one."""
    return _matrices("6b", [_of_weights("contrastive", records)])


def figure6(records: Sequence[RunRecord]) -> Drawing:
    """Both on one scale."""
    return _matrices("6", [_of_weights(weights, records) for weights in KERNELS])


def _of_weights(weights: str, records: Sequence[RunRecord]) -> list[Matrix]:
    """Evaluated, or else tracked at a step with these weights; each once. UserError if none."""
    found = [
        Matrix(weights, run, params, e.kernel.normalise,
               {o: {t: interval(cell) for t, cell in row.items()} for o, row in cells.items()},
               printable(str(e.folder)))
        for run in records
        for e in run.evaluations
        if e.weights == weights and e.kernel
        for params, cells in e.kernel.params.items()
    ]  # fmt: skip
    for run in records if not found else ():
        dcr = config_of(run, "method") == "dcr"
        if weights == "base":  # the first reading of whichever stage started from the base model
            tracked = _tracked(weights, run, "contrastive", 0)
            found += tracked or ([] if dcr else _tracked(weights, run, "sft", 0))
        elif dcr:
            tracked = _tracked(weights, run, "sft", 0)
            found += tracked or _tracked(weights, run, "contrastive", None)
    distinct = [m for i, m in enumerate(found) if m.identity not in [o.identity for o in found[:i]]]
    if not distinct:
        figure, what, cure = KERNELS[weights]
        raise UserError(f"figure {figure}: no {what} in {folders(records)}; {cure}")
    return distinct


def _tracked(weights: str, run: RunRecord, stage: str, step: int | None) -> list[Matrix]:
    """The matrices that tracking found at a step of a stage; at the last one with None."""
    by_params: dict[str, dict[str, dict[str, Interval]]] = {}
    for (params, observer, trained), curve in tracked_kernels(run, stage).items():
        reading = curve[-1] if step is None else curve[0]
        if step is None or reading.step == step:
            row = by_params.setdefault(params, {}).setdefault(observer, {})
            row[trained] = interval((reading.value, reading.low, reading.high))
    return [
        Matrix(weights, run, params, "", cells, f"{TRACKED} ({stage})")
        for params, cells in by_params.items()
    ]


def _matrices(figure: str, parts: Sequence[list[Matrix]]) -> Drawing:
    matrices = [matrix for part in parts for matrix in part]
    rows = [
        (m.figure, m.weights, config_of(m.run, "model"), printable(str(m.run.folder)), m.params,
         m.normalise, observer, trained, cell.estimate, cell.low, cell.high, m.source)
        for m in matrices
        for observer, row in m.cells.items()
        for trained, cell in row.items()
    ]  # fmt: skip
    when = {"6a": "before stage one (the base model)", "6b": "after stage one"}
    what = when.get(figure, "before (a) and after (b) stage one")
    return Drawing(
        f"figure{figure}",
        f"Figure {figure}: the kernel between kinds of prompts {what}",
        f"Mean normalised ‖K(x′,x)‖ {what}: rows are observers x′, columns trained prompts x; "
        "below each mean its 95% bootstrap interval over prompts where one was kept.",
        MATRIX_HEADER,
        rows,
        lambda: _draw_matrices(parts),
    )


def _draw_matrices(parts: Sequence[list[Matrix]]) -> Figure:
    """A row a choice of parameters; (a) left, (b) right of it."""
    choices = list(dict.fromkeys(m.params for part in parts for m in part))
    by_choice = [[m for part in parts for m in part if m.params == params] for params in choices]
    across = max(len(row) for row in by_choice)
    figure, axes = figures.panels(across * len(choices), 3.0, 2.75, across)
    figure.set_layout_engine("compressed")  # "constrained" cuts labels off beside square panels
    several = any(len({m.run.folder for m in part}) > 1 for part in parts)
    for start, row in zip(range(0, len(axes), across), by_choice, strict=True):
        for place in axes[start + len(row) : start + across]:
            place.set_visible(False)
        cells = [
            cell for m in row for by_trained in m.cells.values() for cell in by_trained.values()
        ]
        values = [cell.estimate for cell in cells if not math.isnan(cell.estimate)]
        top = max(values, default=1.0) or 1.0  # other parameters have other magnitudes
        drawn = axes[start : start + len(row)]
        for place, matrix in zip(drawn, row, strict=True):
            _draw_matrix(place, matrix, top, several)
        scale = ScalarMappable(Normalize(0, top), SHADES)
        figure.colorbar(scale, ax=drawn, shrink=0.75, pad=0.02, aspect=18, label=NORM)
    return figure


def _draw_matrix(axes: Axes, matrix: Matrix, top: float, several: bool) -> None:
    kinds = figures.ordered(
        [*matrix.cells, *(kind for row in matrix.cells.values() for kind in row)]
    )
    nothing = Interval(math.nan, math.nan, math.nan)
    cells = [[matrix.cells.get(o, {}).get(t, nothing) for t in kinds] for o in kinds]
    means = [[cell.estimate for cell in row] for row in cells]
    axes.imshow(means, cmap=SHADES, vmin=0, vmax=top)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if not math.isnan(cell.estimate):
                colour = "white" if cell.estimate > 0.6 * top else figures.INK
                ends = "" if math.isnan(cell.low) else f"\n[{cell.low:.2f}–{cell.high:.2f}]"
                axes.text(j, i - (0.1 if ends else 0), f"{cell.estimate:.2f}", color=colour,
                          ha="center", va="center", fontsize=8.5)  # fmt: skip
                axes.text(j, i + 0.12, ends, color=colour, ha="center", va="center", fontsize=5.5)
    labels = [kind_name(kind).replace(" ", "\n") for kind in kinds]
    axes.set_xticks(range(len(kinds)), labels)
    axes.set_yticks(range(len(kinds)), labels)
    axes.grid(False)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("trained x")
    axes.set_ylabel("observer x′")
    which = "(a) base model" if matrix.weights == "base" else "(b) after stage one"
    run = printable(matrix.run.folder.name) if several else ""
    figures.heading(axes, ", ".join(filter(None, (which, matrix.params, run))))


ACROSS = 6  # panels of Figure 8 side by side
DRAWN_AS_VECTORS = 4000  # points; more are one picture inside the SVG, its text still text
LAYER_SCORES = ("kmeans", "probe", "probe_low", "probe_high", "silhouette", "fisher")
CLASSES = ("seemingly_toxic", "toxic")  # by label
CURE = (
    "run python eval.py run=<run> tasks=[separability] (stage=contrastive for those between "
    "the stages), or model=<name> for the base model"
)


@dataclass(frozen=True)
class LayerScores:
    """The separability of one run's weights, by name."""

    name: str
    run: RunRecord
    evaluation: Evaluation
    found: Separability

    @property
    def points(self) -> dict[int, list[tuple[float, float]]]:
        """Plane coordinates by layer, where there are any."""
        return {int(layer): points for layer, points in self.found.mds.items() if points}


def _layer_scores(figure: str, records: Sequence[RunRecord]) -> list[LayerScores]:
    called = names(records)
    found = [
        LayerScores(
            name_of_weights(name, run, evaluation), run, evaluation, evaluation.separability
        )
        for stage in STAGES
        for name, run in zip(called, records, strict=True)
        for evaluation in run.evaluations
        if evaluation.weights == stage and evaluation.separability
    ]
    distinct = {(m.name, repr(m.found)): m for m in found}  # one base model in several folders
    if not distinct:
        raise UserError(f"figure {figure}: no separability in {folders(records)}; {CURE}")
    return list(distinct.values())


def figure7(records: Sequence[RunRecord]) -> Drawing:
    """k-means accuracy over layers, with the majority class."""
    found = _layer_scores("7", records)
    rows = [
        (m.name, m.evaluation.weights, config_of(m.run, "model"), scores.layer,
         *(getattr(scores, key) for key in LAYER_SCORES), m.found.majority)
        for m in found
        for scores in m.found.layers
    ]  # fmt: skip
    return Drawing(
        "figure7",
        "Figure 7: k-means accuracy per layer",
        "Accuracy of k-means with two clusters, matched to seemingly toxic and toxic prompts, on "
        "the features after each block; dotted: the share of the larger class, which takes no "
        "features. The CSV adds the linear probe's cross-validated AUROC, silhouette and Fisher "
        "ratio: prompts that k-means mixes up may still be linearly separable.",
        ("run", "weights", "model", "layer", *LAYER_SCORES, "majority"),
        rows,
        lambda: _draw_accuracies(found),
    )


def _draw_accuracies(found: Sequence[LayerScores]) -> Figure:
    figure, (axes,) = figures.panels(1, 4.4, 2.9)
    handles = []
    for place, measured in enumerate(found):
        colour, marker = line_style(place)
        style: dict[str, Any] = {
            "color": colour,
            "marker": marker,
            "linestyle": ("-", "--", "-.")[place % 3],
        }
        points = [
            (scores.layer, scores.kmeans)
            for scores in measured.found.layers
            if scores.kmeans is not None
        ]
        axes.plot([layer for layer, _ in points], [value for _, value in points], **style)
        handles.append(handle(measured.name, **style))
    majorities = dict.fromkeys(m.found.majority for m in found if m.found.majority is not None)
    for majority in majorities:
        axes.axhline(majority, color=INK, linestyle=":", linewidth=1)
    if majorities:
        handles.append(handle("majority class", color=INK, linestyle=":", linewidth=1))
    figures.step_axis(axes, "layer ℓ")
    axes.set_ylim(0.48, 1.01)
    axes.set_ylabel("k-means accuracy")
    figures.key(figure, handles, columns=2)
    return figure


def figure8(records: Sequence[RunRecord]) -> Drawing:
    """Classical MDS of the features, a panel a layer."""
    found = [m for m in _layer_scores("8", records) if m.points]
    if not found:
        raise UserError(f"figure 8: no MDS coordinates in {folders(records)}; {CURE}")
    rows = [
        (m.name, m.evaluation.weights, config_of(m.run, "model"), layer, identity,
         CLASSES[label], x, y)
        for m in found
        for layer, points in m.points.items()
        for identity, label, (x, y) in zip(
            m.found.ids or range(len(points)), m.found.labels, points, strict=True
        )
    ]  # fmt: skip
    return Drawing(
        "figure8",
        "Figure 8: classical MDS of the features",
        "Classical (Torgerson) multidimensional scaling of seemingly toxic and toxic prompts after "
        "each block, one panel a layer. Axes are turned and scaled freely in every panel.",
        ("run", "weights", "model", "layer", "id", "kind", "x", "y"),
        rows,
        lambda: _draw_panels(found),
    )


def _draw_panels(found: Sequence[LayerScores]) -> Figure:
    down = [math.ceil(len(m.points) / ACROSS) for m in found]
    figure = Figure(figsize=(6.9, 0.4 + sum(1.17 * rows + 0.3 for rows in down)),
                    layout="constrained")  # fmt: skip
    parts = figure.subfigures(len(found), 1, squeeze=False, height_ratios=[r + 0.25 for r in down])
    points = sum(len(drawn) for m in found for drawn in m.points.values())
    for part, measured, rows in zip(parts.ravel(), found, down, strict=True):
        part.suptitle(measured.name, x=0.01, ha="left", fontsize=8.5)
        axes = part.subplots(rows, ACROSS, squeeze=False).ravel()
        for spare in axes[len(measured.points) :]:
            spare.set_visible(False)
        for place, layer in zip(axes, sorted(measured.points), strict=False):
            _draw_points(place, measured, layer, points > DRAWN_AS_VECTORS)
    styles = [(kind, *figures.kind_style(kind)[:2]) for kind in CLASSES]
    figures.key(figure, [
        handle(kind_name(kind), color=colour, marker=marker, linestyle="")
        for kind, colour, marker in styles
    ])  # fmt: skip
    return figure


def _draw_points(axes: Axes, measured: LayerScores, layer: int, as_picture: bool) -> None:
    for label, kind in enumerate(CLASSES):
        own = [
            p
            for p, of in zip(measured.points[layer], measured.found.labels, strict=True)
            if of == label
        ]
        colour, marker, _ = figures.kind_style(kind)
        axes.plot([x for x, _ in own], [y for _, y in own], marker, color=colour, markersize=1.8,
                  markeredgewidth=0, alpha=0.7, rasterized=as_picture)  # fmt: skip
    axes.set_title(f"layer {layer}", fontsize=7.5, loc="left", pad=2)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.08)
    for spine in axes.spines.values():
        spine.set(visible=True, color="#b5b5b5", linewidth=0.5)


ANALYSES = {"6": figure6, "6a": figure6a, "6b": figure6b, "7": figure7, "8": figure8}
