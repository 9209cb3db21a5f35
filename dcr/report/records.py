"""What run folders say: evaluations, training curves, tracking, rows used."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dcr import results, runs, storage
from dcr.config import DataError, Kind, UserError
from dcr.results.schema import (
    Ability,
    Agreement,
    Discernment,
    Judged,
    Kernel,
    Metrics,
    OneStep,
    Overlap,
    Quality,
    RefusalProbability,
    Refusals,
    Separability,
    SetCounts,
    Usage,
)
from dcr.runs import Run
from dcr.statistics import Interval
from dcr.text import printable

RULES = ("paper", "recommended")
FAULTS = {  # by their keys: as a table calls them
    "empty": "empty",
    "truncated": "cut off at the limit",
    "repetitive": "repetitive",
    "non_english": "not English",
    "unanswered": "unanswered",
}
STAGES = ("contrastive", "sft")
Blocks = TypeVar("Blocks", Metrics, results.Tracked)


def interval(found: Sequence[float | None]) -> Interval:
    """An estimate with its ends, nan where one is not known."""
    return Interval(*(math.nan if end is None else end for end in found))


@dataclass(frozen=True)
class SetScore:
    """How one set of prompts was answered, and how much of it training or steering saw."""

    name: str
    kind: Kind
    n: int
    refused: dict[str, int]  # by keyword rules, as `partial`, which older files lack
    partial: dict[str, int]
    in_distribution: bool
    unseen: Refusals | None
    faults: dict[str, int]
    ids: list[str] | None  # of its prompts, where the store may hold others too
    judged: dict[str, Judged]
    seen_by_steering: int  # prompts that the vectors of the evaluation's steering came from
    overlap: Overlap | None

    @property
    def contaminated(self) -> bool:
        """Whether training or steering saw some of its prompts, without its being trained on."""
        return bool(seen(self.overlap) or self.seen_by_steering) and not self.in_distribution

    @property
    def aside(self) -> str:
        """What was seen, for the score that it touches."""
        told = [seen(self.overlap)] if seen(self.overlap) else []
        if self.seen_by_steering:
            told.append(f"{self.seen_by_steering} of {self.n} seen by steering")
        return "; ".join(told)


def seen(overlap: Overlap | None) -> str:
    """How many prompts stand among the rows trained on; empty where none does."""
    if overlap is None or not (overlap.exact or overlap.near or overlap.ngram):
        return ""
    return f"{overlap.exact} / {overlap.near} / {overlap.ngram} in training"


@dataclass(frozen=True)
class Evaluation:
    """One `metrics.json`: which weights, under which settings, with what result."""

    folder: Path
    weights: str
    step: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    sets: dict[str, SetScore] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)  # method, model, preset, seed, data
    discernment: Discernment = field(default_factory=Discernment)
    seconds: float | None = None
    tokens_per_second: float | None = None
    agreement: list[Agreement] = field(default_factory=list)
    usage: dict[str, Usage] = field(default_factory=dict)  # by judge
    ability: dict[str, Ability] = field(default_factory=dict)  # by task
    quality: Quality | None = None
    contamination: dict[str, Overlap] = field(default_factory=dict)  # by set or task
    refusal_probability: RefusalProbability | None = None
    kernel: Kernel | None = None
    separability: Separability | None = None
    claims: OneStep | None = None

    @property
    def scored(self) -> bool:
        """Whether it has anything for a table, and not the paper's analyses alone."""
        return bool(self.sets or self.discernment.pooled or self.ability or self.quality)

    @property
    def empty(self) -> bool:
        analyses = self.refusal_probability, self.kernel, self.separability, self.claims
        return not self.scored and not any(analyses)


def _evaluation(path: Path) -> Evaluation:
    found = _readable(results.read(path))
    kept = ("weights", "step", "settings", "seconds", "tokens_per_second", "agreement", "usage",
            "ability", "quality", "contamination", "refusal_probability", "kernel", "separability",
            "claims")  # fmt: skip
    keys = ("method", "model", "preset", "seed", "data")
    return Evaluation(
        path.parent,
        sets={name: _score(name, counts, found) for name, counts in found.sets.items()},
        about={key: str(value) for key in keys if (value := getattr(found, key)) is not None},
        discernment=found.discernment or Discernment(),
        **{key: getattr(found, key) for key in kept},
    )


