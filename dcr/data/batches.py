"""Rows as padded tensors: what one forward pass of either stage reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from dcr.prompts import IGNORED, PairRow, PromptRow, attention_mask, padded


@dataclass(frozen=True)
class PairBatch:
    """Right-padded prompt-response pairs; `targets[b, t]` is what position t must predict."""

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    targets: Int[Tensor, "batch length"]
    refusal: Bool[Tensor, "batch"]
    names: tuple[str, ...]

    def to(self, device: torch.device, non_blocking: bool = False) -> "PairBatch":
        moved = (t.to(device, non_blocking=non_blocking) for t in _tensors(self))
        return PairBatch(*moved, names=self.names)


@dataclass(frozen=True)
class PromptBatch:
    """Right-padded prompts of stage one with the positions to pool and next-token targets."""

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    labels: Int[Tensor, "batch"]
    spans: Int[Tensor, "batch 2"]
    targets: Int[Tensor, "batch length"]
    names: tuple[str, ...]
    general: PairBatch | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "PromptBatch":
        moved = (t.to(device, non_blocking=non_blocking) for t in _tensors(self))
        general = self.general.to(device, non_blocking) if self.general else None
        return PromptBatch(*moved, names=self.names, general=general)


def _tensors(batch: PairBatch | PromptBatch) -> list[Tensor]:
    return [value for value in vars(batch).values() if isinstance(value, Tensor)]


def pair_batch(rows: Sequence[PairRow], pad: int) -> PairBatch:
    """Pairs as one batch."""
    return PairBatch(
        padded([r.ids for r in rows], pad),
        attention_mask([r.ids for r in rows]),
        padded([r.targets for r in rows], IGNORED),
        torch.tensor([r.refusal for r in rows]),
        tuple(r.id for r in rows),
    )


def prompt_batch(
    rows: Sequence[PromptRow], pad: int, general: Sequence[PairRow] = ()
) -> PromptBatch:
    """Prompts of stage one as one batch, with general pairs for the NLL anchor if given."""
    return PromptBatch(
        padded([r.ids for r in rows], pad),
        attention_mask([r.ids for r in rows]),
        torch.tensor([r.label for r in rows]),
        torch.tensor([r.features for r in rows]),
        padded([r.nll for r in rows], IGNORED),
        tuple(r.id for r in rows),
        pair_batch(general, pad) if general else None,
    )


def micro_batches(rows: Sequence[PairRow], tokens: int) -> list[list[PairRow]]:
    """Rows of one optimiser step in groups of similar length, at most `tokens` padded tokens each.

    A row longer than `tokens` gets a group of its own.
    """
    groups: list[list[PairRow]] = []
    for row in sorted(rows, key=lambda r: -len(r.ids)):  # the first of a group is its longest
        if groups and (len(groups[-1]) + 1) * len(groups[-1][0].ids) <= tokens:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups
