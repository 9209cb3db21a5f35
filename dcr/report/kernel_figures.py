"""Figures 3 and 6: normalised kernels between kinds of prompts, over SFT and around stage one."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from dcr.config import UserError
from dcr.report import printed
from dcr.report.printed import Printed, kind_name
from dcr.report.printing import printable
from dcr.report.records import RunRecord
from dcr.report.refusal_figures import draw_curve
from dcr.report.trajectories import (
    TRACKED,
    Key,
    Reading,
    config_of,
    folders,
    found_in,
    kernels,
    names,
    of_method,
    tracked_kernels,
)
from dcr.statistics import Interval

NORM = "mean normalised ‖K‖"
SHADES = colormaps["Blues"]
MATRIX_HEADER = ("figure", "weights", "model", "run", "params", "normalise", "observer", "trained",
                 "mean", "low", "high", "source")  # fmt: skip
BEFORE, AFTER = "6a", "6b"
CURES = {
    BEFORE: "run python eval.py model=<name> tasks=[kernel]",
    AFTER: "run python eval.py run=<dcr run> stage=contrastive tasks=[kernel], or train "
    "method=dcr with tracking.quantities=[kernel]",
}
WHAT = {BEFORE: "kernel of the base model", AFTER: "kernel after stage one"}


@dataclass(frozen=True)
class Matrix:
    """One 3×3 matrix, `[observer][trained]`, of certain weights and parameters."""

    figure: str
    weights: str
    run: RunRecord
    params: str
    normalise: str
    cells: Mapping[str, Mapping[str, Interval]]
    source: str

    @property
    def model(self) -> str:
        return config_of(self.run, "model")


def figure3(records: Sequence[RunRecord]) -> Printed:
    """All nine pairs of kinds over SFT: a row of panels a run and choice of parameters."""
    chosen = of_method(records, "stl") or records
    found, notes = found_in(
        "3", chosen, kernels, "kernels over SFT steps", "train with tracking.quantities=[kernel]"
    )
    called = names([trajectory.run for trajectory in found])
    rows = [
        (name, config_of(t.run, "method"), config_of(t.run, "model"), *key, r.step, r.value,
         r.low, r.high, t.source)
        for name, t in zip(called, found, strict=True)
        for key, curve in t.curves.items()
        for r in curve
    ]  # fmt: skip
    blocks = [
        (f"{name}, {params}" if len(found) > 1 or len(_choices(t.curves)) > 1 else params,
         {key[1:]: curve for key, curve in t.curves.items() if key[0] == params})
        for name, t in zip(called, found, strict=True)
        for params in _choices(t.curves)
    ]  # fmt: skip
    return Printed(
        "figure3",
        "Figure 3: the kernel between kinds of prompts during SFT",
        "Mean normalised ‖K(x′,x)‖ for all nine pairs of kinds against the step of SFT: a panel "
        "for each kind of observer x′, a line for each kind of trained prompt x, a row for each "
        "choice of parameters. STL where it was given, else every run.",
        ("run", "method", "model", "params", "observer", "trained", "step", "value", "low", "high",
         "source"),
        rows,
        lambda: _draw_curves(blocks),
        notes=notes,
    )  # fmt: skip


def _choices(curves: Mapping[Key, object]) -> list[str]:
    return list(dict.fromkeys(key[0] for key in curves))


def ordered(kinds: Sequence[str]) -> list[str]:
    """In the paper's order, others after."""
    known = [kind for kind in printed.KINDS if kind in kinds]
    return known + [kind for kind in dict.fromkeys(kinds) if kind not in known]


def _draw_curves(blocks: Sequence[tuple[str, Mapping[Key, Sequence[Reading]]]]) -> Figure:
    kinds = ordered([kind for _, curves in blocks for key in curves for kind in key])
    figure, axes = printed.panels(len(kinds) * len(blocks), columns=len(kinds))
    for place, ((name, curves), observer) in zip(
        axes, ((block, kind) for block in blocks for kind in kinds), strict=True
    ):
        for trained in kinds:
            if curve := curves.get((observer, trained)):
                draw_curve(place, trained, curve)
        first = observer == kinds[0]
        place.set_title(
            f"{name}\nx′: {kind_name(observer)}" if first else f"\nx′: {kind_name(observer)}"
        )
        printed.step_axis(place)
        place.set_ylabel(NORM if first else "")
    for start in range(0, len(axes), len(kinds)):  # a row shares its scale
        row = axes[start : start + len(kinds)]
        top = 1.05 * max(reading for place in row for reading in _drawn_values(place))
        for place in row:
            place.set_ylim(0, top)
    printed.key(figure, printed.kind_handles(kinds), title="trained on x")
    return figure


