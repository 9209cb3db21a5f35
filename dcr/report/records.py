"""What run folders say: evaluations, training curves, rows used. Files may be missing or torn."""

import csv
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from dcr import runs
from dcr.config import UserError
from dcr.report import measurements, scores
from dcr.report.measurements import Kernel, Probability, Separability
from dcr.report.printing import printable, reason
from dcr.report.scores import Ability, Agreement, Overlap, Quality, SetScore, Usage
from dcr.runs import Run
from dcr.statistics import Interval

WEIGHTS = ("base", "contrastive", "sft", "snapshot", "endpoint")
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
Part = TypeVar("Part")


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

    @property
    def scored(self) -> bool:
        """Whether it has anything for a table, and not the paper's analyses alone."""
        return bool(self.sets or self.ability or self.quality)


@dataclass(frozen=True)
class RunRecord:
    """All a report needs of one run folder."""

    folder: Path
    config: dict[str, Any]
    rows: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]  # what was skipped, and why


def read_run(folder: Path, curves_suffice: bool = False) -> RunRecord:
    """Everything readable in a run folder, with a note on everything that is not.

    Raises UserError if not one evaluation can be read; with `curves_suffice`, if nothing was logged
    either.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; name run folders")
    notes: list[str] = []
    run = Run(folder)
    evaluations = []
    for path in sorted(folder.glob("eval/*/metrics.json")):
        try:
            evaluations.append(_evaluation(path, notes))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{path}: skipped, unreadable ({reason(error)})")
    metrics = _metrics(run, notes)
    if not evaluations and not (curves_suffice and metrics):
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
    except (OSError, ValueError, yaml.YAMLError) as error:
        notes.append(f"{path}: skipped, unreadable ({reason(error)})")
        return {}
    if not isinstance(value, dict):
        notes.append(f"{path}: skipped, not a mapping")
        return {}
    return value


def _metrics(run: Run, notes: list[str]) -> list[dict[str, Any]]:
    try:
        rows = runs.read_metrics(run)
        text = run.metrics_file.read_text("utf-8") if run.metrics_file.exists() else ""
    except (OSError, ValueError, csv.Error) as error:
        notes.append(f"{run.metrics_file}: skipped, unreadable ({reason(error)}); no curves")
        return []
    if torn := max(0, len(text.splitlines()) - 1 - len(rows)):  # less the header
        notes.append(f"{run.metrics_file}: {torn} torn line(s) skipped")
    return rows


def _evaluation(path: Path, notes: list[str]) -> Evaluation:
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw["weights"] not in WEIGHTS:
        raise ValueError(f"weights={raw['weights']}")
    contamination = _parts(path, "contamination", raw, scores.overlap, notes)
    sets = {}
    for name, entry in (raw.get("sets") or {}).items():
        try:
            score = scores.set_score(printable(name), entry, contamination.get(printable(name)))
        except UNREADABLE as error:
            notes.append(f"{path}: set {name} skipped, unreadable ({reason(error)})")
            continue
        found = _parts(path, "judged", entry, scores.judged, notes, f"sets.{name}.")
        sets[score.name] = replace(score, judged=found)
    ability = _parts(path, "ability", raw, scores.ability, notes)
    quality = _only(path, "quality", raw, scores.quality, notes)
    probability = _only(path, "refusal_probability", raw, measurements.probability, notes)
    kernel = _only(path, "kernel", raw, measurements.kernel, notes)
    separability = _only(path, "separability", raw, measurements.separability, notes)
    if not any((sets, ability, quality, probability, kernel, separability)):
        raise ValueError("no set of prompts in it")
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
        agreement=list(_parts(path, "agreement", listed, scores.agreement, notes).values()),
        usage=_parts(path, "usage", raw, scores.usage, notes),
        ability=ability,
        quality=quality,
        contamination=contamination,
        refusal_probability=probability,
        kernel=kernel,
        separability=separability,
    )


def _only(
    path: Path,
    key: str,
    raw: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], Part],
    notes: list[str],
) -> Part | None:
    """What stands under an optional key of its own."""
    return _parts(path, key, {key: {"": raw.get(key)}}, parse, notes).get("")


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


def _parts(
    path: Path,
    key: str,
    raw: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], Part],
    notes: list[str],
    prefix: str = "",
) -> dict[str, Part]:
    """What stands under an optional key, by name; what cannot be read is skipped with a note."""
    found = raw.get(key) or {}
    if not isinstance(found, Mapping):
        notes.append(f"{path}: {prefix}{key} skipped, not a mapping")
        return {}
    parts: dict[str, Part] = {}
    for name, part in found.items():
        if part is None:
            continue
        try:
            parts[printable(str(name))] = parse(part)
        except UNREADABLE as error:
            place = f"{prefix}{key}.{name}".removesuffix(".")
            notes.append(f"{path}: {place} skipped, unreadable ({reason(error)})")
    return parts
