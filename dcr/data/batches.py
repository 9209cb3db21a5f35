"""In which order rows are drawn, and the padded tensors that one forward pass reads."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import Sampler

from dcr import batching
from dcr.config import Sampler as SamplerName
from dcr.prompts import IGNORED, PairRow, PromptRow, attention_mask, padded

TOXIC, SEEMINGLY_TOXIC = 1, 0  # class labels of stage one (Section 6)
NO_CLASS = -1  # of a row that only keeps a rank in step with the others: no loss looks at it

Row = TypeVar("Row")


def generator(*seeds: int) -> torch.Generator:
    """A generator whose stream is a function of the whole tuple of numbers."""
    mixed = 0
    for number in seeds:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


def balanced_draws(labels: Sequence[int], draws: int, chance: torch.Generator) -> list[int]:
    """With replacement, weight one over the class count: the classes come up equally often."""
    y = torch.tensor(labels)
    weights = 1.0 / torch.bincount(y).clamp(min=1)[y].double()
    return torch.multinomial(weights, draws, replacement=True, generator=chance).tolist()


def stratified_draws(labels: Sequence[int], draws: int, chance: torch.Generator) -> list[int]:
    """Alternating classes, each gone through in a fresh random order before any row repeats."""
    y = torch.tensor(labels)
    streams = []
    for label in (SEEMINGLY_TOXIC, TOXIC):
        rows = torch.nonzero(y == label).flatten()
        rounds = math.ceil(math.ceil(draws / 2) / len(rows))
        shuffled = [rows[torch.randperm(len(rows), generator=chance)] for _ in range(rounds)]
        streams.append(torch.cat(shuffled).tolist())
    return [row for pair in zip(*streams, strict=False) for row in pair][:draws]


def proportional_draws(labels: Sequence[int], draws: int, chance: torch.Generator) -> list[int]:
    """Every row once in random order, again and again: classes come up as often as they are."""
    rounds = math.ceil(draws / len(labels))
    order = [torch.randperm(len(labels), generator=chance) for _ in range(rounds)]
    return torch.cat(order)[:draws].tolist()


DRAWS = {
    SamplerName.balanced: balanced_draws,
    SamplerName.stratified: stratified_draws,
    SamplerName.proportional: proportional_draws,
}


class EpochBatches(Sampler[list[int]]):
    """Batches of row indices as a pure function of (seed, epoch), the same on every rank.

    A batch holds the `batch_size` rows of all ranks, of which each takes its `share`. `start`
    optimiser steps are passed over, which is how a resumed run continues with the next one.
    Lightning announces epochs through the attribute `sampler`.
    """

    def __init__(
        self,
        order: Callable[[torch.Generator], list[int]],
        draws: int,
        batch_size: int,
        seed: int,
    ) -> None:
        self.order, self.draws, self.batch_size, self.seed = order, draws, batch_size, seed
        self.start, self.epoch = 0, 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.draws / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order(generator(self.seed, self.epoch))
        passed = min(max(self.start - self.epoch * len(self), 0), len(self))
        for index in range(passed, len(self)):
            yield rows[index * self.batch_size : (index + 1) * self.batch_size]


def share(rows: Sequence[Row], rank: int, world: int) -> Sequence[Row]:
    """A rank's part of a batch: disjoint, in order, and as large as any other's up to one row."""
    # consecutive rows, because every other row of a stratified batch is of one class
    first, last = (len(rows) * place // world for place in (rank, rank + 1))
    return rows[first:last]


# --- tensors ---


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
    groups = batching.by_tokens([row.ids for row in rows], tokens)
    return [[rows[place] for place in places] for places in groups]
