"""Quantities over the steps of SFT, from tracking or else from scored snapshots.

Tracking logs means to metrics.csv, and keeps intervals in a folder a step, which older runs lack.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dcr import storage
from dcr.config import UserError
from dcr.report.entries import METHODS, steering
from dcr.report.measurements import QUANTITIES, Kernel, Probability
from dcr.report.printing import printable
from dcr.report.records import Evaluation, RunRecord
from dcr.report.scores import SetScore
from dcr.report.tracked import Tracked
from dcr.statistics import Interval

PREFIXES = {"plain": "refusal_probability", "prefix_free": "refusal_probability_prefix_free"}
TRACKED, KEPT, SCORED = "metrics.csv", "tracking", "snapshots"
STAGES = {"base": "base model", "contrastive": "after stage one", "sft": "after SFT"}
Key = tuple[str, ...]
Block = TypeVar("Block", Probability, Kernel)


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


def config_of(run: RunRecord, key: str) -> str:
    """method, seed, preset_name, or a node's label, from a run's configuration."""
    value = run.config.get(key, "")
    return printable(str(value.get("label", "") if isinstance(value, Mapping) else value))


def names(records: Sequence[RunRecord]) -> list[str]:
    """A name for each run that no other has: method, preset, seed, model where there are more."""
    models = {config_of(run, "model") for run in records} - {""}
    plain = [_name(run, len(models) > 1) for run in records]
    return [
        f"{name} ({printable(run.folder.name)})" if plain.count(name) > 1 else name
        for name, run in zip(plain, records, strict=True)
    ]


def _name(run: RunRecord, with_model: bool) -> str:
    method, preset = config_of(run, "method"), config_of(run, "preset_name")
    seed = config_of(run, "seed")
    parts = [METHODS.get(method, method) or printable(run.folder.name)]
    parts += [preset] if preset not in ("", "-", "paper") else []
    parts += [f"seed {seed}"] if seed else []
    return ", ".join([*parts, *([config_of(run, "model")] if with_model else [])])


def name_of_weights(run_name: str, run: RunRecord, evaluation: Evaluation) -> str:
    """Which weights were evaluated: of a run after a stage or step of SFT, or the base model."""
    if evaluation.weights == "base":
        model = evaluation.about.get("model") or config_of(run, "model")
        return ", ".join(filter(None, (STAGES["base"], model)))
    stage = STAGES.get(evaluation.weights, evaluation.weights)
    return f"{run_name}, {stage if evaluation.step is None else f'SFT step {evaluation.step}'}"


def of_method(records: Sequence[RunRecord], method: str) -> list[RunRecord]:
    return [run for run in records if config_of(run, "method") == method]


def folders(records: Iterable[RunRecord]) -> str:
    return ", ".join(printable(str(run.folder)) for run in records)


def found_in(
    figure: str,
    records: Sequence[RunRecord],
    reader: Callable[[RunRecord], Trajectory | None],
    what: str,
    cure: str,
) -> tuple[list[Trajectory], tuple[str, ...]]:
    """The trajectories there are, and a note on every run without.

    Raises UserError where no run has one.
    """
    found = [(run, reader(run)) for run in records]
    have = [trajectory for _, trajectory in found if trajectory]
    lacking = [run for run, trajectory in found if not trajectory]
    if not have:
        raise UserError(f"figure {figure}: no {what} in {folders(records)}; {cure}")
    return have, tuple(f"figure {figure}: no {what} in {folders([run])}" for run in lacking)


def snapshots(run: RunRecord, has: Callable[[Evaluation], object]) -> list[Evaluation]:
    """Unsteered evaluations of snapshots by step, all under one setting: that of the most steps."""
    by_setting: dict[str, dict[int, Evaluation]] = {}
    for found in run.evaluations:
        otherwise = steering(found) or "self_cd" in found.settings
        if found.weights == "snapshot" and found.step is not None and not otherwise and has(found):
            setting = storage.fingerprint([found.settings, found.about.get("data")])
            by_setting.setdefault(setting, {})[found.step] = found
    most = max(by_setting.values(), key=len, default={})
    return [most[step] for step in sorted(most)]


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


def kind_probabilities(run: RunRecord) -> Trajectory | None:
    """Mean refusal probabilities by (quantity, kind)."""
    curves = {
        (quantity, *kind): curve
        for quantity, prefix in PREFIXES.items()
        for kind, curve in logged(run, "sft", prefix, 1).items()
    }
    return _trajectory(run, curves, _probability, _by_kind)


def followed_probabilities(run: RunRecord) -> Trajectory | None:
    """Refusal probabilities of the followed prompts by (quantity, kind), single values each."""
    curves = logged(run, "sft", f"{PREFIXES['plain']}/followed", 1)
    plain = {("plain", *kind): curve for kind, curve in curves.items()}
    return _trajectory(run, plain, _probability, _by_followed)


def kernels(run: RunRecord) -> Trajectory | None:
    """Mean normalised norms by (params, observer, trained)."""
    return _trajectory(run, logged(run, "sft", "kernel", 3), _kernel, _by_pair)


def tracked_kernels(run: RunRecord, stage: str) -> dict[Key, list[Reading]]:
    """What tracking found of the kernel during a stage, by (params, observer, trained)."""
    return _joined(logged(run, stage, "kernel", 3), _kept(run, stage, _kernel, _by_pair))


def _trajectory(
    run: RunRecord,
    curves: Mapping[Key, list[Reading]],
    block: Callable[[Tracked | Evaluation], Block | None],
    read: Callable[[int, Block], Iterator[tuple[Key, Reading]]],
) -> Trajectory | None:
    """Curves that were logged, with what tracking kept; of neither, those of snapshots."""
    kept = _kept(run, "sft", block, read)
    if curves or kept:
        return Trajectory(run, _joined(curves, kept), KEPT if kept else TRACKED)
    scored = [
        reading
        for e in snapshots(run, block)
        if (found := block(e))
        for reading in read(e.step or 0, found)
    ]
    return Trajectory(run, _joined({}, scored), SCORED) if scored else None


def _kept(
    run: RunRecord,
    stage: str,
    block: Callable[[Tracked | Evaluation], Block | None],
    read: Callable[[int, Block], Iterator[tuple[Key, Reading]]],
) -> list[tuple[Key, Reading]]:
    return [
        reading
        for tracked in run.tracked
        if tracked.stage == stage and (found := block(tracked))
        for reading in read(tracked.step, found)
    ]


def _joined(
    curves: Mapping[Key, list[Reading]], kept: Iterable[tuple[Key, Reading]]
) -> dict[Key, list[Reading]]:
    """Curves by step, where what was kept of a step stands in place of its bare value."""
    by_step = {key: {reading.step: reading for reading in curve} for key, curve in curves.items()}
    for key, reading in kept:
        by_step.setdefault(key, {})[reading.step] = reading
    return {key: [curve[step] for step in sorted(curve)] for key, curve in by_step.items()}


def _probability(found: Tracked | Evaluation) -> Probability | None:
    return found.refusal_probability


def _kernel(found: Tracked | Evaluation) -> Kernel | None:
    return found.kernel


def _by_kind(step: int, found: Probability) -> Iterator[tuple[Key, Reading]]:
    for quantity in QUANTITIES:
        for kind, mean in found.kinds[quantity].items():
            yield from _reading((quantity, kind), step, mean)


def _by_followed(step: int, found: Probability) -> Iterator[tuple[Key, Reading]]:
    for quantity in QUANTITIES:
        for kind, value in found.followed[quantity].items():
            yield (quantity, kind), Reading(step, value)


def _by_pair(step: int, found: Kernel) -> Iterator[tuple[Key, Reading]]:
    for params, matrix in found.params.items():
        for observer, row in matrix.items():
            for trained, mean in row.items():
                yield from _reading((params, observer, trained), step, mean)


def _reading(key: Key, step: int, mean: Interval) -> Iterator[tuple[Key, Reading]]:
    """Nothing where there is no mean, as of a kind without a pair; ends that are not finite go."""
    if math.isfinite(mean.estimate):
        ends = (mean.low, mean.high)
        yield key, Reading(step, mean.estimate, *(ends if all(map(math.isfinite, ends)) else ()))


def shared_sets(evaluations: Sequence[Evaluation]) -> dict[str, SetScore]:
    """The sets that all of these were evaluated on, with the first one's scores."""
    if not evaluations:
        return {}
    first, *others = evaluations
    return {
        name: score for name, score in first.sets.items() if all(name in e.sets for e in others)
    }
