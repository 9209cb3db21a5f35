"""What run folders say: evaluations, training curves, rows used. Files may be missing or torn."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from dcr import runs, storage
from dcr.config import UserError
from dcr.report import measurements, scores
from dcr.report.blocks import UNREADABLE, damaged, only, parts
from dcr.report.measurements import Kernel, OneStep, Probability, Separability
from dcr.report.printing import printable
from dcr.report.scores import Ability, Agreement, Overlap, Quality, SetScore, Usage
from dcr.report.tracked import Tracked, read_tracked
from dcr.runs import Run
from dcr.statistics import Interval

WEIGHTS = ("base", "contrastive", "sft", "snapshot", "endpoint")


@dataclass(frozen=True)
class Evaluation:
    """One `metrics.json`: which weights, under which settings, with what result."""

    folder: Path
    weights: str
    step: int | None
    settings: dict[str, Any]
    sets: dict[str, SetScore]
    about: dict[str, str]  # method, model, preset, seed, data
    discernment: Interval | None = None
    discernment_pairs: dict[str, Interval] = field(default_factory=dict)
    seconds: float | None = None
    tokens_per_second: float | None = None
    agreement: list[Agreement] = field(default_factory=list)
    usage: dict[str, Usage] = field(default_factory=dict)  # by judge
    ability: dict[str, Ability] = field(default_factory=dict)  # by task
    quality: Quality | None = None
    contamination: dict[str, Overlap] = field(default_factory=dict)  # by set or task
    refusal_probability: Probability | None = None
    kernel: Kernel | None = None
    separability: Separability | None = None
    one_step: OneStep | None = None  # its block `claims`

    @property
    def scored(self) -> bool:
        """Whether it has anything for a table, and not the paper's analyses alone."""
        return bool(self.sets or self.ability or self.quality)

    @property
    def empty(self) -> bool:
        analyses = self.refusal_probability, self.kernel, self.separability, self.one_step
        return not self.scored and not any(analyses)


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
        try:
            found = _evaluation(path)
        except UNREADABLE as error:
            raise damaged(path, error) from error
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
    return RunRecord(
        folder,
        _mapping(run.config_file, yaml.safe_load, notes),
        _mapping(run.rows_file, json.loads, notes, needed=_trained(folder)),
        metrics,
        evaluations,
        notes,
        tracked,
    )


def _trained(folder: Path) -> bool:
    return any((folder / stage).is_dir() for stage in ("contrastive", "sft"))


def _mapping(path: Path, parse: Any, notes: list[str], needed: bool = True) -> dict[str, Any]:
    if not path.is_file():
        if needed:
            notes.append(f"{path}: missing")
        return {}
    try:
        value = parse(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise TypeError("not a mapping")
        storage.fingerprint(value)  # what JSON cannot hold, such as a mapping inside itself
    except (*UNREADABLE, yaml.YAMLError) as error:
        raise damaged(path, error, "restore it, or train the run again") from error
    return value


def _metrics(run: Run, notes: list[str]) -> list[dict[str, Any]]:
    try:
        rows = runs.read_metrics(run)
        text = run.metrics_file.read_text("utf-8") if run.metrics_file.exists() else ""
    except (*UNREADABLE, csv.Error) as error:
        raise damaged(run.metrics_file, error, "delete it: it holds the curves alone") from error
    if torn := max(0, len(text.splitlines()) - 1 - len(rows)):  # less the header
        notes.append(f"{run.metrics_file}: {torn} torn line(s) skipped")
    return rows


def _evaluation(path: Path) -> Evaluation:
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw["weights"] not in WEIGHTS:
        raise ValueError(f"weights={raw['weights']}")
    contamination = parts(path, "contamination", raw, scores.overlap)
    plain = parts(path, "sets", raw, scores.set_score)
    sets = {
        name: replace(
            score,
            name=name,
            overlap=contamination.get(name),
            judged=parts(path, "judged", raw["sets"][written], scores.judged, f"sets.{name}."),
        )
        for written, (name, score) in zip(raw.get("sets") or {}, plain.items(), strict=True)
    }
    listed = {"agreement": dict(enumerate(raw.get("agreement") or ()))}
    return Evaluation(
        folder=path.parent,
        weights=raw["weights"],
        step=None if raw.get("step") is None else int(raw["step"]),
        settings=dict(raw.get("settings") or {}),
        sets=sets,
        about={
            key: printable(str(raw[key]))
            for key in ("method", "model", "preset", "seed", "data")
            if raw.get(key) is not None
        },
        **_discernment(raw.get("discernment") or {}),
        seconds=raw.get("seconds"),
        tokens_per_second=raw.get("tokens_per_second"),
        agreement=list(parts(path, "agreement", listed, scores.agreement).values()),
        usage=parts(path, "usage", raw, scores.usage),
        ability=parts(path, "ability", raw, scores.ability),
        quality=only(path, "quality", raw, scores.quality),
        contamination=contamination,
        refusal_probability=only(path, "refusal_probability", raw, measurements.probability),
        kernel=only(path, "kernel", raw, measurements.kernel),
        separability=only(path, "separability", raw, measurements.separability),
        one_step=only(path, "claims", raw, measurements.one_step),
    )


def _discernment(raw: Mapping[str, Any]) -> dict[str, Any]:
    pooled = raw.get("pooled")
    return {
        "discernment": Interval(*map(float, pooled)) if pooled else None,
        "discernment_pairs": {
            printable(name): Interval(*map(float, value))
            for name, value in (raw.get("pairs") or {}).items()
            if value is not None
        },
    }
