"""Keys and values of a decoding batch, written into room that is made ahead.

transformers joins old and new ones anew with every token, which on a CPU takes as long as the
model itself.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from dcr.models import unwrapped

ROOM = 64  # tokens


class RoomyLayer(DynamicLayer):
    """Keys and values are views of the room; after a change from outside it is made anew."""

    def __init__(self) -> None:
        super().__init__()
        self.rooms: list[Tensor | None] = [None, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.keys = self._joined(0, self.keys, key_states)
        self.values = self._joined(1, self.values, value_states)
        return self.keys, self.values

    def _joined(
        self, which: int, held: Tensor | None, new: Float[Tensor, "batch heads tokens width"]
    ) -> Float[Tensor, "batch heads length width"]:
        start = held.shape[-2] if held is not None and held.numel() else 0
        end, room = start + new.shape[-2], self.rooms[which]
        same = held is not None and room is not None and room.data_ptr() == held.data_ptr()
        if room is None or not same or room.shape[-2] < end or room.shape[:-2] != new.shape[:-2]:
            room = new.new_empty(*new.shape[:-2], end + ROOM, new.shape[-1])
            if held is not None and start:
                room[..., :start, :] = held
            self.rooms[which] = room
        room[..., start:end, :] = new
        return room[..., :end, :]


def roomy_cache(model: Any) -> DynamicCache | None:
    """An empty cache; None for a model that brings its own kind."""
    owner: Any = unwrapped(model)
    takes_any = getattr(owner, "_supports_default_dynamic_cache", bool)()
    if not takes_any or "mamba" in type(owner).__name__.lower():
        return None
    cache = DynamicCache(config=owner.config.get_text_config(decoder=True))
    plain = [type(layer) is DynamicLayer for layer in cache.layers]
    cache.layers = [
        RoomyLayer() if own else layer for own, layer in zip(plain, cache.layers, strict=True)
    ]
    return cache
