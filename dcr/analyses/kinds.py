"""The prompts of each kind, `data.analysis`, that the analyses read and training follows."""

import hashlib
from collections.abc import Mapping, Sequence

from dcr.core import sources
from dcr.core.config import ConfigError, DataConfig, Kind
from dcr.core.sources import Example
from dcr.core.text import normalise

ByKind = Mapping[Kind, Sequence[Example]]
# The prompts that Figures 1(b) and 9 of the paper follow stand in XSTest and Alpaca, whose rows are
# not ours to print: hashes of the normalised prompts find them there.
FOLLOWED = {
    Kind.normal: "18ab3ef4c3463f67",
    Kind.seemingly_toxic: "0be02537e93cc530",
    Kind.toxic: "760a3721eb1a485b",
}


def every(data: DataConfig) -> dict[Kind, list[Example]]:
    """All rows of each kind of `data.analysis`, each prompt once.

    Raises ConfigError where a kind has no source.
    """
    rows = {}
    for kind in (Kind.seemingly_toxic, Kind.toxic, Kind.normal):
        names = getattr(data.analysis, kind.value)
        if not names:
            raise ConfigError(
                f"data.analysis.{kind.value}=[]: name a source to measure on, or choose a data "
                "file that does, such as data=demo"
            )
        read = [row for n in names for row in sources.read(n, root=data.root, kind=kind)]
        rows[kind], _ = sources.drop_duplicates(read)
    return rows


def drawn(rows: ByKind, count: int | None, seed: int) -> dict[Kind, list[Example]]:
    """Up to `count` of each kind, drawn by seed; None: all."""
    return {
        kind: list(of) if count is None else sources.draw(of, min(count, len(of)), seed)
        for kind, of in rows.items()
    }


def followed(rows: ByKind) -> dict[Kind, Example]:
    """One prompt of each kind to follow alone: the paper's, or the first where it is not there."""

    def digest(prompt: str) -> str:
        return hashlib.sha256(normalise(prompt).encode()).hexdigest()[:16]

    return {
        kind: next((row for row in of if digest(row.prompt) == FOLLOWED[kind]), of[0])
        for kind, of in rows.items()
    }