def _score(name: str, counts: SetCounts, found: Metrics) -> SetScore:
    faults = {fault: count for fault in FAULTS if (count := getattr(counts, fault)) is not None}
    kept = ("kind", "n", "refused", "partial", "in_distribution", "unseen", "ids", "judged",
            "seen_by_steering")  # fmt: skip
    told = {key: getattr(counts, key) for key in kept}
    return SetScore(name=name, faults=faults, overlap=found.contamination.get(name), **told)


def _readable(found: Blocks) -> Blocks:
    """With every text as a page or a terminal can hold it."""
    return type(found).model_validate(_printable(found.model_dump()))


def _printable(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Kind):
        return printable(value)
    if isinstance(value, dict):
        return {_printable(key): _printable(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_printable, value))
    return value


@dataclass(frozen=True)
class Tracked:
    """What was measured after so many steps of a stage; None for what was not."""

    folder: Path
    stage: str
    step: int
    refusal_probability: RefusalProbability | None
    kernel: Kernel | None


def read_tracked(run: Run, notes: list[str]) -> list[Tracked]:
    """By stage and step; a step that was not finished is noted. DataError for a damaged file."""
    found = []
    for stage in STAGES:
        for folder in sorted(run.tracked(stage).glob("step-*/")):
            if not (folder / "metrics.json").exists():
                notes.append(f"{folder}: skipped, no metrics.json; measuring did not finish")
                continue
            if not (step := folder.name.removeprefix("step-")).isdecimal():
                raise DataError(f"{folder}: no step's folder; delete it")
            kept = _readable(results.read_tracked(folder / "metrics.json"))
            found.append(Tracked(folder, stage, int(step), kept.refusal_probability, kept.kernel))
    return sorted(found, key=lambda tracked: (STAGES.index(tracked.stage), tracked.step))


@dataclass(frozen=True)
class RunRecord:
    """All a report needs of one run folder."""

    folder: Path
    config: dict[str, Any]
    rows: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]  # what was skipped, and why
    tracked: list[Tracked] = field(default_factory=list)  # by stage and step


def read_run(folder: Path, curves_suffice: bool = False) -> RunRecord:
    """Everything readable in a run folder, with a note on everything that is not.

    Raises DataError for a damaged file, UserError if there is no evaluation; with `curves_suffice`,
    if nothing was logged or tracked either.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name run folders")
    notes: list[str] = []
    run = Run(folder)
    evaluations = []
    for path in sorted(folder.glob("eval/*/metrics.json")):
        found = _evaluation(path)
        if found.empty:
            notes.append(f"{path}: skipped, nothing measured in it")
        else:
            evaluations.append(found)
    metrics, tracked = _metrics(run, notes), read_tracked(run, notes)
    if not evaluations and not (curves_suffice and (metrics or tracked)):
        why = f" ({notes[0]})" if notes else ""
        raise UserError(f"{folder}: no evaluations there{why}; run python eval.py run={folder}")
    for place in sorted(folder.glob("eval/*/")):
        if not (place / "metrics.json").exists():
            notes.append(f"{place}: skipped, no metrics.json; the evaluation did not finish")
    config: dict[str, Any] = {}
    if run.config_file.exists():
        run.config()  # checked there, but not in the file's order, in which the page shows it
        config = storage.read_yaml(run.config_file, dict[str, Any])
    try:
        storage.fingerprint(config)
    except (ValueError, TypeError, RecursionError) as error:  # such as a list inside itself
        raise DataError(f"{run.config_file}: holds what no setting is ({error})") from error
    trained = any((folder / stage).is_dir() for stage in STAGES)
    for path, needed in ((run.config_file, True), (run.rows_file, trained)):
        if needed and not path.exists():
            notes.append(f"{path}: missing")
    return RunRecord(folder, config, run.record(), metrics, evaluations, notes, tracked)


def _metrics(run: Run, notes: list[str]) -> list[dict[str, Any]]:
    rows = runs.read_metrics(run)
    text = run.metrics_file.read_text("utf-8") if run.metrics_file.exists() else ""
    if torn := max(0, len(text.splitlines()) - 1 - len(rows)):  # less the header
        notes.append(f"{run.metrics_file}: {torn} torn line(s) skipped")
    return rows
