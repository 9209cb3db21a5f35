"""Overlap of training with evaluation: equal and nearly equal prompts.

The caller decides which prompts to drop, and which sets are in-distribution by design (XSTest safe
for stage one) and only marked.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz import fuzz, process

from dcr.core.text import normalise

COMPARED_CHARACTERS = 512  # of a normalised prompt: bounds the quadratic cost of long texts
ROWS_AT_ONCE = 512  # with 20,000 candidates a block of scores takes 40 MB


@dataclass(frozen=True)
class Overlap:
    """A prompt's closest relative among the evaluation prompts."""

    set: str  # name of the evaluation set
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
    references = [normalise(text) for texts in against.values() for text in texts]
    first = dict(reversed(list(zip(references, places, strict=True))))  # the earliest wins
    queries = [normalise(prompt) for prompt in prompts]
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

    Similarity cannot exceed 2·min/(a + b), so only references of about a query's length are
    scored: both sides are sorted by length and compared a block against its window.
    """
    by_length = sorted(range(len(references)), key=lambda i: (len(references[i]), i))
    lengths = [len(references[i]) for i in by_length]
    order = sorted(range(len(queries)), key=lambda i: len(queries[i]))
    shrink = near / (2 - near)
    for block in _blocks(order, queries, shrink):
        low = bisect_left(lengths, int(len(queries[block[0]]) * shrink))
        high = bisect_right(lengths, int(len(queries[block[-1]]) / shrink) + 1)
        window = sorted(by_length[low:high])  # in the caller's order, so that argmax keeps ties
        if not window:
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
                yield i, window[int(best)], float(score) / 100


def _blocks(order: list[int], queries: list[str], shrink: float) -> Iterator[list[int]]:
    """Cuts length-sorted queries into blocks of similar length and at most `ROWS_AT_ONCE`."""
    block: list[int] = []
    for i in order:
        # a block's window spans all its lengths, so a wide block would waste the sorting
        full = len(block) == ROWS_AT_ONCE
        if block and (full or len(queries[i]) * shrink > len(queries[block[0]]) + 1):
            yield block
            block = []
        block.append(i)
    if block:
        yield block
