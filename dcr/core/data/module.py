"""The LightningDataModule of both stages: a stage's rows, padded for one forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from lightning import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from dcr.core.batching import attention_mask, padded
from dcr.core.config import Stage, TrainConfig
from dcr.core.data.rows import StageRows
from dcr.core.data.splits import Splits
from dcr.core.prompts import IGNORED, ChatFormat, PairRow, PromptRow


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


class SafetyData(LightningDataModule):
    """Batches of one stage, for either LightningModule.

    Stage one yields PromptBatch, SFT a list of PairBatch (the micro-batches of one step, behind a
    PromptBatch where stage one's loss is kept on), of this rank's part of `rows`. Called like
    `StageRows`, with its errors.
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
        self.rows = StageRows(stage, rows, chat, settings, context)
        self.contrastive = stage is Stage.contrastive

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch, the same on every rank."""
        return len(self.rows.sampler)

    def train_dataloader(self) -> DataLoader:
        rows = self.rows
        if self.trainer is not None:
            rows.rank, rows.world = self.trainer.global_rank, self.trainer.world_size
            rows.sharded = isinstance(self.trainer.strategy, ModelParallelStrategy)
            rows.sampler.start = self.trainer.global_step
        return DataLoader(
            rows.prompts if self.contrastive else rows.pairs,  # pyright: ignore[reportArgumentType]
            batch_sampler=rows.sampler,
            collate_fn=self._collate_prompts if self.contrastive else self._collate_pairs,
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        batch: Any = prompt_batch if self.contrastive else pair_batch
        passes = [batch(rows, self.rows.pad) for rows in self.rows.heldout_passes()]
        return DataLoader(passes, batch_size=None) if passes else []  # pyright: ignore[reportArgumentType]

    def _collate_pairs(self, rows: list[PairRow]) -> list[PairBatch]:
        return [pair_batch(group, self.rows.pad) for group in self.rows.sft_step(rows)]

    def _collate_prompts(self, rows: list[PromptRow]) -> PromptBatch:
        mine, general = self.rows.contrastive_step(rows)
        return prompt_batch(mine, self.rows.pad, general)
