"""What run folders say: evaluations, training curves, rows used. Files may be missing or torn."""

import csv
import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dcr import refusal, runs
from dcr.config import Kind, UserError
from dcr.runs import Run
from dcr.statistics import Interval

RULES = ("paper", "recommended")
WEIGHTS = ("base", "contrastive", "sft", "snapshot")


@dataclass(frozen=True)
class SetScore:
    """How one set of prompts was answered; `refused` counts by keyword rules."""

    name: str
    kind: Kind
    n: int
    refused: dict[str, int]
    in_distribution: bool = False
    unseen_n: int = 0
    unseen_refused: dict[str, int] = field(default_factory=dict)
    empty: int | None = None
    truncated: int | None = None
    repetitive: int | None = None
    ids: tuple[str, ...] | None = None  # of its prompts, where the store may hold others too


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


@dataclass(frozen=True)
class Completion:
    """A stored answer with its keyword verdicts."""

    id: str
    prompt: str
    response: str
    tokens: int | None
    ended: bool
    refused: dict[str, bool]


@dataclass(frozen=True)
class RunRecord:
    """All a report needs of one run folder."""

    folder: Path
    config: dict[str, Any]
    rows: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[Evaluation]
    notes: list[str]  # what was skipped, and why


def read_run(folder: Path) -> RunRecord:
    """Everything readable in a run folder, with a note on everything that is not.

    Raises UserError if not one evaluation can be read.
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
            notes.append(f"{path}: skipped, unreadable ({_reason(error)})")
    if not evaluations:
        why = f" ({notes[0]})" if notes else ""
        raise UserError(f"{folder}: no evaluations there{why}; run python eval.py run={folder}")
    for place in sorted(folder.glob("eval/*/")):
        if not (place / "metrics.json").exists():
            notes.append(f"{place}: skipped, no metrics.json; the evaluation did not finish")
    return RunRecord(
        folder,
        _mapping(run.config_file, yaml.safe_load, notes),
        _mapping(run.rows_file, json.loads, notes, needed=_trained(folder)),
        _metrics(run, notes),
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
        notes.append(f"{path}: skipped, unreadable ({_reason(error)})")
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
        notes.append(f"{run.metrics_file}: skipped, unreadable ({_reason(error)}); no curves")
        return []
    if torn := max(0, len(text.splitlines()) - 1 - len(rows)):  # less the header
        notes.append(f"{run.metrics_file}: {torn} torn line(s) skipped")
    return rows


def _evaluation(path: Path, notes: list[str]) -> Evaluation:
    raw = json.loads(path.read_text(encoding="utf-8"))
    if raw["weights"] not in WEIGHTS:
        raise ValueError(f"weights={raw['weights']}")
    sets = {}
    for name, entry in raw["sets"].items():
        try:
            sets[printable(name)] = _set_score(printable(name), entry)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            notes.append(f"{path}: set {name} skipped, unreadable ({_reason(error)})")
    if not sets:
        raise ValueError("no set of prompts in it")
    discernment = raw.get("discernment") or {}
    pairs = {
        printable(name): Interval(*map(float, value))
        for name, value in (discernment.get("pairs") or {}).items()
        if value is not None
    }
    pooled = discernment.get("pooled")
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
        discernment=Interval(*map(float, pooled)) if pooled else None,
        discernment_pairs=pairs,
        seconds=raw.get("seconds"),
        tokens_per_second=raw.get("tokens_per_second"),
    )


def _set_score(name: str, raw: Mapping[str, Any]) -> SetScore:
    unseen = raw.get("unseen") or {"n": 0, "refused": {}}
    n, refused = _counts(raw)
    unseen_n, unseen_refused = _counts(unseen)
    return SetScore(
        name=name,
        kind=Kind(raw["kind"]),
        n=n,
        refused=refused,
        in_distribution=bool(raw.get("in_distribution")),
        unseen_n=unseen_n,
        unseen_refused=unseen_refused,
        empty=raw.get("empty"),
        truncated=raw.get("truncated"),
        repetitive=raw.get("repetitive"),
        ids=None if raw.get("ids") is None else tuple(map(str, raw["ids"])),
    )


def _counts(raw: Mapping[str, Any]) -> tuple[int, dict[str, int]]:
    n = int(raw["n"])
    refused = {rules: int(raw["refused"][rules]) for rules in RULES if rules in raw["refused"]}
    if n and "paper" not in refused:
        raise ValueError("refused.paper is missing")
    for rules, count in refused.items():
        if not 0 <= count <= n:
            raise ValueError(f"refused.{rules}={count} of {n}")
    return n, refused


def read_completions(evaluation: Evaluation, name: str, notes: list[str]) -> list[Completion]:
    """The stored completions of a set, judged anew; what is torn or disagrees goes to `notes`."""
    path = evaluation.folder / f"{name}.jsonl"
    if not path.is_file():
        notes.append(f"{path}: missing; no completions of it are shown or compared")
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        notes.append(f"{path}: skipped, unreadable ({_reason(error)})")
        return []
    found: dict[str, Completion] = {}  # an id stored again takes the place of the first
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            completion = _completion(json.loads(line))
            found[completion.id] = completion
        except (ValueError, KeyError, TypeError) as error:
            notes.append(f"{path}:{number}: skipped, unreadable ({_reason(error)})")
    score = evaluation.sets[name]
    completions = [found[i] for i in score.ids or found if i in found]
    refused, counted = sum(c.refused["paper"] for c in completions), score.refused.get("paper", 0)
    if (len(completions), refused) != (score.n, counted):
        told = f"{refused} of {len(completions)} refused, metrics.json says {counted} of {score.n}"
        notes.append(f"{path}: {told}")
    return completions


def _completion(raw: Mapping[str, Any]) -> Completion:
    response = raw["response"]
    if not isinstance(response, str):
        raise TypeError("response is no text")
    return Completion(
        id=str(raw["id"]),
        prompt=printable(str(raw["prompt"])),
        response=printable(response),
        tokens=raw.get("tokens"),
        ended=bool(raw.get("ended", True)),
        refused={rules: refusal.is_refusal(response, rules) for rules in RULES},
    )


def printable(text: str) -> str:
    """Text any page and terminal can hold: control characters as pictures, no lone surrogates."""
    return "".join(_shown(character) for character in text.replace("\r\n", "\n"))


def _shown(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cs"):
        return character
    code = ord(character)
    return chr(0x2400 + code) if code < 0x20 else "\N{REPLACEMENT CHARACTER}"


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
