"""Quantities over the steps of SFT, from tracking (metrics.csv) or else from scored snapshots."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from dcr import runs
from dcr.config import UserError
from dcr.report.entries import METHODS, steering
from dcr.report.measurements import QUANTITIES
from dcr.report.printing import printable
from dcr.report.records import Evaluation, RunRecord
from dcr.report.scores import SetScore
from dcr.statistics import Interval

PREFIXES = {"plain": "refusal_probability", "prefix_free": "refusal_probability_prefix_free"}
TRACKED, SCORED = "metrics.csv", "snapshots"
Key = tuple[str, ...]


@dataclass(frozen=True)
class Reading:
    """A value after some steps; the interval is None where tracking logged the value alone."""

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
            setting = runs.fingerprint([found.settings, found.about.get("data")])
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
    tracked = {
        (quantity, *kind): curve
        for quantity, prefix in PREFIXES.items()
        for kind, curve in logged(run, "sft", prefix, 1).items()
    }
    if tracked:
        return Trajectory(run, tracked, TRACKED)
    curves: dict[Key, list[Reading]] = {}
    for scored in snapshots(run, lambda e: e.refusal_probability):
        assert scored.refusal_probability
        for quantity in QUANTITIES:
            for kind, mean in scored.refusal_probability.kinds[quantity].items():
                _append(curves, (quantity, kind), scored, mean)
    return Trajectory(run, curves, SCORED) if curves else None


def followed_probabilities(run: RunRecord) -> Trajectory | None:
    """Refusal probabilities of the followed prompts by (quantity, kind)."""
    tracked = logged(run, "sft", f"{PREFIXES['plain']}/followed", 1)
    if tracked:
        return Trajectory(run, {("plain", *k): curve for k, curve in tracked.items()}, TRACKED)
    curves: dict[Key, list[Reading]] = {}
    for scored in snapshots(run, lambda e: e.refusal_probability):
        assert scored.refusal_probability
        for quantity in QUANTITIES:
            for kind, value in scored.refusal_probability.followed[quantity].items():
                reading = Reading(scored.step or 0, value)
                curves.setdefault((quantity, kind), []).append(reading)
    return Trajectory(run, curves, SCORED) if curves else None


def kernels(run: RunRecord) -> Trajectory | None:
    """Mean normalised norms by (params, observer, trained)."""
    tracked = logged(run, "sft", "kernel", 3)
    if tracked:
        return Trajectory(run, tracked, TRACKED)
    curves: dict[Key, list[Reading]] = {}
    for scored in snapshots(run, lambda e: e.kernel):
        assert scored.kernel
        for params, matrix in scored.kernel.params.items():
            for observer, row in matrix.items():
                for trained, mean in row.items():
                    _append(curves, (params, observer, trained), scored, mean)
    return Trajectory(run, curves, SCORED) if curves else None


def _append(curves: dict[Key, list[Reading]], key: Key, scored: Evaluation, mean: Interval) -> None:
    reading = Reading(scored.step or 0, mean.estimate, mean.low, mean.high)
    curves.setdefault(key, []).append(reading)


def shared_sets(evaluations: Sequence[Evaluation]) -> dict[str, SetScore]:
    """The sets that all of these were evaluated on, with the first one's scores."""
    if not evaluations:
        return {}
    first, *others = evaluations
    return {
        name: score for name, score in first.sets.items() if all(name in e.sets for e in others)
    }
