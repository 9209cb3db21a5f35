"""Figures 6, 7 and 8: the kernel between kinds of prompts, and their separability by layer."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd

from dcr.core.config import UserError
from dcr.ending import printable
from dcr.report import figures
from dcr.report.columns import WEIGHTS, evaluated, name_of_weights, named
from dcr.report.curves import KERNELS, NORM, SCORED, TRACKED, curves
from dcr.report.figures import INK, Curve, Drawing, Look, Panel, kind_look, look_of
from dcr.report.records import RunRecord, folders
from dcr.report.sections import Selection
from dcr.results.schema import Separability, interval

MATRIX = ("figure", "weights", "model", "run", "params", "normalise", "observer", "trained",
          "estimate", "low", "high", "source")  # fmt: skip
# By weights: the figure, and the message that tells what measures it.
LACKING = {
    "base": (
        "6a",
        "no kernel of the base model in {}; run python eval.py model=<name> tasks=[kernel]",
    ),
    "contrastive": (
        "6b",
        "no kernel after stage one in {}; run python eval.py run=<dcr run> stage=contrastive "
        "tasks=[kernel], or train method=dcr with tracking.quantities=[kernel]",
    ),
}
KERNEL_FIGURES = {  # by figure: its parts, and when they were measured
    "6": (("base", "contrastive"), "before (a) and after (b) stage one"),
    "6a": (("base",), "before stage one (the base model)"),
    "6b": (("contrastive",), "after stage one"),
}


def kernel(chosen: Selection, figure: str) -> Drawing:
    """Draws the 3×3 matrices before or after stage one, or both, a row a choice of parameters."""
    records, (parts, when) = chosen.records, KERNEL_FIGURES[figure]
    values = pd.concat([_matrices(weights, chosen) for weights in parts], ignore_index=True)
    runs = [set(own["run"]) for _, own in figures.parts(values, "weights")]
    several_runs, several_models = max(map(len, runs)) > 1, len(set(values["model"])) > 1
    by_params = figures.parts(values, "params")
    every = [column.evaluation for column in evaluated(records)]
    edits = {printable(str(e.folder)): e.steering_in_words for e in every}
    rows = [figures.parts(own, "weights", "run", "source") for _, own in by_params]
    across = max(map(len, rows))
    panels: list[Panel | None] = []
    for row in rows:
        means = [mean for _, cells in row for mean in cells["estimate"] if not math.isnan(mean)]
        top = max(means, default=1.0) or 1.0  # other parameters have other magnitudes
        measured = Counter((weights, *cells["model"].head(1)) for (weights, *_), cells in row)
        for (weights, run, source), cells in row:
            which = "(a) base model" if weights == "base" else "(b) after stage one"
            params, model = cells["params"].iloc[0], cells["model"].iloc[0]
            # a base model is that of its own name, whatever run's folder it was measured in
            by_folder = measured[weights, model] > 1 or (weights != "base" and several_runs)
            title = (
                *(which, params, model if several_models else ""),
                *(Path(run).name if by_folder else "", edits.get(source, "")),
            )
            named = {"observer": "y", "trained": "x", "estimate": "value"}
            cells = cells.rename(columns=named).filter(["y", "x", "value", "low", "high"])
            panels.append(
                Panel(
                    title=figures.folded(", ".join(filter(None, title))),
                    axes={"xlabel": "trained x", "ylabel": "observer x′"},
                    cells=cells.astype(dict.fromkeys(("value", "low", "high"), float)),
                    top=top,
                )
            )
        panels += [None] * (across - len(row))
    return Drawing(
        f"figure{figure}",
        f"Figure {figure}: the kernel between kinds of prompts {when}",
        {"": panels},
        values,
        f"Mean normalised ‖K(x′,x)‖ {when}: rows are observers x′, columns trained prompts x; "
        "below each mean its 95% bootstrap interval over prompts where one was kept.",
        scale=NORM,
        size=(3.4 if len(panels) == 1 else 3.0, 2.75),
        across=across,
    )


def _matrices(weights: str, chosen: Selection) -> pd.DataFrame:
    """The matrices evaluated, or else tracked, at these weights, each once. UserError if none."""
    records = chosen.records
    # run, model, choice of parameters, normalisation, source, and rows of observer, trained, mean
    matrices: list[tuple[RunRecord, str, str, str, str, list[tuple[Any, ...]]]] = []
    for column in evaluated(records):
        e = column.evaluation
        if e.weights != weights or e.kernel is None:
            continue
        for params, by_observer in e.kernel.params.items():
            cells = [
                (observer, trained, *vars(interval(cell)).values())
                for observer, row in by_observer.items()
                for trained, cell in row.items()
            ]
            of = column.about("model"), params, e.kernel.normalise, printable(str(e.folder))
            matrices.append((column.run, *of, cells))
    for run in records if not matrices else ():
        dcr = run.about("method") == "dcr"
        before, after = ["contrastive", *([] if dcr else ["sft"])], ["sft", "contrastive"]
        # the first reading of the stage that started from these weights, or a stage's last
        for stage in before if weights == "base" else after if dcr else ():
            last = weights != "base" and stage == "contrastive"
            read = [row for row in curves(run, KERNELS, stage) if row[-1] != SCORED]
            at = {row[:3]: row for row in read if last or row[3] == 0}
            for params in dict.fromkeys(key[0] for key in at):
                cells = [(*key[1:], *row[4:7]) for key, row in at.items() if key[0] == params]
                model = run.about("model")
                matrices.append((run, model, params, "", f"{TRACKED} ({stage})", cells))
            if at:
                break
    figure, lack = LACKING[weights]
    rows, known = [], []
    for run, model, params, normalise, source, cells in matrices:
        if (identity := (model, params, repr(cells))) not in known:  # one base in several folders
            known.append(identity)
            of = (figure, weights, model, printable(str(run.folder)), params, normalise)
            rows += [(*of, *cell, source) for cell in cells]
    if not rows:
        raise UserError(f"figure {figure}: {lack.format(folders(records))}")
    drawn = {run.folder for run, *_ in matrices}
    # one kernel of the base model serves all runs
    able = [run for run in records if weights != "base" and run.about("method") == "dcr"]
    lacking = [run for run in able if run.folder not in drawn]
    chosen.leave_out(figure, "kernel after stage one", lacking)
    return figures.frame(rows, *MATRIX)


ACROSS = 6  # panels of Figure 8 side by side
DRAWN_AS_VECTORS = 4000  # points; more are one picture inside the SVG, its text still text
LAYER_SCORES = ("kmeans", "probe", "probe_low", "probe_high", "silhouette", "fisher")
CLASSES = ("seemingly_toxic", "toxic")  # by label
CURE = (
    "run python eval.py run=<run> tasks=[separability] (stage=contrastive for those between "
    "the stages), or model=<name> for the base model"
)
About = tuple[str, str, str]  # name, weights, model


def _separability(figure: str, chosen: Selection) -> list[tuple[About, Separability]]:
    """The separability of every run's weights, in the order of the stages; a base model once."""
    every = [
        (name_of_weights(name, column), column, scores)
        for weights in WEIGHTS
        for run, name in named(chosen.records)
        for column in evaluated([run])
        if column.evaluation.weights == weights and (scores := column.evaluation.separability)
    ]
    measured = {column.run.folder for _, column, _ in every}
    lacking = [run for run in chosen.records if run.folder not in measured]
    if not every:
        raise UserError(f"figure {figure}: no separability in {folders(lacking)}; {CURE}")
    chosen.leave_out(figure, "separability", lacking)
    distinct = {(name, repr(scores)): (column, scores) for name, column, scores in every}
    called, found = [name for name, _ in distinct], []
    for (name, _), (column, scores) in distinct.items():
        e = column.evaluation
        told = f"{name} ({e.folder.name})" if called.count(name) > 1 else name
        found.append(((told, e.weights, column.about("model")), scores))
    return found


