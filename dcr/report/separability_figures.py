"""Figures 7 and 8: how well seemingly toxic and toxic prompts come apart, layer by layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from dcr.config import UserError
from dcr.report import printed
from dcr.report.figures import INK, MARKERS, PALETTE
from dcr.report.measurements import LAYER_SCORES, Separability
from dcr.report.printed import Printed
from dcr.report.records import Evaluation, RunRecord
from dcr.report.trajectories import STAGES, config_of, folders, name_of_weights, names

ACROSS = 6  # panels of Figure 8 side by side
DRAWN_AS_VECTORS = 4000  # points; more are one picture inside the SVG, its text still text
CLASSES = ("seemingly_toxic", "toxic")  # by label
CURE = (
    "run python eval.py run=<run> tasks=[separability] (stage=contrastive for those between "
    "the stages), or model=<name> for the base model"
)


@dataclass(frozen=True)
class Measured:
    """The separability of one run's weights, by name."""

    name: str
    run: RunRecord
    evaluation: Evaluation
    found: Separability


def _measured(figure: str, records: Sequence[RunRecord]) -> list[Measured]:
    called = names(records)
    found = [
        Measured(name_of_weights(name, run, evaluation), run, evaluation, evaluation.separability)
        for stage in STAGES
        for name, run in zip(called, records, strict=True)
        for evaluation in run.evaluations
        if evaluation.weights == stage and evaluation.separability
    ]
    distinct = {(m.name, repr(m.found)): m for m in found}  # one base model in several folders
    if not distinct:
        raise UserError(f"figure {figure}: no separability in {folders(records)}; {CURE}")
    return list(distinct.values())


def figure7(records: Sequence[RunRecord]) -> Printed:
    """k-means accuracy over layers, with the majority class."""
    found = _measured("7", records)
    rows = [
        (m.name, m.evaluation.weights, config_of(m.run, "model"), layer,
         *(scores[key] for key in LAYER_SCORES), m.found.majority)
        for m in found
        for layer, scores in m.found.layers.items()
    ]  # fmt: skip
    return Printed(
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


def _draw_accuracies(found: Sequence[Measured]) -> Figure:
    figure, (axes,) = printed.panels(1, 4.4, 2.9)
    handles = []
    for place, measured in enumerate(found):
        style: dict[str, Any] = {
            "color": PALETTE[1 + place % (len(PALETTE) - 1)],
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": ("-", "--", "-.")[place % 3],
        }
        points = [
            (layer, scores["kmeans"])
            for layer, scores in measured.found.layers.items()
            if scores["kmeans"] is not None
        ]
        axes.plot([layer for layer, _ in points], [value for _, value in points], **style)
        handles.append(Line2D([], [], label=measured.name, **style))
    majorities = dict.fromkeys(m.found.majority for m in found if m.found.majority is not None)
    for majority in majorities:
        axes.axhline(majority, color=INK, linestyle=":", linewidth=1)
    if majorities:
        handles.append(
            Line2D([], [], color=INK, linestyle=":", linewidth=1, label="majority class")
        )
    printed.step_axis(axes, "layer ℓ")
    axes.set_ylim(0.48, 1.01)
    axes.set_ylabel("k-means accuracy")
    printed.key(figure, handles, columns=2)
    return figure


def figure8(records: Sequence[RunRecord]) -> Printed:
    """Classical MDS of the features, a panel a layer."""
    found = [m for m in _measured("8", records) if m.found.mds]
    if not found:
        raise UserError(f"figure 8: no MDS coordinates in {folders(records)}; {CURE}")
    rows = [
        (m.name, m.evaluation.weights, config_of(m.run, "model"), layer, identity,
         CLASSES[label], x, y)
        for m in found
        for layer, points in m.found.mds.items()
        for identity, label, (x, y) in zip(m.found.ids, m.found.labels, points, strict=True)
    ]  # fmt: skip
    return Printed(
        "figure8",
        "Figure 8: classical MDS of the features",
        "Classical (Torgerson) multidimensional scaling of seemingly toxic and toxic prompts after "
        "each block, one panel a layer. Axes are turned and scaled freely in every panel.",
        ("run", "weights", "model", "layer", "id", "kind", "x", "y"),
        rows,
        lambda: _draw_panels(found),
    )


def _draw_panels(found: Sequence[Measured]) -> Figure:
    down = [math.ceil(len(m.found.mds) / ACROSS) for m in found]
    figure = Figure(figsize=(6.9, 0.4 + sum(1.17 * rows + 0.3 for rows in down)),
                    layout="constrained")  # fmt: skip
    parts = figure.subfigures(len(found), 1, squeeze=False, height_ratios=[r + 0.25 for r in down])
    points = sum(len(drawn) for m in found for drawn in m.found.mds.values())
    for part, measured, rows in zip(parts.ravel(), found, down, strict=True):
        part.suptitle(measured.name, x=0.01, ha="left", fontsize=8.5)
        axes = part.subplots(rows, ACROSS, squeeze=False).ravel()
        for spare in axes[len(measured.found.mds) :]:
            spare.set_visible(False)
        for place, layer in zip(axes, sorted(measured.found.mds), strict=False):
            _draw_points(place, measured.found, layer, points > DRAWN_AS_VECTORS)
    printed.key(figure, [
        Line2D([], [], color=printed.kind_style(kind)[0], marker=printed.kind_style(kind)[1],
               linestyle="", label=printed.kind_name(kind))
        for kind in CLASSES
    ])  # fmt: skip
    return figure


def _draw_points(axes: Axes, found: Separability, layer: int, as_picture: bool) -> None:
    for label, kind in enumerate(CLASSES):
        own = [p for p, of in zip(found.mds[layer], found.labels, strict=True) if of == label]
        colour, marker, _ = printed.kind_style(kind)
        axes.plot([x for x, _ in own], [y for _, y in own], marker, color=colour, markersize=1.8,
                  markeredgewidth=0, alpha=0.7, rasterized=as_picture)  # fmt: skip
    axes.set_title(f"layer {layer}", fontsize=7.5, loc="left", pad=2)
    axes.set(xticks=[], yticks=[])
    axes.margins(0.08)
    for spine in axes.spines.values():
        spine.set(visible=True, color="#b5b5b5", linewidth=0.5)


LAYERS = {"7": figure7, "8": figure8}
