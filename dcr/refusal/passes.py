"""The log-probabilities of a trie's edges behind a batch of prompts: two passes, or node by node.

The prompts are read once, into a key-value cache. All inner nodes of the trie then run as one
sequence: a node's position is the prompt's length plus its depth, and a 4-D mask lets it see the
prompt and its ancestors. Where a model cannot take such a mask, the trie is walked one token at a
time, as in generation, with a copy of the cache for each branch.
"""

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcr.config import ConfigError
from dcr.models import unwrapped
from dcr.prompts import attention_mask, padded
from dcr.refusal.continuations import Tokens
from dcr.refusal.tries import Trie

MASKABLE = {"sdpa", "eager"}  # attention that adds whatever mask it is given
WINDOWED = {"sliding_attention", "chunked_attention"}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class Prefilled:
    """Prompts as the model has read them: their cache and the logits at their last positions."""

    cache: Any
    mask: Int[Tensor, "batch length"]
    logits: Float[Tensor, "batch 1 vocabulary"]


def obstacle(model: Any, tokens: int) -> str | None:
    """Why a model cannot take a tree mask over `tokens` positions; None where it can."""
    text = _text(model)
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
    kinds = set(getattr(_text(model), "layer_types", None) or ())
    stateful = getattr(unwrapped(model), "_is_stateful", False)
    return (
        stateful or bool(kinds - WINDOWED - {"full_attention"}) or _cache_name(model) != CACHES[0]
    )


def prefill(model: Any, prompts: Sequence[Tokens]) -> Prefilled:
    """Reads prompts, padded on the left, in one pass with logits for their last positions alone."""
    device = unwrapped(model).device
    mask = attention_mask(prompts, left=True).long().to(device)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    last = {"logits_to_keep": 1} if "logits_to_keep" in _parameters(model) else {}
    output = _pass(model, padded(prompts, 0, left=True).to(device), mask, places, None, last)
    return Prefilled(output[_cache_name(model)], mask, output.logits[:, -1:])


def by_tree(model: Any, tree: Trie, prompts: Prefilled) -> Float[Tensor, "batch edges"]:
    """Log-probability of every edge: one pass over all inner nodes. The cache is used up."""
    outer = len(tree.edges(0))
    sources = [source - 1 for source in tree.sources[outer:]]
    found = [edge_log_p(prompts.logits, [0] * outer, tree.labels[:outer])]
    if sources:
        rows, device = len(prompts.mask), prompts.mask.device
        ids = torch.tensor(tree.tokens, device=device).expand(rows, -1)
        depths = torch.tensor(tree.depths, device=device)
        places = prompts.mask.sum(1, keepdim=True) + depths - 1
        mask = _tree_mask(tree, prompts.mask, prompts.cache.layers[0].keys.dtype)
        logits = _pass(model, ids, mask, places, prompts.cache, {}).logits
        found.append(edge_log_p(logits, sources, tree.labels[outer:]))
    return torch.cat(found, 1)


def by_walk(model: Any, tree: Trie, prompts: Prefilled) -> Float[Tensor, "batch edges"]:
    """The same, one node after another, for models that cannot take a tree mask."""
    found: dict[int, Tensor] = {}

    def visit(node: int, logits: Tensor, cache: Any) -> None:
        labels = tree.edges(node)
        found[node] = edge_log_p(logits, [0] * len(labels), labels)
        below = tree.children[node]
        for child in below:
            own = cache if child == below[-1] else copy.deepcopy(cache)
            ids = prompts.mask.new_full((len(prompts.mask), 1), tree.tokens[child - 1])
            mask = torch.cat([prompts.mask, ids.new_ones(len(ids), tree.depths[child - 1])], 1)
            output = _pass(model, ids, mask, mask.sum(1, keepdim=True) - 1, own, {})
            visit(child, output.logits, output[_cache_name(model)])

    visit(0, prompts.logits, prompts.cache)
    return torch.cat([found[node] for node in sorted(found)], 1)


def edge_log_p(
    logits: Float[Tensor, "batch nodes vocabulary"], nodes: Sequence[int], labels: Sequence[int]
) -> Float[Tensor, "batch edges"]:
    """Log-softmax (in fp32) of the logits of `nodes` at `labels`, and of no other entry."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    # prompt by prompt: a whole batch in fp32 would be another copy of all logits
    total = torch.stack([row.to(wide).logsumexp(-1) for row in logits])
    return logits[:, list(nodes), list(labels)].to(wide) - total[:, list(nodes)]


def _tree_mask(
    tree: Trie, prompts: Int[Tensor, "batch length"], dtype: torch.dtype
) -> Float[Tensor, "batch 1 nodes seen"]:
    """0 where a node may look, the type's least number elsewhere: eager attention adds it."""
    sight = tree.sight().to(prompts.device)
    batch, length, nodes = *prompts.shape, len(sight)
    seen = torch.cat(
        [prompts.bool()[:, None].expand(-1, nodes, length), sight.expand(batch, -1, -1)], 2
    )
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return hidden.masked_fill(~seen, torch.finfo(dtype).min)[:, None]


def _pass(
    model: Any, ids: Tensor, mask: Tensor, places: Tensor, cache: Any, options: dict[str, int]
) -> Any:
    placed = {"position_ids": places} if "position_ids" in _parameters(model) else {}
    kept = {} if cache is None else {_cache_name(model): cache}
    return model(
        input_ids=ids,
        attention_mask=mask,
        use_cache=True,
        return_dict=True,
        **placed,
        **kept,
        **options,
    )


def _text(model: Any) -> Any:
    return unwrapped(model).config.get_text_config(decoder=True)


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(unwrapped(model).forward).parameters)


def _cache_name(model: Any) -> str:
    name = next((name for name in CACHES if name in _parameters(model)), None)
    if name is None:
        kind = type(unwrapped(model)).__name__
        raise ConfigError(
            f"model.name: {kind} keeps no cache to continue a prompt from; drop refusal_probability"
        )
    return name
