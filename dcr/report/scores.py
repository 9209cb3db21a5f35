"""What `metrics.json` says of sets, judges, tasks and comparisons, checked field by field.

Every reader raises ValueError, KeyError, TypeError or AttributeError for what cannot be.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dcr.config import Kind
from dcr.report.printing import printable

RULES = ("paper", "recommended")
COMPLIANCE, SAFETY = ("complied", "partial", "refused"), ("safe", "unsafe")
FAULTS = {  # by their keys: as a table calls them
    "empty": "empty",
    "truncated": "cut off at the limit",
    "repetitive": "repetitive",
    "non_english": "not English",
    "unanswered": "unanswered",
}


@dataclass(frozen=True)
class Judged:
    """One judge's verdicts on a set. `counts` holds the labels this judge gives, no others."""

    model: str
    counts: dict[str, int]
    invalid: int  # answered, but no verdict
    error: int  # nothing came back: outside of every rate

    @property
    def labelled(self) -> int:
        """Responses with a compliance label."""
        return sum(self.counts.get(label, 0) for label in COMPLIANCE)


@dataclass(frozen=True)
class Overlap:
    """How many prompts of a set stand, in which way, among the rows trained on."""

    n: int
    exact: int
    near: int
    ngram: int
    by_source: dict[str, int]

    @property
    def text(self) -> str:
        return f"{self.exact} / {self.near} / {self.ngram} of {self.n}"

    @property
    def aside(self) -> str:
        """For the score it touches."""
        return f"{self.exact} / {self.near} / {self.ngram} in training"

    def __bool__(self) -> bool:
        return bool(self.exact or self.near or self.ngram)


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
    partial: dict[str, int] = field(default_factory=dict)  # empty where an older file has none
    unseen_partial: dict[str, int] = field(default_factory=dict)
    seen_by_steering: int = 0  # prompts that the vectors of the evaluation's steering came from
    faults: dict[str, int] = field(default_factory=dict)
    ids: tuple[str, ...] | None = None  # of its prompts, where the store may hold others too
    judged: dict[str, Judged] = field(default_factory=dict)
    overlap: Overlap | None = None

    @property
    def contaminated(self) -> bool:
        """Whether training or steering saw some of its prompts, without its being trained on."""
        return bool(self.overlap or self.seen_by_steering) and not self.in_distribution

    @property
    def aside(self) -> str:
        """What was seen, for the score that it touches."""
        told = [self.overlap.aside] if self.overlap else []
        if self.seen_by_steering:
            told.append(f"{self.seen_by_steering} of {self.n} seen by steering")
        return "; ".join(told)


@dataclass(frozen=True)
class Agreement:
    """Two judges on the same responses; rows of the confusion are the first one's labels."""

    judges: tuple[str, str]
    kind: str
    n: int
    kappa: float | None
    labels: tuple[str, str]
    confusion: tuple[tuple[int, int], tuple[int, int]]


@dataclass(frozen=True)
class Usage:
    """What a judge has cost; no price, no `usd`."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    usd: float | None


@dataclass(frozen=True)
class Ability:
    """A task of the lm-evaluation-harness: by metric the accuracy and its standard error."""

    accuracies: dict[str, tuple[float, float]]
    n: int
    version: str
    shots: int
    limit: int | None


@dataclass(frozen=True)
class Quality:
    """Win rates in percent over the reference's answers, ties counting half."""

    win_rate: float
    standard_error: float
    length_controlled: float | None
    discrete: float | None
    n: int
    invalid: int
    error: int
    annotator: str
    reference: str
    mean_length: float | None
    reference_length: float | None
    usage: Usage | None = None  # of the annotator


def set_score(raw: Mapping[str, Any]) -> SetScore:
    """One entry of `sets`, without its name; of `judged`, see `judged`."""
    unseen = raw.get("unseen") or {"n": 0, "refused": {}}
    n, refused, partial = _refusals(raw)
    unseen_n, unseen_refused, unseen_partial = _refusals(unseen)
    return SetScore(
        name="",
        kind=Kind(raw["kind"]),
        n=n,
        refused=refused,
        partial=partial,
        in_distribution=bool(raw.get("in_distribution")),
        unseen_n=unseen_n,
        unseen_refused=unseen_refused,
        unseen_partial=unseen_partial,
        faults={key: _count(raw, key) for key in FAULTS if raw.get(key) is not None},
        ids=None if raw.get("ids") is None else tuple(map(str, raw["ids"])),
        seen_by_steering=int(raw.get("seen_by_steering") or 0),
    )


