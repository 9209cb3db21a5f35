"""Keys and values of a decoding batch, and how one new token a row looks at them.

transformers joins old and new ones anew with every token; here they are written into room that is
made ahead. On a CPU the keys lie across, as a product with a single query reads them.
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
from dcr.core.models import unwrapped
from dcr.fast import packing

ROOM = 64  # tokens
ATTENTION = "dcr_step"  # its name in transformers


class RoomyLayer(DynamicLayer):
    """Keys and values are views of the room; after a change from outside it is made anew."""

    def __init__(self, across: bool = False) -> None:
        super().__init__()
        self.across = across
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
            if self.across and which == 0:
                room = new.new_empty(*outer, width, end + ROOM).mT
            else:
                room = new.new_empty(*outer, end + ROOM, width)
            if held is not None and start:
                room[..., :start, :] = held
            self.rooms[which] = room
        room[..., start:end, :] = new
        return room[..., :end, :]

    def batch_select_indices(self, indices: Tensor) -> None:
        """The rows at these places alone, as they lie."""
        if self.across and self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys.mT[indices].mT, self.values[indices]
        else:
            super().batch_select_indices(indices)


class FirstLayer(DynamicLayer):
    """What it is given first is kept; what is joined to it later is not."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            return super().update(key_states, value_states)
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


def roomy_cache(model: Any) -> DynamicCache | None:
    """An empty cache; None for a model that brings its own kind."""
    cache = passes.Plain().cache(model)
    if cache is not None:
        across = passes.text_config(model)._attn_implementation == ATTENTION
        cache.layers = [
            RoomyLayer(across) if type(layer) is DynamicLayer else layer for layer in cache.layers
        ]
    return cache


@contextmanager
def stepping(model: Any) -> Iterator[None]:
    """While open, a model on a CPU looks back with `attention` where it did with torch's sdpa."""
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
    """Of one new token a row: the heads that share keys in one product; softmax in fp32.

    torch's kernel, which is made for many queries, takes nearly twice as long on a CPU. It is asked
    for more tokens than one, and for what is not known here.
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
passes.MASKABLE.add(ATTENTION)
