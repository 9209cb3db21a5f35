"""What the exact kernel holds at once, known before it starts."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from dcr import models
from dcr.config import ConfigError
from dcr.ntk.products import SCRATCH
from dcr.ntk.subset import FORWARDS, Kind, Part, output_layer, tied

GIB = 2**30


def groups(
    chosen: Sequence[Part], lengths: Sequence[int], top_k: int, itemsize: int, budget: float
) -> list[list[Part]]:
    """Modules whose A and δ for all prompts fit `budget` bytes together: one sweep for each.

    Raises ConfigError where one module alone does not fit.
    """
    found: list[list[Part]] = [[]]
    used = 0
    for part in _in_order(chosen):
        size = held_bytes(part, lengths, top_k, itemsize)
        if size > budget:
            raise ConfigError(
                f"budget_gib={budget / GIB:.3g}: {part.name} alone needs {size / GIB:.3g} for "
                f"{len(lengths)} prompts; raise it, or take fewer prompts or a smaller top_k"
            )
        if used + size > budget:
            found.append([])
            used = 0
        found[-1].append(part)
        used += size
    return found


def held_bytes(part: Part, lengths: Sequence[int], top_k: int, itemsize: int) -> int:
    """A and δ of one module for all prompts, at full length: an upper bound."""
    given, wide = _features(part)
    positions = sum(lengths) * itemsize
    match part.kind:
        case Kind.head:
            return len(lengths) * given * itemsize
        case Kind.norm:
            return 2 * len(lengths) * top_k * wide * itemsize
        case Kind.embedding:
            return sum(lengths) * 8 + positions * top_k * wide
    return positions * (given + top_k * wide)


def needed(
    model: Any,
    chosen: Sequence[Part],
    sweeps: Sequence[Sequence[Part]],
    lengths: Sequence[int],
    rows: int,
    top_k: int,
) -> int:
    """Bytes beside the model itself: an upper estimate, `lengths` padded and ascending."""
    itemsize = next(model.parameters()).dtype.itemsize
    wide = max((_features(part)[1] for part in chosen if part.kind is not Kind.head), default=0)
    last = lengths[-rows:]
    # δ of one batch as they come, stacked and masked; those of norms are then summed at once
    batch = sum(3 * sum(last) * top_k * _features(p)[1] for p in chosen if p.kind is Kind.norm)
    batch = batch * itemsize + max(
        sum(3 * held_bytes(p, last, top_k, itemsize) for p in sweep) for sweep in sweeps
    )
    held = max(sum(held_bytes(p, lengths, top_k, itemsize) for p in sweep) for sweep in sweeps)
    linear = [math.prod(_features(part)) for part in chosen if part.kind is Kind.linear]
    formed = len(lengths) * top_k * max(linear, default=0) * max(itemsize, 4)
    pair = 3 * sum(last) * top_k * wide * max(itemsize, 4)
    gram = 4 * (len(lengths) * top_k) ** 2 * max(itemsize, 4)
    graph = graph_bytes(model, len(last), last[-1])
    return held + graph + gram + max(batch, pair + 3 * min(SCRATCH, formed))


def graph_bytes(model: Any, rows: int, length: int) -> int:
    """What autograd keeps of one forward pass: twice what goes in and out of every projection.

    Attention probabilities are counted as if kept, as they are without a fused kernel; of the
    head, logits and their softmax in fp32.
    """
    config = models.unwrapped(model).config.get_text_config()
    blocks = models.decoder_blocks(model)
    features = sum(
        sum(parameter.shape)
        for module in blocks.modules()
        if FORWARDS.get(type(module).forward) is Kind.linear
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    )
    itemsize = next(model.parameters()).dtype.itemsize
    attention = 3 * len(blocks) * config.num_attention_heads * rows * length**2
    logits = 4 * rows * max(output_layer(model).weight.shape) * max(itemsize, 4)
    return itemsize * (2 * rows * length * features + attention) + logits


def _features(part: Part) -> tuple[int, int]:
    """What a module reads and gives per position."""
    shape = [int(size) for size in next(part.module.parameters(False)).shape]
    if part.kind is Kind.norm:
        return shape[0], shape[0]
    out_first = isinstance(part.module, torch.nn.Linear)
    return (shape[1], shape[0]) if out_first else (shape[0], shape[1])


def _in_order(chosen: Sequence[Part]) -> list[Part]:
    """A tied head right behind its embeddings: their cross terms need both in one sweep."""
    if not tied(list(chosen)):
        return list(chosen)
    head = next(part for part in chosen if part.kind is Kind.head)
    pair = [p for p in chosen if p.kind is Kind.embedding and p.module.weight is head.module.weight]
    rest = [part for part in chosen if part not in (*pair, head)]
    return [*pair, head, *rest]
