"""Rows in batches: grouped by length, so that little is padded, and halved where memory runs out.

Torch is imported for the second alone: a plan and a user's error do not wait for it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence, Sized
from typing import TypeVar

from dcr.core.machine import is_out_of_memory

log = logging.getLogger(__name__)

Row = TypeVar("Row")
Done = TypeVar("Done")


def by_length(sequences: Sequence[Sized], longest_first: bool = False) -> list[int]:
    """Places of sequences by length, so that little is padded; those of one length keep theirs.

    Longest first, running out of memory happens at once.
    """
    sign = -1 if longest_first else 1
    return sorted(range(len(sequences)), key=lambda place: sign * len(sequences[place]))


def by_tokens(sequences: Sequence[Sized], tokens: int, even: bool = False) -> list[list[int]]:
    """Groups of places of sequences, the longest first, of at most `tokens` padded tokens each.

    A sequence longer than that is alone in its group; with `even` a group is of one length.
    """
    groups: list[list[int]] = []
    for place in by_length(sequences, longest_first=True):
        longest = len(sequences[groups[-1][0]]) if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest <= tokens
        if fits and not (even and len(sequences[place]) < longest):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def halving(
    rows: Sequence[Row], size: int, setting: str, work: Callable[[Sequence[Row]], Done]
) -> Iterator[Done]:
    """Yields `work` of `size` rows at a time, and halves the size whenever memory runs out.

    A warning names the `setting` that gave the size.
    """
    while rows:
        try:
            done = work(rows[:size])
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
            done = None
        if done is None:  # outside the clause, whose error would hold tensors of its frames
            import torch

            torch.cuda.empty_cache()
            size = max(1, min(size, len(rows)) // 2)
            log.warning("out of memory: %s is now %d", setting, size)
            continue
        rows = rows[size:]
        yield done
