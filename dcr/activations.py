"""Reads and edits blocks at their sites, and says which tokens states behind them lead to.

Sites are found by structure, not by family. HF's `hidden_states[ℓ]` is the output of block ℓ for
every ℓ below the depth; after the last block HF applies the final norm and this module does not.
"""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from enum import Enum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dcr import decoding
from dcr.core import passes
from dcr.core.config import ConfigError
from dcr.core.models import structure
from dcr.core.models.training import head_arguments, trunk


class Site(Enum):
    """A tensor [batch, length, width] of a block.

    The outputs of attention and MLP are what these modules return, before anything is added to
    them, and before the norm that some families put behind them (Gemma 2, OLMo 2). In parallel
    blocks (GPT-NeoX, Phi) both are added to the block's input at once. The input of block ℓ + 1 is
    the output of block ℓ.
    """

    block_input = "block_input"
    block_output = "block_output"
    attention_output = "attention_output"
    mlp_output = "mlp_output"


# What transformers calls the two parts of a block.
PARTS = {
    Site.attention_output: ("self_attn", "attn", "attention", "self_attention", "linear_attn"),
    Site.mlp_output: ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe"),
}

Change = Callable[[Tensor], Tensor | None]


def hook(model: Any, site: Site, block: int, change: Change) -> RemovableHandle:
    """Lets `change` replace each tensor at the site by its result, until the handle is removed.

    A result of None leaves the tensor. `block` counts from 1. Raises ConfigError if a block has no
    such part.
    """
    module: nn.Module = structure.decoder_blocks(model)[block - 1]
    if site is Site.block_input:
        return module.register_forward_pre_hook(_on_input(change), with_kwargs=True)
    if site in PARTS:
        module = _part(model, module, site)
    return module.register_forward_hook(_on_output(change))


def _on_input(change: Change) -> Callable[..., Any]:
    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        new = change(given)
        if new is None:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    return before


def _on_output(change: Change) -> Callable[..., Any]:
    def after(_module: Any, _inputs: Any, output: Any) -> Any:
        whole = isinstance(output, tuple)
        new = change(output[0] if whole else output)
        if new is None:
            return None
        return (new, *output[1:]) if whole else new

    return after


def _part(model: Any, block: nn.Module, site: Site) -> nn.Module:
    parts = [child for name, child in block.named_children() if name in PARTS[site]]
    kind = type(structure.unwrapped(model)).__name__
    if len(parts) != 1:
        raise ConfigError(
            f"model.name: a block of {kind} has {len(parts)} parts named "
            f"{' or '.join(PARTS[site])}, not one; steering at its {site.value} is not possible"
        )
    # Bloom and MPT: the part's output is the sum already, and to edit it would edit both
    if "residual" in inspect.signature(parts[0].forward).parameters:
        raise ConfigError(
            f"model.name: {kind} adds the residual stream inside its {type(parts[0]).__name__}; "
            f"steering at its {site.value} is not possible"
        )
    return parts[0]


def states(
    model: Any,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    places: Int[Tensor, "batch places"],
    site: Site = Site.block_output,
    until: int | None = None,
) -> Float[Tensor, "blocks batch places width"]:
    """The hidden states at `places` (indices into the padded rows) of blocks 1 to `until`.

    `until` None reads all blocks. One forward pass without gradient, or one for each group that
    `decoding.together` gives, ends at block `until` and computes no logits. The states are fp32 on
    the device of the ids.
    """
    groups = decoding.together(model, mask.sum(1).tolist())
    if len(groups) > 1:
        parts = []
        for group in groups:
            own = mask[group[0]].bool()
            inside = places[group] - int(own.long().argmax())
            parts.append(
                states(model, ids[group][:, own], mask[group][:, own], inside, site, until)
            )
        order = torch.tensor([place for group in groups for place in group])
        return torch.cat(parts, 1)[:, order.argsort()]
    last = until or len(structure.decoder_blocks(model))
    by_block: list[Tensor] = []
    rows = torch.arange(len(ids))[:, None]

    def take(hidden: Tensor) -> None:
        here = hidden.device
        by_block.append(hidden[rows.to(here), places.to(here)].float().to(ids.device))

    with ExitStack() as stack, torch.no_grad():
        for block in range(1, last + 1):
            stack.callback(hook(model, site, block, take).remove)
        cut = trunk(model, last)
        # the first token of each row is at position 0 however it is padded
        placed = passes.placed(cut, passes.positions(mask))
        cut(input_ids=ids, attention_mask=mask.long(), use_cache=False, **placed)
    return torch.stack(by_block)


def head_logits(
    model: Any, hidden: Float[Tensor, "places width"]
) -> Float[Tensor, "places vocabulary"]:
    """The next-token logits of final-normed hidden states, in fp32."""
    parts = head_arguments(model)
    linear = F.linear(hidden, parts["head_weight"], parts["bias"]).float() * parts["logit_scale"]
    cap = parts["softcap"]
    return linear if cap is None else cap * torch.tanh(linear / cap)