def accuracies(chosen: Selection) -> Drawing:
    """Figure 7: k-means accuracy over layers, with the majority class."""
    by_weights = _separability("7", chosen)
    values = figures.frame(
        [
            (
                *of_weights,
                scores.layer,
                *(getattr(scores, key) for key in LAYER_SCORES),
                of.majority,
            )
            for of_weights, of in by_weights
            for scores in of.layers
        ],
        *("run", "weights", "model", "layer", *LAYER_SCORES, "majority"),
    )
    drawn, legend = [], []
    for place, ((name, *_), of) in enumerate(by_weights):
        look: Look = look_of(place) | {"linestyle": ("-", "--", "-.")[place % 3]}
        points = [(s.layer, s.kmeans) for s in of.layers if s.kmeans is not None]
        drawn.append(Curve(pd.DataFrame(points, columns=["x", "y"]), look))
        legend.append((name, look))
    dotted: Look = {"color": INK, "linestyle": ":", "linewidth": 1}
    majorities = dict.fromkeys(of.majority for _, of in by_weights if of.majority is not None)
    legend += [("majority class", dotted)] if majorities else []
    axes = {"xlabel": "layer ℓ", "ylabel": "k-means accuracy", "ylim": (0.48, 1.01)}
    levels = [(majority, dotted) for majority in majorities]
    return Drawing(
        "figure7",
        "Figure 7: k-means accuracy per layer",
        {"": [Panel(drawn, axes=axes, steps=5, levels=levels)]},
        values,
        "Accuracy of k-means with two clusters, matched to seemingly toxic and toxic prompts, on "
        "the features after each block; dotted: the share of the larger class. The CSV adds a "
        "linear probe's cross-validated AUROC, silhouette and Fisher ratio.",
        legend,
        legend_columns=2,
        size=(4.4, 2.9),
    )


