"""Stored answers, judged anew by the keyword rules."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr import refusal
from dcr.report.blocks import UNREADABLE, damaged
from dcr.report.entries import Entry
from dcr.report.printing import printable
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
    refusal_mass: float | None
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
    """The stored completions of a set, judged anew; what is missing or disagrees goes to `notes`.

    DataError for a damaged line. A last one without its end was cut off by a kill and is noted.
    """
    path = evaluation.folder / f"{name}.jsonl"
    if not path.is_file():
        notes.append(f"{path}: missing; no completions of it are shown or compared")
        return []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise damaged(path, error) from error
    found: dict[str, Completion] = {}  # an id stored again takes the place of the first
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            completion = _completion(json.loads(line))
            found[completion.id] = completion
        except UNREADABLE as error:
            if number < len(lines):
                raise damaged(f"{path}:{number}", error) from error
            notes.append(f"{path}:{number}: cut off, dropped")
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
    mass = raw.get("refusal_mass")
    return Completion(
        id=str(raw["id"]),
        prompt=printable(str(raw["prompt"])),
        response=printable(response),
        tokens=raw.get("tokens"),
        ended=bool(raw.get("ended", True)),
        refusal_mass=None if mass is None else float(mass),
        refused={rules: refusal.is_refusal(response, rules) for rules in RULES},
    )