def _drawn_values(axes: Axes) -> list[float]:
    return [float(value) for line in axes.lines for value in np.asarray(line.get_ydata())] or [1.0]


def figure6a(records: Sequence[RunRecord]) -> Printed:
    """The 3×3 matrix of the base model."""
    return _matrices("6a", [_before(records)])


def figure6b(records: Sequence[RunRecord]) -> Printed:
    """The 3×3 matrix after stage one."""
    return _matrices("6b", [_after(records)])


def figure6(records: Sequence[RunRecord]) -> Printed:
    """Both on one scale."""
    return _matrices("6", [_before(records), _after(records)])


def _before(records: Sequence[RunRecord]) -> list[Matrix]:
    found = _evaluated(BEFORE, records, "base")
    if not found:  # the first reading of whichever stage started from the base model
        for run in records:
            tracked = _tracked(BEFORE, "base", run, "contrastive", 0)
            if not tracked and config_of(run, "method") != "dcr":
                tracked = _tracked(BEFORE, "base", run, "sft", 0)
            found += tracked
    return _distinct(BEFORE, found, records)


def _after(records: Sequence[RunRecord]) -> list[Matrix]:
    found = _evaluated(AFTER, records, "contrastive")
    if not found:
        for run in of_method(records, "dcr"):
            found += _tracked(AFTER, "contrastive", run, "sft", 0) or _tracked(
                AFTER, "contrastive", run, "contrastive", None
            )
    return _distinct(AFTER, found, records)


def _evaluated(figure: str, records: Sequence[RunRecord], weights: str) -> list[Matrix]:
    return [
        Matrix(figure, weights, run, params, found.kernel.normalise, cells,
               printable(str(found.folder)))
        for run in records
        for found in run.evaluations
        if found.weights == weights and found.kernel
        for params, cells in found.kernel.params.items()
    ]  # fmt: skip


def _tracked(
    figure: str, weights: str, run: RunRecord, stage: str, step: int | None
) -> list[Matrix]:
    """The matrices that tracking found at a step of a stage; at the last one with None."""
    by_params: dict[str, dict[str, dict[str, Interval]]] = {}
    for (params, observer, trained), curve in tracked_kernels(run, stage).items():
        reading = curve[-1] if step is None else curve[0]
        if step is None or reading.step == step:
            row = by_params.setdefault(params, {}).setdefault(observer, {})
            ends = (math.nan if end is None else end for end in (reading.low, reading.high))
            row[trained] = Interval(reading.value, *ends)
    return [
        Matrix(figure, weights, run, params, "", cells, f"{TRACKED} ({stage})")
        for params, cells in by_params.items()
    ]


def _distinct(figure: str, found: list[Matrix], records: Sequence[RunRecord]) -> list[Matrix]:
    """Each matrix once, however many folders hold the same base model; UserError if none."""
    kept: list[Matrix] = []
    for matrix in found:
        if not any(
            (matrix.model, matrix.params, matrix.cells) == (m.model, m.params, m.cells)
            for m in kept
        ):
            kept.append(matrix)
    if not kept:
        raise UserError(
            f"figure {figure}: no {WHAT[figure]} in {folders(records)}; {CURES[figure]}"
        )
    return kept


def _matrices(figure: str, parts: Sequence[list[Matrix]]) -> Printed:
    matrices = [matrix for part in parts for matrix in part]
    rows = [
        (m.figure, m.weights, m.model, printable(str(m.run.folder)), m.params, m.normalise,
         observer, trained, cell.estimate, cell.low, cell.high, m.source)
        for m in matrices
        for observer, row in m.cells.items()
        for trained, cell in row.items()
    ]  # fmt: skip
    told = {"6a": "before stage one (the base model)", "6b": "after stage one"}
    what = told.get(figure, "before (a) and after (b) stage one")
    return Printed(
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
    figure, axes = printed.panels(across * len(choices), 3.0, 2.75, across)
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
    kinds = ordered([*matrix.cells, *(kind for row in matrix.cells.values() for kind in row)])
    nothing = Interval(math.nan, math.nan, math.nan)
    cells = [[matrix.cells.get(o, {}).get(t, nothing) for t in kinds] for o in kinds]
    means = [[cell.estimate for cell in row] for row in cells]
    axes.imshow(means, cmap=SHADES, vmin=0, vmax=top)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            if not math.isnan(cell.estimate):
                colour = "white" if cell.estimate > 0.6 * top else printed.INK
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
    which = "(a) base model" if matrix.figure == BEFORE else "(b) after stage one"
    run = printable(matrix.run.folder.name) if several else ""
    printed.heading(axes, ", ".join(filter(None, (which, matrix.params, run))))


KERNELS = {"3": figure3, "6": figure6, "6a": figure6a, "6b": figure6b}
