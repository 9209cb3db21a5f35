"""Inner products of gradients out of A and δ, without forming the gradients where that is dearer.

Every function adds to one matrix [prompts, rank, prompts, rank], prompts in the order of lengths.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcr.ntk.capture import Held, Tile
from dcr.ntk.subset import Kind, Part

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