def scaling(chosen: Selection) -> Drawing:
    """Figure 8: classical MDS of the features, a panel a layer."""
    values = figures.frame(
        [
            (*of_weights, int(layer), identity, CLASSES[label], x, y)
            for of_weights, of in _separability("8", chosen)
            for layer, points in of.mds.items()
            if points
            for identity, label, (x, y) in zip(
                of.ids or range(len(points)), of.labels, points, strict=True
            )
        ],
        *("run", "weights", "model", "layer", "id", "kind", "x", "y"),
    )
    if values.empty:
        raise UserError(f"figure 8: no MDS coordinates in {folders(chosen.records)}; {CURE}")
    dots = {"linestyle": "", "markersize": 1.8, "markeredgewidth": 0, "alpha": 0.7,
            "rasterized": len(values) > DRAWN_AS_VECTORS}  # fmt: skip
    bare = {"xticks": [], "yticks": [], "xmargin": 0.08, "ymargin": 0.08}
    blocks = {
        name: [
            Panel(
                [
                    Curve(points.filter(["x", "y"]), {**kind_look(kind), **dots})
                    for kind, points in figures.parts(own, "kind")
                ],
                f"layer {layer}",
                bare,
                boxed=True,
            )
            for layer, own in sorted(figures.parts(of_run, "layer"), key=lambda part: part[0])
        ]
        for name, of_run in figures.parts(values, "run")
    }
    return Drawing(
        "figure8",
        "Figure 8: classical MDS of the features",
        blocks,
        values,
        "Classical (Torgerson) multidimensional scaling of seemingly toxic and toxic prompts after "
        "each block, one panel a layer. Axes are turned and scaled freely in every panel.",
        [(label, {**look, "linestyle": ""}) for label, look in figures.kind_legend(CLASSES)],
        size=(6.5 / ACROSS, 1.17),
        across=ACROSS,
    )
