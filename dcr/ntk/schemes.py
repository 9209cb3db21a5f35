"""The exact kernel, and the paper's finite differences (A.6).

Exact: N·k backward passes and inner products per module, no forward loop. A sweep keeps A and δ of
a group of modules for all prompts, adds their inner products and drops them; the groups follow
from the budget, and each sweep repeats the forward pass and a backward pass per rank that ends at
its first module. Gradients are not formed where that is dearer than A and δ; every function adds
to one matrix [prompts, rank, prompts, rank], prompts in the order of lengths.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dcr.config import ConfigError
from dcr.ntk.capture import Batch, Held, Tile, collect, last_logits, log_probabilities
from dcr.ntk.subset import Kind, Part, tied

SCRATCH = 2**28  # bytes of gradients held at once where they are formed

Gram = Float[Tensor, "prompts rank prompts rank"]


def add(gram: Gram, part: Part, held: Held, tokens: Int[Tensor, "prompts rank"]) -> None:
    """What one module's own parameters contribute."""
    if part.kind is Kind.head:
        _add_head(gram, held, tokens, part.module.bias is not None)
    if held.vectors:
        vectors = torch.cat(held.vectors).flatten(0, 1).to(gram.dtype)
        gram += (vectors @ vectors.T).view_as(gram)
    if held.tiles and formed_is_cheaper(held.tiles):
        _add_formed(gram, held.tiles)
    elif held.tiles:
        _add_factored(gram, held.tiles)


def formed_is_cheaper(tiles: Sequence[Tile]) -> bool:
    """Whether to form each gradient [d_out, d_in]: multiplications counted both ways.

    With A and δ alone, a pair of prompts costs T²·d_in + k·T·(T + k)·d_out, else k²·d_in·d_out,
    and k·T·d_in·d_out more for every prompt.
    """
    if not tiles[0].inputs.is_floating_point():
        return False
    prompts = sum(len(tile.inputs) for tile in tiles)
    _, rank, _, wide = tiles[0].deltas.shape
    inner = tiles[0].inputs.shape[-1]
    lengths = sum(len(tile.inputs) * tile.inputs.shape[1] for tile in tiles) / prompts
    pair = lengths**2 * inner + rank * lengths * (lengths + rank) * wide
    formed = rank**2 * inner * wide + rank * lengths * inner * wide / prompts
    return formed < pair / 2  # of the pairs, only half are visited


def add_tied(gram: Gram, embedding: Held, head: Held, tokens: Int[Tensor, "prompts rank"]) -> None:
    """Cross terms of a matrix that is embedding and head: Σ_t [id(x)_t = o]⟨f(x'), δ_t(x)⟩."""
    features, factors = (torch.cat(each).to(gram.dtype) for each in (head.features, head.factors))
    rows = []
    for tile in embedding.tiles:
        along = tile.deltas.to(gram.dtype) @ features.T  # [batch, rank, length, prompts]
        for ids, products in zip(tile.inputs, along, strict=True):
            named = ids[:, None, None] == tokens  # [length, prompts, rank]
            rows.append(torch.einsum("utn,tno->uno", products, named.to(gram.dtype)) * factors)
    crossed = torch.stack(rows)
    gram += crossed + crossed.permute(2, 3, 0, 1)


def _add_head(gram: Gram, held: Held, tokens: Int[Tensor, "prompts rank"], bias: bool) -> None:
    """[o=u]·⟨f(x'), f(x)⟩, in closed form."""
    features, factors = (torch.cat(each).to(gram.dtype) for each in (held.features, held.factors))
    products = features @ features.T + bias
    same = tokens[:, :, None, None] == tokens
    gram += same * products[:, None, :, None] * factors[:, :, None, None] * factors


def _add_factored(gram: Gram, tiles: Sequence[Tile]) -> None:
    """Σ_{t,t'} (δ₁δ₂ᵀ)∘(A₁A₂ᵀ), as ⟨δ₁, (A₁A₂ᵀ)δ₂⟩: AAᵀ is shared by all tokens of a prompt."""
    starts = [0]
    for tile in tiles:
        starts.append(starts[-1] + len(tile.inputs))
    for i, left in enumerate(tiles):
        for j in range(i, len(tiles)):
            block = _pair(left, tiles[j], gram.dtype)
            rows, columns = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
            gram[rows, :, columns] += block
            if i != j:
                gram[columns, :, rows] += block.permute(2, 3, 0, 1)


