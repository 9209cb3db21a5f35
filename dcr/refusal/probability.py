"""The refusal probability P(x) = Σ_{y∈S} Π_t p(y_t | x, y_<t) (A.5), exact.

All phrases of S behind all prompts of a batch cost two passes: one over the prompts, one over the
token trie of S.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dcr import models
from dcr.models import unwrapped
from dcr.refusal import passes
from dcr.refusal.continuations import (
    Ending,
    PhraseError,
    Tokens,
    checked,
    continuations,
    ending,
)
from dcr.refusal.phrases import REFUSAL_PHRASES
from dcr.refusal.tries import Trie, trie

log = logging.getLogger(__name__)

MOST_PROMPTS = 64  # at once: larger batches are no faster
CPU_BYTES = 2**30  # for one batch where memory is everybody's
GPU_SHARE = 0.25  # of the memory that is free, for one batch

Probabilities = tuple[Float[Tensor, " prompts"], Float[Tensor, " prompts"]]


def refusal_probability(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    phrases: Sequence[str] | None = None,
    prefix_free: bool = False,
    batch_size: int | None = None,
) -> Float[Tensor, " prompts"]:
    """The probability that a transformers model begins its answer with a phrase of S.

    A prompt goes through the tokenizer's chat template, as a user's turn with the header of the
    answer behind it, or is taken bare where there is no template. `phrases` None stands for the
    paper's 31. A set of phrases: one given twice, or two of the same tokens, count once.

    The plain sum counts "I cannot fulfill" under "I cannot" as well and can exceed 1, as in the
    paper; `prefix_free` leaves out every phrase that another one begins, token by token, which
    makes it a probability.

    Raises PhraseError for phrases or prompts without tokens, and where a prompt's tokens change
    once a phrase follows.
    """
    if isinstance(prompts, str):
        raise PhraseError(f"prompts={prompts!r}: give a list of strings")
    chosen = checked(REFUSAL_PHRASES if phrases is None else phrases)
    read = [_templated(tokenizer, prompt) for prompt in prompts]
    ends = [ending(tokenizer, ids, text) for ids, text in read]
    begun = _begin(tokenizer) if not tokenizer.chat_template else ()
    encoded = [begun + ids for ids, _ in read]
    # outside of inference mode a clone is an ordinary tensor again
    return _scored(model, tokenizer, encoded, ends, chosen, batch_size)[prefix_free].clone()


def probabilities(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Sequence[int]],
    phrases: Sequence[str] = REFUSAL_PHRASES,
    batch_size: int | None = None,
) -> Probabilities:
    """The plain and the prefix-free refusal probability of prompts given as token ids.

    The ids end where the answer begins, as those of `ChatFormat.prompt_ids` do. Both results lie
    on the CPU, in the order of the prompts. `batch_size` None: as many as a fixed part of the
    memory holds.

    Raises PhraseError as `refusal_probability` does.
    """
    ids = [tuple(prompt) for prompt in encoded]
    ends = [ending(tokenizer, prompt) for prompt in ids]
    plain, free = _scored(model, tokenizer, ids, ends, checked(phrases), batch_size)
    return plain.clone(), free.clone()


def _templated(tokenizer: PreTrainedTokenizerBase, prompt: str) -> tuple[Tokens, str]:
    """The ids of a prompt, without a begin-of-text that no template wrote, and their text."""
    text = prompt
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return tuple(tokenizer.encode(text, add_special_tokens=False)), text


def _begin(tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """The token that this tokenizer begins every text with, if any."""
    begun = tokenizer.encode("x")[:1]
    return tuple(begun) if begun == [tokenizer.bos_token_id] else ()


@torch.inference_mode()
def _scored(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Tokens],
    ends: Sequence[Ending],
    phrases: tuple[str, ...],
    batch_size: int | None,
) -> Probabilities:
    if batch_size is not None and batch_size < 1:
        raise PhraseError(f"batch_size={batch_size}: give at least 1")
    empty = next((place for place, ids in enumerate(encoded) if not ids), None)
    if empty is not None:
        raise PhraseError(f"prompts[{empty}] has no tokens to continue: give it text")
    wide = torch.promote_types(unwrapped(model).dtype, torch.float32)
    plain, free = torch.zeros(2, len(encoded), dtype=wide)
    groups = _groups(tokenizer, ends, phrases)
    edges = _scheme(model, encoded, [tree for tree, _ in groups])
    with models.evaluating(model):
        for tree, members in groups:
            for batch in _batches(model, tree, encoded, members, batch_size):
                read = passes.prefill(model, [encoded[place] for place in batch])
                log_p = edges(model, tree, read)
                each = torch.stack([log_p[:, list(path)].sum(1) for path in tree.paths], 1).exp()
                plain[batch] = each.sum(1).to("cpu", wide)
                free[batch] = each[:, list(tree.kept)].sum(1).to("cpu", wide)
    return plain, free


def _scheme(
    model: Any, encoded: Sequence[Tokens], tries: Sequence[Trie]
) -> Callable[[Any, Trie, passes.Prefilled], Tensor]:
    """How edges are read from this model: by a tree mask where it takes one over all tokens."""
    nodes = max((len(tree.tokens) for tree in tries), default=0)
    reason = passes.obstacle(model, max(map(len, encoded), default=0) + nodes)
    if reason is None:
        return passes.by_tree
    log.warning(
        "refusal probability: %s takes no tree mask (%s); its phrases are read token by token "
        "instead, which is several times slower",
        type(unwrapped(model)).__name__,
        reason,
    )
    return passes.by_walk


def _groups(
    tokenizer: PreTrainedTokenizerBase, ends: Sequence[Ending], phrases: tuple[str, ...]
) -> list[tuple[Trie, list[int]]]:
    """Prompts behind which the phrases have the same tokens, with the trie of these."""
    known = {end: continuations(tokenizer, end, phrases) for end in dict.fromkeys(ends)}
    members: dict[tuple[Tokens, ...], list[int]] = {}
    for place, end in enumerate(ends):
        members.setdefault(known[end], []).append(place)
    return [(trie(sequences), places) for sequences, places in members.items()]


def _batches(
    model: Any, tree: Trie, encoded: Sequence[Tokens], members: list[int], size: int | None
) -> Iterator[list[int]]:
    """Prompts of nearly one length: of exactly one where a model has no way of leaving out pads."""
    alone = passes.recurrent(model)
    longest_first = sorted(members, key=lambda place: -len(encoded[place]))
    while longest_first:
        longest = len(encoded[longest_first[0]])
        most = size or _batch_size(model, tree, longest)
        batch = [
            place for place in longest_first[:most] if not alone or len(encoded[place]) == longest
        ]
        yield batch
        longest_first = longest_first[len(batch) :]


def _batch_size(model: Any, tree: Trie, longest: int) -> int:
    """Prompts that fit a part of the memory: logits of every node, keys, values and inner widths.

    Logits are what counts: nodes times vocabulary, once as the head gives them; in fp32 they exist
    for one prompt at a time.
    """
    owner = unwrapped(model)
    text = owner.config.get_text_config(decoder=True)
    width = text.hidden_size
    inner = max(getattr(text, "intermediate_size", None) or 0, 4 * width)
    per_token = 2 * text.num_hidden_layers * width + 6 * width + 3 * inner
    tokens = longest + len(tree.tokens)
    logits = (len(tree.tokens) + 1) * text.vocab_size
    free = CPU_BYTES
    if owner.device.type == "cuda":
        free = int(GPU_SHARE * torch.cuda.mem_get_info(owner.device)[0])
    each = owner.dtype.itemsize * (tokens * per_token + logits)
    return max(1, min(MOST_PROMPTS, (free - 4 * logits) // each))
