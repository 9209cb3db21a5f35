"""Greedy decoding token by token, from one or two readings of each prompt.

Rows that have ended leave the batch where only keys and values are kept of them; transformers'
`generate` keeps them until the longest answer ends.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from dcr.core import passes
from dcr.core.models import Policy, unwrapped
from dcr.core.passes import padded

ENDED = 1 / 8  # share of ended rows from which a copy of the others' cache is worth its cost
KEYS, STATE = passes.CACHES  # arguments by which a model takes keys and values, or a state


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
    policy: Policy,
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
    """
    taken = inspect.signature(unwrapped(policy.model).forward).parameters.keys()
    with torch.inference_mode(), passes.current().decoding(policy.model):
        contexts = [_read(policy, taken, prompts) for prompts, _ in readings]
        answers: list[list[int]] = [[] for _ in readings[0][0]]
        rows = list(range(len(answers)))  # those in the batch
        under_way = set(rows)
        scores, values = logits(contexts), torch.full((len(rows), scored), torch.nan)
        if streamer is not None:
            streamer.put(contexts[0].ids.cpu())
        for tokens in range(1, most + 1):
            if tokens <= scored:
                values[rows, tokens - 1] = score(scores).float().cpu()
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
            contexts = [c for c, (_, end) in zip(contexts, readings, strict=False) if tokens < end]
            if len(under_way) <= (1 - ENDED) * len(rows) and _may_leave(policy, contexts):
                staying = [place for place, row in enumerate(rows) if row in under_way]
                rows = [rows[place] for place in staying]
                places = torch.tensor(staying, device=newest.device)
                newest = newest[places]
                contexts = [_selected(context, places) for context in contexts]
            contexts = [_stepped(policy, taken, context, newest) for context in contexts]
            scores = logits(contexts)
        if streamer is not None:
            streamer.end()
        return answers, values


def _may_leave(policy: Policy, contexts: Sequence[Context]) -> bool:
    """Whether some rows can be taken out of all that the model keeps of the batch."""
    kept = [context.cache for context in contexts if context.cache is not None]
    of_keys = all(
        isinstance(cache, DynamicCache) and all(isinstance(i, DynamicLayer) for i in cache.layers)
        for cache in kept
    )
    return of_keys and not passes.per_row(policy.model)


def _read(policy: Policy, taken: Collection[str], prompts: Sequence[Sequence[int]]) -> Context:
    model, current = policy.model, passes.current()
    keep = KEYS in taken or STATE in taken
    cache = current.cache(model) if keep else None
    read = current.read(model, prompts, keep=keep, cache=cache)
    ids = padded(prompts, 0, left=True).to(model.device)
    return Context(ids, read.mask.bool(), read.cache, read.logits[:, -1].float())


def _stepped(
    policy: Policy, taken: Collection[str], context: Context, newest: Int[Tensor, "rows"]
) -> Context:
    """The context once its newest token has passed through the model."""
    ids = torch.cat([context.ids, newest[:, None]], 1)
    mask = torch.cat([context.mask, torch.ones_like(context.mask[:, :1])], 1)
    new = ids if context.cache is None else newest[:, None]
    state = context.cache is not None and KEYS not in taken
    seen = mask[:, -1:] if state else mask  # a state knows of no padding before its newest token
    places = passes.positions(mask)[:, -new.shape[1] :]
    options = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
    output = passes.forward(policy.model, new, seen.long(), places, context.cache, options)
    cache = next((output[name] for name in passes.CACHES if name in taken), None)
    return Context(ids, mask, cache, output.logits[:, -1].float())


def _selected(context: Context, places: Int[Tensor, "rows"]) -> Context:
    """The context of these rows alone; the cache drops the others."""
    if context.cache is not None:
        context.cache.batch_select_indices(places)
    return Context(context.ids[places], context.mask[places], context.cache, context.logits[places])
