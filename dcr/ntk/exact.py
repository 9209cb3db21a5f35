"""The exact kernel: N·k backward passes and inner products per module, no forward loop.

A sweep keeps A and δ of a group of modules for all prompts, adds their inner products and drops
them; the groups follow from the budget, and each sweep repeats the forward pass and a backward
pass per rank that ends at its first module.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcr.ntk import products
from dcr.ntk.capture import Batch, Held, collect
from dcr.ntk.subset import Kind, Part, tied

Found = tuple[
    Float[Tensor, "prompts rank prompts rank"],
    Int[Tensor, "prompts rank"],
    Float[Tensor, "prompts rank"],
]


def exact(
    model: Any,
    sweeps: Sequence[Sequence[Part]],
    rows: Sequence[Batch],
    top_k: int,
    tokens: Int[Tensor, "prompts rank"] | None,
) -> Found:
    """Blocks K(x',x)[o,u] as [x', o, x, u], the tokens, and their log-probabilities.

    Prompts stand in the order of the batches. Sums are in fp32 at least.
    """
    gram: Tensor | None = None
    log_p: Tensor | None = None
    for sweep in sweeps:
        held: dict[str, Held] = {part.name: Held() for part in sweep}
        seen: list[tuple[Tensor, Tensor]] = []
        for batch in rows:
            own = None if tokens is None else tokens[batch.start : batch.start + len(batch.ids)]
            got, *told = collect(model, sweep, batch, top_k, own)
            seen.append((told[0], told[1]))
            for name, one in got.items():
                _extend(held[name], one)
        if gram is None:
            tokens, log_p = (torch.cat(each) for each in zip(*seen, strict=True))
            gram = _zeros(tokens, log_p.dtype)
        assert tokens is not None
        _reduce(gram, sweep, held, tokens)
    assert gram is not None
    assert tokens is not None
    assert log_p is not None
    return (gram + gram.permute(2, 3, 0, 1)) / 2, tokens, log_p


def _extend(held: Held, more: Held) -> None:
    held.tiles += more.tiles
    held.vectors += more.vectors
    held.features += more.features
    held.factors += more.factors


def _zeros(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(*tokens.shape, *tokens.shape, dtype=dtype, device=tokens.device)


def _reduce(gram: Tensor, sweep: Sequence[Part], held: dict[str, Held], tokens: Tensor) -> None:
    """Adds all inner products of a sweep, letting go of each module as it is done."""
    if tied(list(sweep)):
        head = next(part for part in sweep if part.kind is Kind.head)
        for part in sweep:
            if part.kind is Kind.embedding and part.module.weight is head.module.weight:
                products.add_tied(gram, held[part.name], held[head.name], tokens)
    for part in sweep:
        products.add(gram, part, held.pop(part.name), tokens)
