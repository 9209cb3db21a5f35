"""Greedy decoding token by token, from one or two readings of each prompt.

Rows that have ended leave the batch; transformers' `generate` keeps them until the longest answer
ends.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from dcr.core import batching, passes
from dcr.core.batching import padded
from dcr.core.models import Policy, unwrapped

NEEDED = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")
ENDED = 1 / 8  # share of ended rows from which a copy of the others' cache is worth its cost


@dataclass(frozen=True)
class Context:
    """One reading of a batch of prompts, up to the newest token.

    The ids are padded on the left; the mask is the cache's (`passes.Prefilled`).
    """

    ids: Int[Tensor, "rows width"]
    mask: Bool[Tensor, "rows width"]
    cache: Cache
    logits: Float[Tensor, "rows vocabulary"]  # behind the newest token, in fp32


def lacking(model: Any) -> str | None:
    """The first argument needed here that a model's `forward` does not take."""
    accepted = inspect.signature(unwrapped(model).forward).parameters
    return next((name for name in NEEDED if name not in accepted), None)


def is_possible(model: Any) -> bool:
    """Whether rows decode as under `generate`, since the model keeps only keys and values."""
    return lacking(model) is None and _rows_may_leave(passes.current().cache(model))


def _rows_may_leave(cache: Cache | None) -> bool:
    return isinstance(cache, DynamicCache) and all(
        isinstance(layer, DynamicLayer) for layer in cache.layers
    )


def decoded(
    policy: Policy,
    readings: Sequence[tuple[Sequence[Sequence[int]], float]],
    most: int,
    logits: Callable[[Sequence[Context]], Float[Tensor, "rows vocabulary"]],
    score: Callable[[Tensor], Tensor],
    is_over: Callable[[Sequence[int]], bool],
    streamer: Any = None,
) -> tuple[list[list[int]], Tensor]:
    """The greedy new tokens of each row, at most `most`, and `score` of the first logits.

    Args:
        readings: each reading of the prompts, and its number of new tokens; the first one is read
            to the end.
        logits: gives the logits to decode from the contexts that are still read.
        is_over: whether an answer ends with the last of these tokens.
    """
    with torch.inference_mode(), passes.current().decoding(policy.model):
        contexts = [_read(policy, prompts) for prompts, _ in readings]
        answers: list[list[int]] = [[] for _ in readings[0][0]]
        rows = list(range(len(answers)))  # those in the batch
        under_way = set(rows)
        scores = logits(contexts)
        masses = score(scores)
        if streamer is not None:
            streamer.put(contexts[0].ids.cpu())
        while True:
            newest = scores.argmax(1)
            if streamer is not None:
                streamer.put(newest.cpu())
            for row, token in zip(rows, newest.tolist(), strict=True):
                answer = answers[row]
                if row not in under_way:
                    continue
                answer.append(token)
                if len(answer) == most or is_over(answer):
                    under_way.remove(row)
            if not under_way:
                break
            tokens = max(map(len, answers))
            contexts = [c for c, (_, end) in zip(contexts, readings, strict=False) if tokens < end]
            if len(under_way) <= (1 - ENDED) * len(rows) and _may_leave(policy, contexts):
                staying = [place for place, row in enumerate(rows) if row in under_way]
                rows = [rows[place] for place in staying]
                places = torch.tensor(staying, device=newest.device)
                newest = newest[places]
                contexts = [_selected(context, places) for context in contexts]
            contexts = [_stepped(policy, context, newest) for context in contexts]
            scores = logits(contexts)
        if streamer is not None:
            streamer.end()
        return answers, masses


def _may_leave(policy: Policy, contexts: Sequence[Context]) -> bool:
    return all(_rows_may_leave(c.cache) for c in contexts) and not passes.per_row(policy.model)


def _read(policy: Policy, prompts: Sequence[Sequence[int]]) -> Context:
    ids = padded(prompts, 0, left=True).to(policy.model.device)
    current = passes.current()
    read = current.read(policy.model, prompts, cache=current.cache(policy.model))
    return Context(ids, read.mask.bool(), read.cache, read.logits[:, -1].float())


def _stepped(policy: Policy, context: Context, newest: Int[Tensor, "rows"]) -> Context:
    """The context once its newest token has passed through the model."""
    ids = torch.cat([context.ids, newest[:, None]], 1)
    mask = torch.cat([context.mask, torch.ones_like(context.mask[:, :1])], 1)
    output = policy.model(
        input_ids=newest[:, None],
        attention_mask=mask.long(),
        position_ids=batching.positions(mask)[:, -1:],
        past_key_values=context.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Context(ids, mask, output.past_key_values, output.logits[:, -1].float())


def _selected(context: Context, places: Int[Tensor, "rows"]) -> Context:
    """The context of these rows alone; the cache drops the others."""
    context.cache.batch_select_indices(places)
    return Context(context.ids[places], context.mask[places], context.cache, context.logits[places])
