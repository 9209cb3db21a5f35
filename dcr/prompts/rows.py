"""Tokenised rows, and how their ids become one tensor."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED = -100  # label of positions without a loss, as everywhere in transformers


@dataclass(frozen=True)
class PromptRow:
    """A tokenised prompt; `features` are the positions stage one pools over."""

    id: str
    ids: list[int]
    label: int
    features: tuple[int, int]  # first and one past the last position
    nll: list[int]  # next-token targets, IGNORED where no loss falls


@dataclass(frozen=True)
class PairRow:
    """A tokenised prompt with its response; `targets[t]` is what position t must predict."""

    id: str
    ids: list[int]
    targets: list[int]
    refusal: bool


def padded(
    sequences: Sequence[Sequence[int]], value: int, left: bool = False
) -> Int[Tensor, "batch length"]:
    """Sequences as one tensor, filled up with `value` on the right (or left)."""
    length = max(map(len, sequences))
    rows = [
        [value] * (length - len(s)) * left + list(s) + [value] * (length - len(s)) * (not left)
        for s in sequences
    ]
    return torch.tensor(rows, dtype=torch.long)


def attention_mask(
    sequences: Sequence[Sequence[int]], left: bool = False
) -> Bool[Tensor, "batch length"]:
    """True where a token stands. Never derived from ids: a pad id can be a real end token."""
    return padded([[1] * len(s) for s in sequences], 0, left).bool()
