"""Prompts as a model reads them before it answers: what all of them begin with is read once.

A chat template begins every prompt with the same tokens. Their keys and values are those of each
row; the rests of the prompts, padded on the left, run behind them.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from dcr.core import activations, batching, models
from dcr.core.batching import attention_mask, padded
from dcr.core.config import ConfigError
from dcr.core.generation.cache import ATTENTION, FirstLayer, roomy_cache
from dcr.core.models import unwrapped

MASKABLE = {"sdpa", "eager", ATTENTION}  # attention that adds whatever mask it is given
WINDOWED = {"sliding_attention", "chunked_attention"}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
CACHES = ("past_key_values", "cache_params")
BY_LENGTH = {"dynamic", "longrope"}  # rotations that depend on how much a pass reads
WORTHWHILE = 8  # tokens; a pass of one row for fewer of them costs what it saves


@dataclass(frozen=True)
class Prefilled:
    """Prompts as the model has read them: their cache and the logits at their last positions.

    The mask is the cache's: padding lies between what all rows share and the rest of each.
    """

    cache: Any
    mask: Int[Tensor, "batch length"]
    logits: Float[Tensor, "batch 1 vocabulary"]


def obstacle(model: Any, tokens: int) -> str | None:
    """Why a model cannot take a tree mask over `tokens` positions; None where it can."""
    text = text_config(model)
    if recurrent(model):
        return "not all of its layers are attention over all keys"
    if text._attn_implementation not in MASKABLE:
        return f"its attention is {text._attn_implementation}"
    if "position_ids" not in _parameters(model) or getattr(text, "alibi", False):
        return "its positions cannot be set"
    kinds = getattr(text, "layer_types", None)
    windows = [getattr(text, name, None) for name in WINDOWS]
    windowed = kinds is None or bool(WINDOWED & set(kinds))
    if windowed and any(isinstance(window, int) and tokens >= window for window in windows):
        return f"{tokens} tokens do not fit its attention window"
    return None


def recurrent(model: Any) -> bool:
    """Whether some layer keeps a state instead of keys, into which padding would blend."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    stateful = getattr(unwrapped(model), "_is_stateful", False)
    keyless = CACHES[0] not in _parameters(model)
    return stateful or bool(kinds - WINDOWED - {"full_attention"}) or keyless


def shared(model: Any, prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens of these prompts are read once, so that each keeps one of its own.

    0 where they are few, where a model keeps more than keys and values or has a window, which
    would count the padding, and where an edit looks at rows or prompts as a whole.
    """
    if len(prompts) < 2:
        return 0
    least, greatest = min(map(tuple, prompts)), max(map(tuple, prompts))  # alike as all are
    pairs = zip(least, greatest, strict=False)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(least))
    alike = min(alike, min(map(len, prompts)) - 1)
    rotated = getattr(text_config(model), "rope_parameters", None) or {}
    apart = (
        alike < WORTHWHILE
        or obstacle(model, batching.UNLIMITED) is not None
        or roomy_cache(model) is None
        or rotated.get("rope_type") in BY_LENGTH
        or activations.per_row(model)
    )
    return 0 if apart else alike


def prefill(
    model: Any, prompts: Sequence[Sequence[int]], keep: bool = True, cache: Any = None
) -> Prefilled:
    """Reads prompts, padded on the left, with logits for their last positions alone.

    Without `keep` no cache is made for those who go no further; else an empty `cache` is filled.
    """
    device, rows, once = unwrapped(model).device, len(prompts), shared(model, prompts)
    ids = padded(prompts, 0, left=True).to(device)
    mask = attention_mask([ids[once:] for ids in prompts], left=True).long().to(device)
    options: dict[str, int] = {"use_cache": keep or once > 0}
    if "logits_to_keep" in _parameters(model):
        options["logits_to_keep"] = 1
    if once:
        cache = DynamicCache(config=text_config(model)) if cache is None else cache
        if not keep:  # or those who go no further would hold keys and values of every block
            cache.layers = [FirstLayer() for _ in cache.layers]
        backbone, first = models.backbone(model), torch.tensor([prompts[0][:once]], device=device)
        placed = batching.placed(backbone, torch.arange(once, device=device)[None])
        seen = torch.ones_like(first)
        backbone(
            input_ids=first, attention_mask=seen, past_key_values=cache, use_cache=True, **placed
        )
        layers: list[Any] = cache.layers
        for layer in layers:
            of_one = layer.keys, layer.values
            layer.keys, layer.values = (kept.expand(rows, -1, -1, -1) for kept in of_one)
        mask = torch.cat([mask.new_ones(rows, once), mask], 1)
    places = batching.positions(mask)[:, once:]
    # of a shorter row these ids are what it shares, masked as padding is
    output = forward(model, ids[:, once:], mask, places, cache, options)
    return Prefilled(output[cache_name(model)] if keep else None, mask, output.logits[:, -1:])


def forward(
    model: Any, ids: Tensor, mask: Tensor, places: Tensor, cache: Any, options: dict[str, int]
) -> Any:
    """A model's output for new tokens at these places behind what the cache holds."""
    placed = batching.placed(unwrapped(model), places)
    kept = {} if cache is None else {cache_name(model): cache}
    given = {"use_cache": True} | placed | kept | options
    return model(input_ids=ids, attention_mask=mask, return_dict=True, **given)


def text_config(model: Any) -> Any:
    """The configuration of the decoder of text."""
    return unwrapped(model).config.get_text_config(decoder=True)


def cache_name(model: Any) -> str:
    """The argument by which a model is given its cache; ConfigError where it keeps none."""
    name = next((name for name in CACHES if name in _parameters(model)), None)
    if name is None:
        kind = type(unwrapped(model)).__name__
        raise ConfigError(
            f"model.name: {kind} keeps no cache to continue a prompt from; drop refusal_probability"
        )
    return name


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(unwrapped(model).forward).parameters)
