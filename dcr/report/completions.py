"""Stored answers, judged anew by the keyword rules. Files may be missing or torn."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr import refusal
from dcr.report.entries import Entry
from dcr.report.printing import printable, reason
from dcr.report.records import Evaluation
from dcr.report.scores import RULES


@dataclass(frozen=True)
class Completion:
    """A stored answer with its keyword verdicts."""

    id: str
    prompt: str
    response: str
    tokens: int | None
    ended: bool
    refused: dict[str, bool]


class Completions:
    """Reads and judges each file of completions once; what is wrong goes to `notes`."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.read: dict[tuple[Path, str], list[Completion]] = {}

    def __call__(self, entry: Entry, name: str) -> list[Completion]:
        key = entry.evaluation.folder, name
        if key not in self.read:
            self.read[key] = read_completions(entry.evaluation, name, self.notes)
        return self.read[key]


def read_completions(evaluation: Evaluation, name: str, notes: list[str]) -> list[Completion]:
    """The stored completions of a set, judged anew; what is torn or disagrees goes to `notes`."""
    path = evaluation.folder / f"{name}.jsonl"
    if not path.is_file():
        notes.append(f"{path}: missing; no completions of it are shown or compared")
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        notes.append(f"{path}: skipped, unreadable ({reason(error)})")
        return []
    found: dict[str, Completion] = {}  # an id stored again takes the place of the first
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            completion = _completion(json.loads(line))
            found[completion.id] = completion
        except (ValueError, KeyError, TypeError) as error:
            notes.append(f"{path}:{number}: skipped, unreadable ({reason(error)})")
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
