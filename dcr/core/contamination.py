"""Overlap of training with evaluation: equal, near and overlapping texts.

The functions take plain strings and give plain records. The caller decides which prompts to drop,
and which sets are in-distribution by design (XSTest safe for stage one) and only marked.
"""

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rapidfuzz import fuzz, process

from dcr.core.text import normalise

COMPARED_CHARACTERS = 512  # of a normalised prompt: bounds the quadratic cost of long texts
ROWS_AT_ONCE = 512  # with 20,000 candidates a block of scores takes 40 MB
NGRAM = 13  # words in a row (Brown et al. 2020, appendix C)
SHORTEST = 8  # words; a shorter prompt stands in many an unrelated text
WAYS = ("exact", "near", "ngram")  # of sharing a prompt, the strongest first


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


def report(
    trained: Mapping[str, Sequence[str]],
    evaluated: Mapping[str, Sequence[str]],
    *,
    near: float = 0.9,
    ngram: int = NGRAM,
) -> dict[str, dict[str, int | dict[str, int]]]:
    """Counts the prompts of each evaluation set that a run has seen: `contamination` in metrics.

    `trained` holds by source every text trained on: prompts, and the responses of SFT. A prompt
    counts once, by the strongest of three ways:

    - `exact`, `near`: as in `overlaps`;
    - `ngram`: `ngram` words in a row stand in one text, both normalised (GPT-3's 13-gram rule).
      A shorter prompt counts if all its words stand in one text in that order without a gap, and
      there are at least eight; shorter ones are compared as exact and near only.

    `by_source` counts the prompts that a source holds in any of these ways: one prompt may count
    for several sources, and sources that hold none are left out.
    """
    prompts = [prompt for texts in evaluated.values() for prompt in texts]
    index = _phrases([normalise(prompt).split() for prompt in prompts], ngram)
    ways: list[dict[str, int]] = [{} for _ in prompts]  # one a prompt: source -> place in WAYS
    for source, texts in trained.items():
        distinct = list(dict.fromkeys(texts))
        for place in _sharing(distinct, index, min(ngram, SHORTEST)):
            ways[place][source] = WAYS.index("ngram")
        for place, overlap in enumerate(overlaps(prompts, {source: distinct}, near=near)):
            if overlap is not None:
                ways[place][source] = WAYS.index("exact" if overlap.exact else "near")
    first, counts = 0, {}
    for name, texts in evaluated.items():
        counts[name] = _counted(ways[first : first + len(texts)])
        first += len(texts)
    return counts


def _counted(ways: Sequence[Mapping[str, int]]) -> dict[str, int | dict[str, int]]:
    strongest = [min(sources.values()) for sources in ways if sources]
    by_source = Counter(source for sources in ways for source in sources)
    counts = {name: strongest.count(place) for place, name in enumerate(WAYS)}
    return {"n": len(ways), **counts, "by_source": dict(sorted(by_source.items()))}


Phrase = tuple[str, ...]
# by first words, each phrase with the places of the prompts that hold it
Index = Mapping[Phrase, Mapping[Phrase, list[int]]]


def _phrases(prompts: Sequence[Sequence[str]], ngram: int) -> Index:
    """The phrases that count as overlap with each prompt: its n-grams, or all of a shorter one."""
    shortest = min(ngram, SHORTEST)
    index: dict[Phrase, dict[Phrase, list[int]]] = defaultdict(lambda: defaultdict(list))
    for place, words in enumerate(prompts):
        size = min(ngram, len(words))
        if size >= shortest:
            for start in range(len(words) - size + 1):
                phrase = tuple(words[start : start + size])
                index[phrase[:shortest]][phrase].append(place)
    return index


def _sharing(texts: Iterable[str], index: Index, shortest: int) -> set[int]:
    """The places of the prompts that share a phrase with one of the texts."""
    sharing: set[int] = set()
    for text in texts:
        words = normalise(text).split()
        for start in range(len(words) - shortest + 1):
            phrases = index.get(tuple(words[start : start + shortest]))
            for phrase, places in phrases.items() if phrases else ():
                if tuple(words[start : start + len(phrase)]) == phrase:
                    sharing.update(places)
    return sharing


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
