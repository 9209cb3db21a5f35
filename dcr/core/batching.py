"""Batches of token sequences: padded, and halved where memory runs out."""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dcr.core.machine import is_out_of_memory

log = logging.getLogger(__name__)


Row = TypeVar("Row")
Done = TypeVar("Done")


def padded(
    sequences: Sequence[Sequence[int]], value: int, left: bool = False
) -> Int[Tensor, "batch length"]:
    """Sequences as one tensor, filled up with `value` on the right (or left)."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, True, value, padding_side="left" if left else "right")


def attention_mask(
    sequences: Sequence[Sequence[int]], left: bool = False
) -> Bool[Tensor, "batch length"]:
    """True for a token, False for padding; not derived from ids, as a pad id can be a token."""
    return padded([[1] * len(s) for s in sequences], 0, left).bool()


def positions(
    mask: Shaped[Tensor, "batch length"],
) -> Int[Tensor, "batch length"]:
    """Each token's position in its row; the first token has 0 whatever the padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def placed(module: Any, places: Int[Tensor, "batch length"]) -> dict[str, Tensor]:
    """The positions as an argument of a module's `forward`, or nothing if it takes none."""
    takes = "position_ids" in inspect.signature(module.forward).parameters
    return {"position_ids": places} if takes else {}


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
            torch.cuda.empty_cache()
            size = max(1, min(size, len(rows)) // 2)
            log.warning("out of memory: %s is now %d", setting, size)
            continue
        rows = rows[size:]
        yield done
