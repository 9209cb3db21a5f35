"""Greedy decoding in which the next prompt takes the place of one that has ended.

A batch decoded as a whole carries the rows that have ended along until its longest answer ends.
Here they leave the key-value cache and waiting prompts enter it (continuous batching: Yu et al.,
"Orca", OSDI 2022), with the model's own attention: rows of unequal length are padded on the left.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from dcr.generation.completions import Completion, Encoded, completion
from dcr.models import Policy, unwrapped
from dcr.prompts import ChatFormat, attention_mask, padded
from dcr.sources import Example

# Share of ended rows from which on the batch is rebuilt: each time copies the cache and, where
# prompts wait, reads them in a forward pass of their own.
ENDED_SHARE = 1 / 8


@dataclass
class Row:
    """A prompt being answered."""

    example: Example
    mass: float
    answer: list[int] = field(default_factory=list)
    ended: bool = False


@dataclass(frozen=True)
class Batch:
    """Rows decoded together; the cache and every tensor hold them in this order."""

    rows: list[Row]
    cache: DynamicCache
    mask: Bool[Tensor, "rows width"]  # where the cache holds a token of the row
    last: Int[Tensor, "rows"]  # the newest token, which is not in the cache yet


def is_possible(model: Any) -> bool:
    """Whether rows can leave and enter this model's cache: full attention in every block.

    Sliding windows and recurrent states are cut relative to the batch, so rows cannot move.
    """
    owner = unwrapped(model)
    accepted = inspect.signature(owner.forward).parameters
    needed = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")
    kinds = getattr(owner.config.get_text_config(decoder=True), "layer_types", None) or []
    if any(name not in accepted for name in needed) or set(kinds) - {"full_attention"}:
        return False
    layers = DynamicCache(config=owner.config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def answers(
    policy: Policy,
    chat: ChatFormat,
    encoded: Sequence[Encoded],
    size: int,
    max_new_tokens: int,
    score: Callable[[Tensor], Tensor],
) -> Iterator[list[Completion]]:
    """The answers to all prompts as they end, with at most `size` under way at once.

    Prompts enter in order. The tokens are those of each prompt alone, up to rounding.
    """
    waiting, batch = list(encoded), None
    while waiting or batch:
        if batch is None or sum(row.ended for row in batch.rows) >= _due(batch):
            batch = _kept(batch) if batch else None
            room = size - len(batch.rows) if batch else size
            entering, waiting = waiting[:room], waiting[room:]
            if not entering:
                continue
            heard = _read(policy, chat, entering, score)
            batch = _joined(batch, heard) if batch else heard
        else:
            batch = heard = _stepped(policy, batch)
        ending = _heard(heard, chat.stop, max_new_tokens)
        if ending:
            yield [completion(chat, row.example, row.answer, row.mass) for row in ending]


def _due(batch: Batch) -> float:
    return max(1, ENDED_SHARE * len(batch.rows))


def _heard(batch: Batch, stop: Sequence[int], limit: int) -> list[Row]:
    """Adds the newest token to each answer and returns those that end with it."""
    ending = []
    for row, token in zip(batch.rows, batch.last.tolist(), strict=True):
        if row.ended:
            continue
        row.answer.append(token)
        row.ended = token in stop or len(row.answer) >= limit
        if row.ended:
            ending.append(row)
    return ending


@torch.inference_mode()
def _read(
    policy: Policy,
    chat: ChatFormat,
    entering: Sequence[Encoded],
    score: Callable[[Tensor], Tensor],
) -> Batch:
    """A batch of fresh prompts with the first token of each answer."""
    prompts = [ids for _, ids in entering]
    device = policy.model.device
    ids = padded(prompts, chat.stop[0], left=True).to(device)
    mask = attention_mask(prompts, left=True).to(device)
    cache = DynamicCache(config=unwrapped(policy.model).config)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = _logits(policy, ids, mask, positions, cache)
    masses = score(logits).tolist()
    rows = [Row(row, mass) for (row, _), mass in zip(entering, masses, strict=True)]
    return Batch(rows, cache, mask, logits.argmax(1))


@torch.inference_mode()
def _stepped(policy: Policy, batch: Batch) -> Batch:
    """The batch with one more token a row; what ended rows still say is masked and not heard."""
    alive = torch.tensor([[not row.ended] for row in batch.rows], device=batch.mask.device)
    mask = torch.cat([batch.mask, alive], 1)
    positions = mask.sum(1, keepdim=True) - 1
    logits = _logits(policy, batch.last[:, None], mask, positions, batch.cache)
    return replace(batch, mask=mask, last=logits.argmax(1))


def _logits(
    policy: Policy,
    ids: Int[Tensor, "rows new"],
    mask: Bool[Tensor, "rows width"],
    positions: Int[Tensor, "rows new"],
    cache: DynamicCache,
) -> Float[Tensor, "rows vocabulary"]:
    """Logits behind the last of the new tokens, in fp32; the cache then holds those tokens."""
    output = policy.model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1].float()


@torch.inference_mode()
def _kept(batch: Batch) -> Batch | None:
    """The rows that have not ended, without the columns that only ended ones needed."""
    places = [i for i, row in enumerate(batch.rows) if not row.ended]
    if not places:
        return None
    index = torch.tensor(places, device=batch.mask.device)
    mask = batch.mask[index]
    first = int(mask.any(0).int().argmax())
    for layer in _layers(batch.cache):
        layer.keys = layer.keys[index, :, first:]
        layer.values = layer.values[index, :, first:]
    return Batch([batch.rows[i] for i in places], batch.cache, mask[:, first:], batch.last[index])


@torch.inference_mode()
def _joined(batch: Batch, fresh: Batch) -> Batch:
    """Both batches as one, the narrower padded on the left."""
    width = max(batch.mask.shape[1], fresh.mask.shape[1])
    for ours, theirs in zip(_layers(batch.cache), _layers(fresh.cache), strict=True):
        ours.keys = torch.cat([_widened(x, width) for x in (ours.keys, theirs.keys)])
        ours.values = torch.cat([_widened(x, width) for x in (ours.values, theirs.values)])
    masks = [F.pad(b.mask, (width - b.mask.shape[1], 0)) for b in (batch, fresh)]
    last = torch.cat([batch.last, fresh.last])
    return Batch([*batch.rows, *fresh.rows], batch.cache, torch.cat(masks), last)


def _layers(cache: DynamicCache) -> list[Any]:
    """DynamicLayer each, as `is_possible` made sure: keys and values [rows, heads, tokens, width].

    transformers' own type is a union with layers that have no keys.
    """
    return list(cache.layers)


def _widened(states: Float[Tensor, "rows heads tokens channels"], width: int) -> Tensor:
    return F.pad(states, (0, 0, width - states.shape[2], 0))
