"""Greedy decoding token by token, of prompts in one reading or in several.

Rows that have ended leave the batch where only keys and values are kept of them; transformers'
`generate` keeps them until the longest answer ends. `obstacle` says whether a model can take a mask
that is no plain batch's.
"""

import sys
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dcr.core import passes
from dcr.core.generation import finite
from dcr.core.machine import padded
from dcr.core.models import structure
from dcr.core.models.structure import unwrapped

Caches = AbstractContextManager[Callable[[], DynamicCache | None]]

MASKABLE = {"sdpa", "eager"}  # attention that adds any mask
# by one of these functions a model's code keeps padding out of its states
MASKING = {"apply_mask_to_padding_states", "create_recurrent_attention_mask"}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
ENDED = 1 / 8  # share of ended rows from which a copy of the others' cache is worth its cost


@runtime_checkable
class Caching(Protocol):
    """Passes with caches of their own."""

    def caching(self, model: Any) -> Caches:
        """See `caching`."""
        ...


def caching(model: Any) -> Caches:
    """A context around the decoding of a batch, with what makes its empty caches.

    A model that brings its own kind of cache gets None.
    """
    given = passes.current()
    if isinstance(given, Caching):
        return given.caching(model)
    return nullcontext(partial(empty_cache, model))


def empty_cache(model: Any) -> DynamicCache | None:
    """An empty cache of keys and values; None for a model that brings its own kind."""
    owner: Any = unwrapped(model)
    takes_any = getattr(owner, "_supports_default_dynamic_cache", bool)()
    if not takes_any or "mamba" in type(owner).__name__.lower():
        return None
    return DynamicCache(config=passes.text_config(model))


def per_row(model: Any) -> bool:
    """Whether an open edit depends on the row or on what is its prompt.

    A prompt must then be read in one pass, and `keep_rows` be told of rows that leave the batch.
    """
    return bool(_by_row(model))


def keep_rows(model: Any, places: Int[Tensor, "rows"]) -> None:
    """Tells open edits that depend on the row which rows of the batch stay, in their new order."""
    for session in _by_row(model):
        session.keep_rows(places)


def _by_row(model: Any) -> list[Any]:
    hooks = structure.backbone(model)._forward_pre_hooks.values()
    return [session for session in hooks if getattr(session, "per_row", False)]


def together(model: Any, lengths: Sequence[Hashable]) -> list[list[int]]:
    """Groups of places of rows that one pass may pad on the left: all, or those of one length.

    Rows of one length need no padding, which the states of models without a mask absorb, as RWKV.
    """
    masks = MASKING & vars(sys.modules[type(unwrapped(model)).__module__]).keys()
    if masks or not passes.recurrent(model):
        return [[*range(len(lengths))]]
    return [[i for i, own in enumerate(lengths) if own == each] for each in dict.fromkeys(lengths)]


def obstacle(model: Any, tokens: int) -> str | None:
    """The reason why a model cannot take a tree mask over `tokens` positions; None if it can."""
    text = passes.text_config(model)
    if passes.recurrent(model):
        return "not all of its layers are attention over all keys"
    if text._attn_implementation not in MASKABLE:
        return f"its attention is {text._attn_implementation}"
    if "position_ids" not in passes.parameters(model) or getattr(text, "alibi", False):
        return "its positions cannot be set"
    kinds = getattr(text, "layer_types", None)
    windows = [getattr(text, name, None) for name in WINDOWS]
    windowed = kinds is None or bool(passes.WINDOWED & set(kinds))
    if windowed and any(isinstance(window, int) and tokens >= window for window in windows):
        return f"{tokens} tokens do not fit its attention window"
    return None


@dataclass(frozen=True)
class Context:
    """One reading of a batch of prompts, up to the newest token.

    The ids are padded on the left; the mask is the cache's (`passes.Prefilled`). The cache is None
    if the model takes none, and then reads all tokens again.
    """

    ids: Int[Tensor, "rows width"]
    mask: Bool[Tensor, "rows width"]
    cache: Any
    logits: Float[Tensor, "rows vocabulary"]  # behind the newest token, in fp32


