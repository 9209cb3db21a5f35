"""Keys and values of a decoding batch, and the attention of one new token a row to them.

transformers concatenates old and new ones with every token; this cache writes them into room made
ahead. On a CPU the keys are transposed, as a product with a single query reads them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dcr.core import passes
from dcr.core.models.structure import unwrapped
from dcr.decoding import MASKABLE, empty_cache
from dcr.fast import packing

ROOM = 64  # tokens
ATTENTION = "dcr_step"  # its name in transformers


class RoomyLayer(DynamicLayer):
    """Keys and values are views of the room; after a change from outside it makes a new one."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.rooms: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        first = not self.get_seq_length()
        self.keys = self._joined(0, self.keys, key_states)
        self.values = self._joined(1, self.values, value_states)
        return (key_states, value_states) if first else (self.keys, self.values)

    def _joined(
        self, which: int, held: Tensor | None, new: Float[Tensor, "batch heads tokens width"]
    ) -> Float[Tensor, "batch heads length width"]:
        start = held.shape[-2] if held is not None and held.numel() else 0
        end, room = start + new.shape[-2], self.rooms[which]
        same = held is not None and room is not None and room.data_ptr() == held.data_ptr()
        if room is None or not same or room.shape[-2] < end or room.shape[:-2] != new.shape[:-2]:
            *outer, _, width = new.shape
            if self.transposed and which == 0:
                room = new.new_empty(*outer, width, end + ROOM).mT
            else:
                room = new.new_empty(*outer, end + ROOM, width)
            if held is not None and start:
                room[..., :start, :] = held
            self.rooms[which] = room
        room[..., start:end, :] = new
        return room[..., :end, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps only the rows at these places; keys stay transposed."""
        if self.transposed and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.mT[indices].mT, self.values[indices]
        else:
            super().batch_select_indices(indices)


class PrefixLayer(DynamicLayer):
    """Keeps the first keys and values; later ones are concatenated and not kept."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return super().update(key_states, value_states)
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def roomy_cache(model: Any) -> DynamicCache | None:
    """An empty cache; None for a model that brings its own kind."""
    cache = empty_cache(model)
    if cache is not None:
        transposed = passes.text_config(model)._attn_implementation == ATTENTION
        cache.layers = [
            RoomyLayer(transposed) if type(layer) is DynamicLayer else layer
            for layer in cache.layers
        ]
    return cache


@contextmanager
def decoding_attention(model: Any) -> Iterator[None]:
    """Replaces torch's sdpa by `attention` in a model on a CPU while open."""
    owner: Any = unwrapped(model)
    text = owner.config.get_text_config(decoder=True)
    known = getattr(owner, "_supports_attention_backend", False)
    if owner.device.type != "cpu" or not known or text._attn_implementation != "sdpa":
        yield
        return
    with packing.attending(owner, ATTENTION):
        yield


def attention(
    module: nn.Module,
    query: Float[Tensor, "rows heads new width"],
    key: Float[Tensor, "rows kept length width"],
    value: Float[Tensor, "rows kept length other"],
    attention_mask: Bool[Tensor, "rows 1 new length"] | None,
    *,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "rows new heads other"], None]:
    """Attention of one new token a row, with heads that share keys in one product; fp32 softmax.

    torch's kernel, which is made for many queries, takes nearly twice as long on a CPU. It still
    computes more than one token, and masks and biases of other kinds.
    """
    rows, heads, new, width = query.shape
    mask = attention_mask
    masked = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    if new > 1 or not masked or options.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, mask, scaling=scaling, **options)
    scores = query.reshape(rows, key.shape[1], -1, width) @ key.mT
    wide = torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide) * (width**-0.5 if scaling is None else scaling)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    mixed = scores.softmax(-1).to(value.dtype) @ value
    return mixed.view(rows, 1, heads, -1), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
MASKABLE.add(ATTENTION)
