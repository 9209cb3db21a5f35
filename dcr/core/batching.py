"""Helpers of every batch: padding, positions, the context's length, and halving without memory."""

import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dcr.core import precision
from dcr.core.config import ConfigError

log = logging.getLogger(__name__)

OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)
UNLIMITED = 2**30
PROCESSES_A_CORE = 4  # slow, but a way to try several; more is a slip of the finger

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


def context_length(config: Any) -> int:
    """The number of tokens that a model can read; `UNLIMITED` if its config names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def to_gpu(model: Any, accelerator: str = "auto") -> None:
    """Moves a model to a GPU, NVIDIA's or Apple's, if there is one and the accelerator lets it."""
    kind = precision.kind_of(accelerator)
    if kind == "mps" or (kind == "cuda" and torch.cuda.is_available()):
        model.to(kind)


def check_devices(accelerator: str, devices: int) -> None:
    """Raises ConfigError if this machine has fewer devices than `trainer.devices`."""
    named = f"trainer.accelerator={accelerator} trainer.devices={devices}"
    found, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and found):
        if found < devices:
            raise ConfigError(
                f"{named}: this machine has {found} GPUs; lower trainer.devices or use "
                "trainer.accelerator=cpu"
            )
    elif devices > PROCESSES_A_CORE * cores:
        raise ConfigError(f"{named}: this machine has {cores} cores; lower trainer.devices")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{named}: this machine has none; use trainer.accelerator=cpu")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a lack of memory, for which torch has no type of its own on a CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


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
