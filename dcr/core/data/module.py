"""The LightningDataModule of all stages: a stage's rows, padded for one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from lightning import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from dcr.core.config import Stage, TrainConfig
from dcr.core.data import Splits
from dcr.core.data.rows import ReadoutRow, Rounds, StageRows, readout_rows
from dcr.core.passes import attention_mask, padded
from dcr.core.prompts import IGNORED, ChatFormat, PairRow, PromptRow

Moved = TypeVar("Moved", bound="Batch")


class Batch:
    """Tensors of one step, which Lightning moves to a device together."""

    def to(self: Moved, device: torch.device, non_blocking: bool = False) -> Moved:
        moved = {
            name: part.to(device, non_blocking=non_blocking)
            for name, part in vars(self).items()
            if isinstance(part, Tensor | Batch)
        }
        return replace(self, **moved)  # pyright: ignore[reportArgumentType]  # dataclasses alone


@dataclass(frozen=True)
class PairBatch(Batch):
    """Right-padded prompt-response pairs; `targets[b, t]` is what position t must predict."""

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    targets: Int[Tensor, "batch length"]
    refusal: Bool[Tensor, "batch"]
    names: tuple[str, ...]


@dataclass(frozen=True)
class PromptBatch(Batch):
    """Right-padded prompts of stage one with the positions to pool and next-token targets."""

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    labels: Int[Tensor, "batch"]
    spans: Int[Tensor, "batch 2"]
    targets: Int[Tensor, "batch length"]
    names: tuple[str, ...]
    general: PairBatch | None = None


@dataclass(frozen=True)
class ReadoutBatch(Batch):
    """Right-padded rows of the readout, prompts or answers, and the positions that are read.

    Attributes:
        first: which of the positions that are read are the first of their row.
        opening: the tokens of refusals behind the others, where rows are prompts.
        number: by which the batch is known among all of the stage.
    """

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    read: Bool[Tensor, "batch length"]
    labels: Int[Tensor, "batch"]
    first: Bool[Tensor, "places"]
    opening: Int[Tensor, "tokens"]
    names: tuple[str, ...]
    number: int


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


def readout_batch(rows: Sequence[ReadoutRow], number: int) -> ReadoutBatch:
    """Rows of the readout as one batch."""
    mask = attention_mask([row.ids for row in rows])
    read = torch.zeros_like(mask)
    for inside, row in zip(read, rows, strict=True):
        inside[row.places] = True
    return ReadoutBatch(
        padded([row.ids for row in rows], 0),
        mask,
        read,
        torch.tensor([row.label for row in rows]),
        torch.tensor([place == row.places[0] for row in rows for place in row.places]),
        torch.tensor([token for row in rows for token in row.opening], dtype=torch.long),
        tuple(row.id for row in rows),
        number,
    )


class SafetyData(LightningDataModule):
    """Batches of one stage, for its LightningModule.

    Stage one yields PromptBatch, SFT a list of PairBatch (the micro-batches of one step), each of
    this rank's part of the rows. The readout yields a list of ReadoutBatch (prompts, and answers
    where there are any), whole on every rank. Called like `StageRows`, with its errors.
    """

    def __init__(
        self,
        stage: Stage,
        rows: Splits,
        chat: ChatFormat,
        settings: TrainConfig,
        context: int | None = None,
    ) -> None:
        super().__init__()
        self.stage = stage
        if stage is Stage.readout:
            self.readout = readout_rows(chat, rows, settings.sft, settings.seed)
            self.sampler = Rounds(self.readout.steps)
        else:
            self.rows = StageRows(stage, rows, chat, settings, context)
            self.sampler = self.rows.sampler

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch, the same on every rank."""
        return len(self.sampler)

    def train_dataloader(self) -> DataLoader:
        if self.trainer is not None:
            self.sampler.start = self.trainer.global_step
        if self.stage is Stage.readout:
            drawn: Any = range(len(self.readout.pairs))
        else:
            rows, trainer = self.rows, self.trainer
            if trainer is not None:
                rows.rank, rows.world = trainer.global_rank, trainer.world_size
                rows.sharded = isinstance(trainer.strategy, ModelParallelStrategy)
            drawn = rows.prompts if self.stage is Stage.contrastive else rows.pairs
        # what has a length and items is a dataset to torch
        return DataLoader(drawn, batch_sampler=self.sampler, collate_fn=self.step)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if self.stage is Stage.readout:
            passes: list[Any] = self.heldout_readout()
        else:
            batch: Any = prompt_batch if self.stage is Stage.contrastive else pair_batch
            passes = [batch(rows, self.rows.pad) for rows in self.rows.heldout_passes()]
        return DataLoader(passes, batch_size=None) if passes else []  # pyright: ignore[reportArgumentType]

    def trained_readout(self) -> list[ReadoutBatch]:
        """The batches that the readout's steps take, each once."""
        used = [self.readout.of_step(place) for place in sorted(set(self.readout.steps))]
        return [self._of_readout(number) for kind in zip(*used, strict=True) for number in kind]

    def heldout_readout(self) -> list[ReadoutBatch]:
        """The readout's held-out prompts, then its held-out answers."""
        return [self._of_readout(number) for number in self.readout.measured]

    def _of_readout(self, number: int) -> ReadoutBatch:
        return readout_batch(self.readout.batches[number], number)

    def step(self, drawn: list[Any]) -> PromptBatch | list[PairBatch] | list[ReadoutBatch]:
        """The batches of a step: of its drawn rows, or of the place that the readout takes."""
        if self.stage is Stage.readout:
            return [self._of_readout(number) for number in self.readout.of_step(*drawn)]
        if self.stage is Stage.sft:
            return [pair_batch(group, self.rows.pad) for group in self.rows.sft_step(drawn)]
        mine, general = self.rows.contrastive_step(drawn)
        return prompt_batch(mine, self.rows.pad, general)
