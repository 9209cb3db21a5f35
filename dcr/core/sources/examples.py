"""The record that every source yields, and seeded draws, splits and comparisons of such records."""

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dcr.core.config import ConfigError, Kind
from dcr.core.text import normalise


@dataclass(frozen=True)
class Opening:
    """Words that an answer goes on from, cut after so many tokens."""

    text: str
    tokens: int


@dataclass(frozen=True)
class Example:
    """One prompt, with the answer that came with it, if any."""

    id: str
    prompt: str
    kind: Kind
    source: str
    response: str | None = None
    category: str | None = None
    group: str | None = None  # rows that share a template; no split separates them
    split: str | None = None
    opening: Opening | None = None  # that training puts before the response


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Draws exactly `count` examples without replacement, the same for the same rows and seed.

    The first n of a larger draw are the smaller draw of n, so that a sweep over counts adds rows
    and never swaps them. Raises ConfigError if there are too few.
    """
    if not 0 <= count <= len(examples):
        names = ", ".join(sorted({f"{e.source} ({e.kind.value})" for e in examples})) or "no source"
        raise ConfigError(
            f"{count} rows asked for, {len(examples)} available from {names}; "
            "lower the count or add a source"
        )
    shuffled = list(examples)
    random.Random(f"draw:{seed}").shuffle(shuffled)  # seeded by the string, not by its hash
    return shuffled[:count]


def drop_duplicates(examples: Iterable[Example]) -> tuple[list[Example], list[Example]]:
    """(kept, dropped): the first example of each prompt up to case, punctuation and spacing."""
    seen: set[str] = set()
    kept: list[Example] = []
    dropped: list[Example] = []
    for example in examples:
        key = normalise(example.prompt)
        (dropped if key in seen else kept).append(example)
        seen.add(key)
    return kept, dropped


def split_by_group(
    examples: Iterable[Example], holdout: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(train, held out), with about a `holdout` share of the groups held out.

    A group's side depends on its name and the seed alone, so safe and unsafe prompts of one
    template, split in separate calls, land on the same side. A row without a group is its own.
    """
    train: list[Example] = []
    heldout: list[Example] = []
    for example in examples:
        group = example.id if example.group is None else example.group
        digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        (heldout if position < holdout else train).append(example)
    return train, heldout


def fingerprint(examples: Iterable[Example]) -> str:
    """The SHA-256 over ids, prompts and responses, in order."""
    return _digest([example.id, example.prompt, example.response] for example in examples)


def _digest(rows: Iterable[Sequence[object]]) -> str:
    digest = hashlib.sha256()
    for fields in rows:
        # JSON, so that no text can imitate the border between two fields
        digest.update(json.dumps(fields).encode() + b"\n")
    return digest.hexdigest()


def record(examples: Sequence[Example]) -> dict[str, object]:
    """The record of used rows: their count, fingerprint and ids, and the same of any openings."""
    ids = [example.id for example in examples]
    told: dict[str, object] = {"count": len(ids), "fingerprint": fingerprint(examples), "ids": ids}
    if opened := [(row.id, row.opening) for row in examples if row.opening]:
        words = ([identity, opening.text, opening.tokens] for identity, opening in opened)
        told["openings"] = {"count": len(opened), "fingerprint": _digest(words)}
    return told
