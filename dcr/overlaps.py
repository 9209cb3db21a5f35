"""Prompts that are equal to others or nearly so, whatever their case, punctuation and spacing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz import fuzz, process

from dcr.core.text import last_turn, normalise

COMPARED_CHARACTERS = 512  # of a normalised prompt: bounds the quadratic cost of long texts
ROWS_AT_ONCE = 256  # with 20,000 candidates a block of scores takes 20 MB


@dataclass(frozen=True)
class Overlap:
    """A prompt's closest relative among those of some sets, such as what is evaluated."""

    set: str  # its name
    index: int  # its place in that set
    exact: bool  # equal once normalised
    similarity: float  # in [0, 1]; 1 when exact


def overlaps(
    prompts: Sequence[str], against: Mapping[str, Sequence[str]], *, near: float = 0.9
) -> list[Overlap | None]:
    """Each prompt's closest relative in `against`, or None if none is close enough.

    Exact means equal after `normalise`, over the whole text. Near means a normalised indel
    similarity, 2·LCS/(a + b), of at least `near` over the first 512 normalised characters. The
    earlier set and row wins a tie. `near` lies above 0; 1 leaves only exact duplicates.
    """
    places = [(name, index) for name, texts in against.items() for index in range(len(texts))]
    references = [normalise(last_turn(text)) for texts in against.values() for text in texts]
    first = dict(reversed(list(zip(references, places, strict=True))))  # the earliest wins
    queries = [normalise(last_turn(prompt)) for prompt in prompts]
    closest = [Overlap(*first[query], True, 1.0) if query in first else None for query in queries]
    if near == 1:
        return closest
    pending = [i for i, overlap in enumerate(closest) if overlap is None]
    heads = [queries[i][:COMPARED_CHARACTERS] for i in pending]
    for row, reference, score in _closest(
        heads, [text[:COMPARED_CHARACTERS] for text in references], near
    ):
        closest[pending[row]] = Overlap(*places[reference], False, score)
    return closest


def _closest(
    queries: list[str], references: list[str], near: float
) -> Iterator[tuple[int, int, float]]:
    """Yields (query, best reference, similarity) for each query with a reference within `near`.

    Similarity cannot exceed 2·min/(a + b), so queries are sorted by length, and a block of them is
    compared with references of about its lengths alone.
    """
    lengths, shrink = np.array([len(text) for text in references]), near / (2 - near)
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    for start in range(0, len(order), ROWS_AT_ONCE):
        block = order[start : start + ROWS_AT_ONCE]
        least, most = len(queries[block[0]]) * shrink, len(queries[block[-1]]) / shrink
        # in the caller's order, so that argmax keeps ties
        window = np.flatnonzero((lengths >= int(least)) & (lengths <= int(most) + 1))
        if not len(window):
            continue
        scores = process.cdist(
            [queries[i] for i in block],
            [references[i] for i in window],
            scorer=fuzz.ratio,
            score_cutoff=100 * near,
            dtype=np.float32,
            workers=-1,
        )
        for i, best, score in zip(block, scores.argmax(axis=1), scores.max(axis=1), strict=True):
            if score > 0:  # rapidfuzz puts 0 below the cut-off
                yield i, int(window[best]), float(score) / 100
