"""The residual stream, read at the output of a block. Layer ℓ means: after the ℓ-th block, 1-based.

HF's `hidden_states[ℓ]` is the same tensor for every ℓ below the depth; after the last block HF
applies the final norm and this module does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcr import models


@contextmanager
def captured(model: Any, block: int) -> Iterator[list[Tensor]]:
    """While open, every forward pass appends the output of `block` ([batch, length, width]).

    The tensors stay in the autograd graph; the hook is gone on leaving, also by an exception.
    """
    taken: list[Tensor] = []

    def take(_module: Any, _inputs: Any, output: Any) -> None:
        taken.append(output[0] if isinstance(output, tuple) else output)

    handle = models.decoder_blocks(model)[block - 1].register_forward_hook(take)
    try:
        yield taken
    finally:
        handle.remove()


def pooled(
    hidden: Float[Tensor, "batch length width"], spans: Int[Tensor, "batch 2"]
) -> Float[Tensor, "batch width"]:
    """Mean over the positions `spans[i, 0]` up to but without `spans[i, 1]`, in fp32."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    inside: Bool[Tensor, "batch length"] = (places >= spans[:, :1]) & (places < spans[:, 1:])
    # where, not multiplication: a padded position may hold NaN and 0 * NaN is NaN
    kept = torch.where(inside[:, :, None], hidden.float(), 0.0)
    return kept.sum(1) / inside.sum(1, keepdim=True)
