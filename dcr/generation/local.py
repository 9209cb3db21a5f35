"""Prompts answered by a model here: longest first, as many at once as fit, halved where not."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from dcr import activations
from dcr.config import DataError, GenConfig
from dcr.generation import contrastive_decoding, rolling, whole
from dcr.generation.completions import Completion, Encoded
from dcr.generation.memory import batch_size, is_out_of_memory
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.sources import Example

log = logging.getLogger(__name__)


def complete(
    policy: Policy,
    chat: ChatFormat,
    rows: Sequence[Example],
    settings: GenConfig,
    score: Callable[[Tensor], Tensor],
) -> Iterator[list[Completion]]:
    """Greedy completions of every row, as they end.

    Longest prompts first, so that running out of memory happens at once; at most half as many are
    then under way, and what was under way starts again. `settings.batch_size` is the most at once,
    None as many as the free memory holds. `score` maps first-token logits [prompts, vocabulary] to
    [prompts]: the logits that are decoded, so the contrasted ones with `settings.self_cd`.

    Raises DataError for a prompt longer than the model's context, and ConfigError where Self-CD
    cannot be done with the model or its template.
    """
    waiting = [(row, chat.prompt_ids(row.prompt)) for row in rows]
    waiting.sort(key=lambda pair: (-len(pair[1]), pair[0].id))
    if not waiting:
        return
    read = contrastive_decoding.emphasised(policy, chat, waiting) if settings.self_cd else waiting
    _check_context(policy, read, settings.max_new_tokens)
    longest = max(len(ids) for _, ids in read)
    size = settings.batch_size or _fitting(policy, longest, settings)
    log.info("%d prompts, the longest of %d tokens: %d at once", len(waiting), longest, size)
    done: Counter[tuple[str, str]] = Counter()
    while True:
        try:
            for batch in _decoded(policy, chat, waiting, size, settings, score):
                done.update((c.id, c.prompt) for c in batch)
                yield batch
            return
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        # out here, where the error no longer holds on to the tensors of its frames
        torch.cuda.empty_cache()
        waiting = _without(waiting, done)
        size = max(1, min(size, len(waiting)) // 2)
        log.warning("out of memory: gen.batch_size is now %d", size)


def _fitting(policy: Policy, longest: int, settings: GenConfig) -> int:
    """Prompts that the free memory holds; Self-CD keeps two caches for each."""
    fitting = batch_size(policy.model, longest, settings.max_new_tokens)
    return max(1, fitting // 2) if settings.self_cd else fitting


def _decoded(
    policy: Policy,
    chat: ChatFormat,
    waiting: Sequence[Encoded],
    size: int,
    settings: GenConfig,
    score: Callable[[Tensor], Tensor],
) -> Iterator[list[Completion]]:
    new = settings.max_new_tokens
    if settings.self_cd:
        weight = settings.self_cd
        return contrastive_decoding.batches(policy, chat, waiting, size, new, score, weight)
    # an edit with a factor for each row needs rows that keep their places
    fixed = activations.per_row(policy.model) or not rolling.is_possible(policy.model)
    decode = whole.batches if fixed else rolling.answers
    return decode(policy, chat, waiting, size, new, score)


def _without(encoded: Sequence[Encoded], done: Counter[tuple[str, str]]) -> list[Encoded]:
    """The rows not done yet; `done` counts ids with their prompts, and is used up."""
    left = []
    for row, ids in encoded:
        if done[row.id, row.prompt]:
            done[row.id, row.prompt] -= 1
        else:
            left.append((row, ids))
    return left


def _check_context(policy: Policy, encoded: Sequence[Encoded], new_tokens: int) -> None:
    text = policy.model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**30
    for row, ids in encoded:
        if len(ids) + new_tokens > context:
            raise DataError(
                f"{row.source}: {row.id}: its {len(ids)} tokens and {new_tokens} new ones exceed "
                f"the model's context of {context}; shorten it or lower gen.max_new_tokens"
            )
