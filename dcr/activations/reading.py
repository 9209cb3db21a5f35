"""Hidden states taken out of a forward pass.

HF's `hidden_states[ℓ]` is the output of block ℓ for every ℓ below the depth; after the last block
HF applies the final norm and this module does not.
"""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcr import models
from dcr.activations.sites import Site, hook


@contextmanager
def captured(model: Any, block: int) -> Iterator[list[Tensor]]:
    """While open, every forward pass appends the output of `block` ([batch, length, width]).

    The tensors stay in the autograd graph; the hook is gone on leaving, also by an exception.
    """
    taken: list[Tensor] = []
    handle = hook(model, Site.block_output, block, taken.append)
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


def states(
    model: Any,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    places: Int[Tensor, "batch places"],
    site: Site = Site.block_output,
    until: int | None = None,
) -> Float[Tensor, "blocks batch places width"]:
    """What stands at `places` (indices into the padded rows) in blocks 1 to `until` (None: all).

    One forward pass without gradient that ends at block `until` and computes no logits. In fp32,
    on the device of the ids.
    """
    last = until or len(models.decoder_blocks(model))
    taken: list[Tensor] = []
    rows = torch.arange(len(ids))[:, None]

    def take(hidden: Tensor) -> None:
        here = hidden.device
        taken.append(hidden[rows.to(here), places.to(here)].float().to(ids.device))

    with ExitStack() as stack, torch.no_grad():
        for block in range(1, last + 1):
            stack.callback(hook(model, site, block, take).remove)
        _run(models.trunk(model, last), ids, mask)
    return torch.stack(taken)


def _run(
    backbone: Any, ids: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
) -> None:
    """A pass in which the first token of each row is at position 0 however it is padded."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    takes = "position_ids" in inspect.signature(backbone.forward).parameters
    placed = {"position_ids": positions} if takes else {}
    backbone(input_ids=ids, attention_mask=mask.long(), use_cache=False, **placed)