def _refusals(raw: Mapping[str, Any]) -> tuple[int, dict[str, int], dict[str, int]]:
    """Prompts, and of them those refused and those refused in part, by keyword rules."""
    n, partial = _count(raw, "n"), raw.get("partial") or {}
    refused = {rules: int(raw["refused"][rules]) for rules in RULES if rules in raw["refused"]}
    in_part = {rules: int(partial[rules]) for rules in refused if rules in partial}
    if n and "paper" not in refused:
        raise ValueError("refused.paper is missing")
    for rules, count in refused.items():
        if min(count, in_part.get(rules, 0)) < 0 or count + in_part.get(rules, 0) > n:
            told = f" and partial.{rules}={in_part[rules]}" if rules in in_part else ""
            raise ValueError(f"refused.{rules}={count}{told} of {n}")
    return n, refused, in_part


def judged(raw: Mapping[str, Any]) -> Judged:
    """One judge's entry of `sets.<name>.judged`."""
    labels = [label for label in (*COMPLIANCE, *SAFETY) if raw.get(label) is not None]
    if not labels:
        raise ValueError("no verdicts")
    invalid, error = (_count(raw, key) if raw.get(key) else 0 for key in ("invalid", "error"))
    counts = {label: _count(raw, label) for label in labels}
    return Judged(printable(str(raw.get("model") or "")), counts, invalid, error)


def agreement(raw: Mapping[str, Any]) -> Agreement:
    """One entry of `agreement`."""
    (a, b), (first, second) = raw["judges"], raw["labels"]
    rows = tuple((int(left), int(right)) for left, right in raw["confusion"])
    if len(rows) != 2:
        raise ValueError(f"confusion has {len(rows)} rows")
    return Agreement(
        judges=(printable(str(a)), printable(str(b))),
        kind=printable(str(raw["kind"])),
        n=_count(raw, "n"),
        kappa=_number(raw, "kappa"),
        labels=(printable(str(first)), printable(str(second))),
        confusion=(rows[0], rows[1]),
    )


def usage(raw: Mapping[str, Any]) -> Usage:
    """One entry of `usage`."""
    counts = (_count(raw, key) for key in ("requests", "prompt_tokens", "completion_tokens"))
    return Usage(*counts, usd=_number(raw, "usd"))


def ability(raw: Mapping[str, Any]) -> Ability:
    """One entry of `ability`."""
    found = {}
    for metric in ("acc", "acc_norm"):
        value = _number(raw, metric)
        if value is not None:
            found[metric] = value, _number(raw, f"{metric}_stderr") or 0.0
    if not found:
        raise ValueError("no accuracy")
    limit = raw.get("limit")
    return Ability(
        accuracies=found,
        n=_count(raw, "n"),
        version=printable(str(raw.get("version") or "")),
        shots=int(raw.get("shots") or 0),
        limit=None if limit is None else int(limit),
    )


def quality(raw: Mapping[str, Any]) -> Quality:
    """The entry `quality`."""
    rate, error = _number(raw, "win_rate"), _number(raw, "standard_error")
    if rate is None:
        raise ValueError("no win rate")
    return Quality(
        win_rate=rate,
        standard_error=error or 0.0,
        length_controlled=_number(raw, "length_controlled"),
        discrete=_number(raw, "discrete"),
        n=_count(raw, "n"),
        invalid=int(raw.get("invalid") or 0),
        error=int(raw.get("error") or 0),
        annotator=printable(str(raw["annotator"])),
        reference=printable(str(raw.get("reference") or "")),
        mean_length=_number(raw, "mean_length"),
        reference_length=_number(raw, "reference_length"),
        usage=usage(raw["usage"]) if raw.get("usage") else None,
    )


def overlap(raw: Mapping[str, Any]) -> Overlap:
    """One entry of `contamination`."""
    found = raw.get("by_source") or {}
    return Overlap(
        *(_count(raw, key) for key in ("n", "exact", "near", "ngram")),
        by_source={printable(str(name)): int(count) for name, count in found.items()},
    )


def _count(raw: Mapping[str, Any], key: str) -> int:
    count = int(raw[key])
    if count < 0:
        raise ValueError(f"{key}={count}")
    return count


def _number(raw: Mapping[str, Any], key: str) -> float | None:
    """A finite number, or None where there is none."""
    value = raw.get(key)
    if value is None or not math.isfinite(float(value)):
        return None
    return float(value)
