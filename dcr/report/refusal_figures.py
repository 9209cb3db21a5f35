"""Figures 1, 5 and 9: refusals and their probability over the steps of SFT."""

import math
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dcr.config import Kind, UserError
from dcr.report import printed
from dcr.report.printed import Printed
from dcr.report.records import Evaluation, RunRecord
from dcr.report.tables import keyword, pooled, together
from dcr.report.trajectories import (
    Reading,
    Trajectory,
    config_of,
    folders,
    followed_probabilities,
    found_in,
    kind_probabilities,
    names,
    of_method,
    shared_sets,
    snapshots,
)
from dcr.statistics import Interval

TRACK = "train with tracking.quantities=[refusal_probability]"
CURVE_HEADER = ("run", "method", "model", "quantity", "kind", "step", "value", "low", "high",
                "source")  # fmt: skip
BOTH = (Kind.seemingly_toxic, Kind.toxic)


def figure1a(records: Sequence[RunRecord]) -> Printed:
    """STL: rejection rates of toxic and seemingly toxic prompts, one panel a run."""
    stl = _stl("1a", records, "tracking.snapshots=20")
    found, notes = found_in("1a", stl, _rejections, "scored snapshots", scoring_command(stl))
    return _curves(
        "1a",
        "Rejection rates while STL trains",
        "Keyword rejection rate of toxic and of seemingly toxic prompts, sets pooled, against the "
        "step of SFT, with 95% Wilson intervals. Of several evaluation settings of its snapshots, "
        "that of the most.",
        found,
        notes,
        "rejection rate",
    )


def scoring_command(records: Sequence[RunRecord]) -> str:
    """How snapshots come to be scored, for the first of these runs."""
    return (
        f"train with tracking.snapshots=20, then run python eval.py run={folders(records[:1])} "
        "snapshots=true tasks=[over_refusal,safety]"
    )


def _rejections(run: RunRecord) -> Trajectory | None:
    scored = snapshots(run, lambda e: e.sets)
    shared = shared_sets(scored)
    curves = {}
    for kind in BOTH:
        chosen = together([name for name, score in shared.items() if score.kind is kind])
        if chosen:
            curves["rejection_rate", kind.value] = [
                Reading(evaluation.step or 0, rate.estimate, rate.low, rate.high)
                for evaluation in scored
                if (rate := rate_of(evaluation, kind, chosen, wanted=False))
            ]
    return Trajectory(run, curves, "snapshots") if curves else None


def rate_of(e: Evaluation, kind: Kind, chosen: Sequence[str], wanted: bool) -> Interval | None:
    """Keyword refusals of a kind's sets, or with `wanted` what is wanted: answers of the safe."""
    rate = pooled([e.sets[name] for name in chosen if name in e.sets], keyword("paper"))
    if rate is None or wanted or kind is Kind.toxic:
        return rate
    return Interval(1 - rate.estimate, 1 - rate.high, 1 - rate.low)


def figure1b(records: Sequence[RunRecord]) -> Printed:
    """The followed prompts' refusal probability: runs of the first folder's model."""
    first = config_of(records[0], "model")
    return _followed("1b", [run for run in records if config_of(run, "model") == first])


def figure9(records: Sequence[RunRecord]) -> Printed:
    """As Figure 1(b), for the models that it leaves out; the only one where there is one alone."""
    first = config_of(records[0], "model")
    others = [run for run in records if config_of(run, "model") != first]
    return _followed("9", others or records)


def _followed(figure: str, records: Sequence[RunRecord]) -> Printed:
    chosen = of_method(records, "stl") or records
    what = "refusal probabilities of followed prompts over SFT steps"
    found, notes = found_in(figure, chosen, followed_probabilities, what, TRACK)
    return _curves(
        figure,
        "Refusal probability of three prompts during SFT",
        "Refusal probability (plain sum over the refusal phrases) of one seemingly toxic, one "
        "toxic and one normal prompt against the step of SFT. STL where it was given, else every "
        "run.",
        found,
        notes,
        "refusal probability",
    )


def figure5a(records: Sequence[RunRecord]) -> Printed:
    """Mean refusal probability by kind while STL trains."""
    stl = _stl("5a", records, "tracking.quantities=[refusal_probability]")
    return _mean_probability("5a", stl, "SFT without stage one")


def figure5b(records: Sequence[RunRecord]) -> Printed:
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


def _mean_probability(figure: str, chosen: Sequence[RunRecord], title: str) -> Printed:
    what = "refusal probabilities over SFT steps"
    found, notes = found_in(figure, chosen, kind_probabilities, what, TRACK)
    return _curves(
        figure,
        f"Mean refusal probability by kind: {title}",
        "Mean refusal probability (plain sum over the refusal phrases) of seemingly toxic, toxic "
        "and normal prompts against the step of SFT; bands are 95% bootstrap intervals over "
        "prompts where they were kept. The prefix-free probability is in the CSV.",
        found,
        notes,
        "mean refusal probability",
    )


def _curves(
    figure: str,
    title: str,
    caption: str,
    found: Sequence[Trajectory],
    notes: tuple[str, ...],
    axis: str,
) -> Printed:
    called = names([trajectory.run for trajectory in found])
    rows = [
        (name, config_of(t.run, "method"), config_of(t.run, "model"), *key, r.step, r.value,
         r.low, r.high, t.source)
        for name, t in zip(called, found, strict=True)
        for key, curve in t.curves.items()
        for r in curve
    ]  # fmt: skip

    def draw() -> Figure:
        drawn, axes = printed.panels(len(found))
        for place, name, trajectory in zip(axes, called, found, strict=True):
            for (quantity, kind), curve in trajectory.curves.items():
                if quantity != "prefix_free":
                    draw_curve(place, kind, curve)
            printed.heading(place, name)
            printed.step_axis(place)
            printed.share_axis(place)
            place.set_ylabel(axis)
        present = {kind for t in found for _, kind in t.curves}
        printed.key(drawn, printed.kind_handles([k for k in printed.KINDS if k in present]))
        return drawn

    return Printed(
        f"figure{figure}", f"Figure {figure}: {title}", caption, CURVE_HEADER, rows, draw,
        notes=notes,
    )  # fmt: skip


def draw_curve(axes: Axes, kind: str, curve: Sequence[Reading]) -> None:
    """A kind's line with markers, and a band between readings that have an interval."""
    colour, marker, dashes = printed.kind_style(kind)
    steps = [reading.step for reading in curve]
    axes.plot(steps, [r.value for r in curve], color=colour, marker=marker, linestyle=dashes)
    lows, highs = (
        [math.nan if end is None else end for end in ends]
        for ends in ([r.low for r in curve], [r.high for r in curve])
    )
    if not all(map(math.isnan, lows)):
        axes.fill_between(steps, lows, highs, color=colour, alpha=0.15, linewidth=0)


CURVES: dict[str, Callable[[Sequence[RunRecord]], Printed]] = {
    "1a": figure1a,
    "1b": figure1b,
    "5a": figure5a,
    "5b": figure5b,
    "9": figure9,
}