def _pair(left: Tile, right: Tile, dtype: torch.dtype) -> Float[Tensor, "left rank right rank"]:
    deltas, rows = right.deltas.to(dtype), []
    for given, own in zip(left.inputs, left.deltas.to(dtype), strict=True):
        mixed = _overlap(given, right.inputs, dtype)[:, None] @ deltas
        rows.append(own.flatten(1) @ mixed.flatten(2).flatten(0, 1).T)
    return torch.stack(rows).view(len(rows), -1, *deltas.shape[:2])


def _overlap(one: Tensor, others: Tensor, dtype: torch.dtype) -> Float[Tensor, "others t1 t2"]:
    """A₁A₂ᵀ with each of the others; of ids, whose A are rows of the identity, where they agree."""
    if one.is_floating_point():
        return one.to(dtype) @ others.to(dtype).mT
    return (one[:, None] == others[:, None, :]).to(dtype)


def _add_formed(gram: Gram, tiles: Sequence[Tile]) -> None:
    """The gradients δᵀA themselves, so many of their rows at a time."""
    inner, wide = tiles[0].inputs.shape[-1], tiles[0].deltas.shape[-1]
    each = gram.shape[0] * gram.shape[1] * inner * gram.element_size()
    step = max(1, SCRATCH // each)
    for first in range(0, wide, step):
        kept = slice(first, first + step)
        formed = [
            torch.einsum(
                "bktc,bti->bkci", tile.deltas[..., kept].to(gram.dtype), tile.inputs.to(gram.dtype)
            )
            for tile in tiles
        ]
        rows = torch.cat([one.flatten(2).flatten(0, 1) for one in formed])
        gram += (rows @ rows.T).view_as(gram)


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
                add_tied(gram, held[part.name], held[head.name], tokens)
    for part in sweep:
        add(gram, part, held.pop(part.name), tokens)


def finite_differences(
    model: Any,
    parameters: Sequence[nn.Parameter],
    rows: Sequence[Batch],
    top_k: int,
    tokens: Int[Tensor, "prompts rank"] | None,
    step: float,
) -> Found:
    """As `exact`, one column (z(x';θ+εw) - z(x';θ-εw)) / 2ε after another, w = ∇z_u(x).

    N·k backward passes and 2N²k forward passes, the latter batched. Parameters are moved in place
    and restored bitwise, also after an exception. w is not normalised, so the true step is
    ε‖w‖: too large is biased, too small is rounding noise; repeat with another ε to tell. Raises
    ConfigError below fp32.
    """
    if any(p.dtype.itemsize < 4 for p in parameters):
        raise ConfigError(
            f"method=finite_difference: the model is in {parameters[0].dtype}; a step of {step} "
            "needs fp32 at least, or take method=exact"
        )
    with torch.no_grad():
        logits = [last_logits(model, batch) for batch in rows]
        firsts = [each.topk(top_k, 1).indices for each in logits]
        chosen = torch.cat(firsts) if tokens is None else tokens
        log_p = log_probabilities(torch.cat(logits), chosen)
    columns = []
    saved = [p.detach().clone() for p in parameters]
    try:
        for batch in rows:
            for place in range(len(batch.ids)):
                alone = Batch(0, batch.ids[place, None], batch.mask[place, None])
                for token in chosen[batch.start + place].tolist():
                    along = _gradient(model, parameters, alone, token)
                    ahead = _moved(model, parameters, saved, along, step, rows, chosen)
                    behind = _moved(model, parameters, saved, along, -step, rows, chosen)
                    _restore(parameters, saved)
                    columns.append((ahead - behind) / (2 * step))
    finally:
        _restore(parameters, saved)
    return torch.stack(columns, 2).view(*chosen.shape, *chosen.shape), chosen, log_p


def _gradient(
    model: Any, parameters: Sequence[nn.Parameter], batch: Batch, token: int
) -> list[Tensor]:
    asked = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        logit = last_logits(model, batch)[0, token]
        return list(torch.autograd.grad(logit, parameters, materialize_grads=True))
    finally:
        for parameter, asks in zip(parameters, asked, strict=True):
            parameter.requires_grad_(asks)


@torch.no_grad()
def _moved(
    model: Any,
    parameters: Sequence[nn.Parameter],
    saved: Sequence[Tensor],
    along: Sequence[Tensor],
    step: float,
    rows: Sequence[Batch],
    tokens: Int[Tensor, "prompts rank"],
) -> Float[Tensor, "prompts rank"]:
    for parameter, value, direction in zip(parameters, saved, along, strict=True):
        parameter.copy_(value).add_(direction, alpha=step)
    return torch.cat([last_logits(model, batch) for batch in rows]).gather(1, tokens)


@torch.no_grad()
def _restore(parameters: Sequence[nn.Parameter], saved: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(value)
