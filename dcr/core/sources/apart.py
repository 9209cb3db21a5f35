"""The rows of public sets kept apart for `data=final`: scored under a plan, else unused."""

import functools
import hashlib
from importlib import resources

from dcr.core.sources.jsonl import Row
from dcr.core.text import normalise

DIGITS = 12  # 48 bits of SHA-256: among a million prompts about 1e-5 are taken for one of these


def digest(prompt: str) -> str:
    """The name of a prompt in `final.txt`, the same whatever its case, punctuation and spacing."""
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()[:DIGITS]


@functools.cache
def _digests() -> frozenset[str]:
    text = resources.files("dcr.core.sources").joinpath("final.txt").read_text(encoding="ascii")
    return frozenset(text.split())


def is_final(prompt: str) -> bool:
    """Whether a prompt is among those kept apart."""
    return digest(prompt) in _digests()


def kept_apart(row: Row) -> bool:
    """A source's `keep` that selects the rows kept apart."""
    return is_final(str(row["prompt"]))


def not_kept_apart(row: Row) -> bool:
    """A source's `keep` that selects all other rows."""
    return not kept_apart(row)
