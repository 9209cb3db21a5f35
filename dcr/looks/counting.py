"""Plans and the ledger of looks.

A plan is a YAML file that is written before the first look. The ledger lies beside it, one line a
look. Whoever reads a result can so tell how often its prompts were looked at, and for what.
"""

import datetime
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dcr.core import sources, storage
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import TASKS, in_turn, of_tasks
from dcr.core.evaluation.protocols import Change, Subject
from dcr.core.runs import Run
from dcr.looks import FinalConfig

CURE = "write all keys that docs/evidence.md lists"
LEDGER = ".looks.jsonl"  # in the place of the plan's ending


@dataclass(frozen=True)
class Plan:
    """The decisions taken before anyone looks at the rows kept apart.

    `arms` are what is compared, by name; `primary` is the one comparison that decides, and the
    others are corrected for their number.
    """

    question: str
    arms: dict[str, str]
    seeds: list[int]
    metric: str
    margin: str
    primary: str
    others: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Look:
    """One look: the weights, and the sets with how many of their rows."""

    at: str
    plan: str  # the SHA-256 of the plan's bytes, 12 digits
    run: str
    weights: str
    tasks: list[str]
    sets: dict[str, int]


def ledger(plan: Path) -> Path:
    """The file of the looks that a plan led to."""
    return plan.with_suffix(LEDGER)


class Counted(Change):
    """Answers to rows kept apart, and the line of the ledger that says so."""

    def check(self, settings: EvalConfig, run: Run) -> None:
        """Raises DataError for a plan that cannot be read or lacks a key."""
        file = _plan(settings)
        storage.read_yaml(file, Plan, CURE)
        _looks(file)

    def recorded(self, settings: EvalConfig) -> dict[str, Any]:
        file = _plan(settings)
        return {"plan": f"{file.name}@{_digest(file)}"}

    def identity(self, subject: Any) -> dict[str, object]:
        return {}  # answers do not depend on what they are for

    def prepared(self, subject: Subject) -> dict[str, Any]:
        """Counts the look, unless an earlier command of the same look was broken off."""
        settings, file = subject.settings, _plan(subject.settings)
        asked = of_tasks(list(TASKS), settings.data, settings.limit, settings.seed)
        weights = storage.fingerprint(subject.identity())
        sizes = {of.name: sum(sources.is_final(row.prompt) for row in of.rows) for of in asked}
        sizes = {name: size for name, size in sizes.items() if size}
        count(file, subject.run.folder.name, weights, settings.tasks, sizes)
        return {}


def count(
    plan: Path, run: str, weights: str, tasks: Sequence[str], sizes: Mapping[str, int]
) -> None:
    """Adds a look to the ledger of a plan, unless the same one stands there."""
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    look = Look(now, _digest(plan), run, weights, sorted(tasks), dict(sizes))
    with in_turn(plan.parent):
        if look not in (replace(before, at=now) for before in _looks(plan)):
            storage.append_lines(ledger(plan), [look])


def _plan(settings: EvalConfig) -> Path:
    return Path(str(settings.node(FinalConfig).plan))


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]


def _looks(file: Path) -> list[Look]:
    there = ledger(file)
    return storage.read_lines(there, Look) if there.exists() else []