def decoded(
    model: Any,
    readings: Sequence[tuple[Sequence[Sequence[int]], float]],
    most: int,
    logits: Callable[[Sequence[Context]], Float[Tensor, "rows vocabulary"]],
    score: Callable[[Tensor], Tensor],
    is_over: Callable[[Sequence[int]], bool],
    streamer: Any = None,
    scored: int = 1,
) -> tuple[list[list[int]], Float[Tensor, "rows scored"]]:
    """The greedy new tokens of each row, at most `most`, and `score` of the logits before them.

    Args:
        readings: each reading of the prompts, and its number of new tokens; the first one is read
            to the end.
        logits: gives the logits to decode from the contexts that are still read.
        is_over: whether an answer ends with the last of these tokens.
        scored: the number of new tokens that have a score; one behind the end means nothing.

    Raises ConfigError for a score that is not finite.
    """
    lengths = list(zip(*(map(len, prompts) for prompts, _ in readings), strict=True))
    groups = together(model, lengths)
    if len(groups) > 1:
        answer = partial(
            decoded, model, most=most, logits=logits, score=score, is_over=is_over,
            streamer=streamer, scored=scored,
        )  # fmt: skip
        return _in_groups(groups, readings, answer)
    with torch.inference_mode(), caching(model) as cache:
        contexts = [_read(model, prompts, cache) for prompts, _ in readings]
        ends = [end for _, end in readings]  # of those that are still read
        answers: list[list[int]] = [[] for _ in readings[0][0]]
        rows = list(range(len(answers)))  # those in the batch
        under_way = set(rows)
        scores, values = logits(contexts), torch.full((len(rows), scored), torch.nan)
        if streamer is not None:
            streamer.put(contexts[0].ids.cpu())
        for tokens in range(1, most + 1):
            if tokens <= scored:
                values[rows, tokens - 1] = finite(score(scores).float().cpu())
            newest = scores.argmax(1)
            if streamer is not None:
                streamer.put(newest.cpu())
            for row, token in zip(rows, newest.tolist(), strict=True):
                if row in under_way:
                    answers[row].append(token)
                    if tokens == most or is_over(answers[row]):
                        under_way.remove(row)
            if not under_way:
                break
            contexts = [c for c, end in zip(contexts, ends, strict=True) if tokens < end]
            ends = [end for end in ends if tokens < end]
            if len(under_way) <= (1 - ENDED) * len(rows) and _may_leave(model, contexts):
                staying = [place for place, row in enumerate(rows) if row in under_way]
                rows = [rows[place] for place in staying]
                places = torch.tensor(staying, device=newest.device)
                newest = newest[places]
                contexts = [_selected(context, places) for context in contexts]
                keep_rows(model, places)
            contexts = [_stepped(model, context, newest) for context in contexts]
            scores = logits(contexts)
        if streamer is not None:
            streamer.end()
        return answers, values


def _in_groups(
    groups: Sequence[Sequence[int]],
    readings: Sequence[tuple[Sequence[Sequence[int]], float]],
    answer: Callable[[Any], tuple[list[list[int]], Float[Tensor, "rows scored"]]],
) -> tuple[list[list[int]], Float[Tensor, "rows scored"]]:
    """The result of `answer` for each group of places in the batch, in the order of the batch."""
    found: dict[int, tuple[list[int], Tensor]] = {}
    for group in groups:
        of_group = [([prompts[place] for place in group], end) for prompts, end in readings]
        found |= dict(zip(group, zip(*answer(of_group), strict=True), strict=True))
    rows = [found[place] for place in sorted(found)]
    return [ids for ids, _ in rows], torch.stack([values for _, values in rows])


def _may_leave(model: Any, contexts: Sequence[Context]) -> bool:
    """Whether some rows can be taken out of all that the model keeps of the batch."""
    kept = [context.cache for context in contexts if context.cache is not None]
    of_keys = all(
        isinstance(cache, DynamicCache) and all(isinstance(i, DynamicLayer) for i in cache.layers)
        for cache in kept
    )
    # an edit that depends on the row knows the rows of one reading
    return of_keys and (len(contexts) == 1 or not per_row(model))


def _read(
    model: Any, prompts: Sequence[Sequence[int]], cache: Callable[[], DynamicCache | None]
) -> Context:
    keep = not passes.parameters(model).isdisjoint(passes.CACHES)
    read = passes.current().read(model, prompts, keep=keep, cache=cache() if keep else None)
    ids = padded(prompts, 0, left=True).to(model.device)
    return Context(ids, read.mask.bool(), read.cache, read.logits[:, -1].float())


def _stepped(model: Any, context: Context, newest: Int[Tensor, "rows"]) -> Context:
    """The context once its newest token has passed through the model."""
    taken = passes.parameters(model)
    ids = torch.cat([context.ids, newest[:, None]], 1)
    mask = torch.cat([context.mask, torch.ones_like(context.mask[:, :1])], 1)
    new = ids if context.cache is None else newest[:, None]
    state = context.cache is not None and passes.CACHES[0] not in taken
    seen = mask[:, -1:] if state else mask  # a state knows of no padding before its newest token
    places = passes.positions(mask)[:, -new.shape[1] :]
    options = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    output = passes.forward(model, new, seen.long(), places, context.cache, options)
    cache = next((output[name] for name in passes.CACHES if name in taken), None)
    return Context(ids, mask, cache, output.logits[:, -1].float())


def _selected(context: Context, places: Int[Tensor, "rows"]) -> Context:
    """The context of these rows alone; the cache drops the others."""
    if context.cache is not None:
        context.cache.batch_select_indices(places)
    return Context(context.ids[places], context.mask[places], context.cache, context.logits[places])
