"""The LightningDataModule of all stages: a stage's rows, padded for one forward pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Int
from lightning import LightningDataModule
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.utils.data import DataLoader

from dcr.core.config import Stage
from dcr.core.config.training import TrainConfig
from dcr.core.data import Splits
from dcr.core.data.rows import PairRow, PromptRow, StageRows
from dcr.core.machine import attention_mask, padded
from dcr.core.prompts import IGNORED, ChatFormat

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


def _contrastive_step(rows: StageRows, drawn: Sequence[PromptRow]) -> PromptBatch:
    mine, general = rows.contrastive_step(drawn)
    return prompt_batch(mine, rows.pad, general)


def _sft_step(rows: StageRows, drawn: Sequence[PairRow]) -> list[PairBatch]:
    return [pair_batch(group, rows.pad) for group in rows.sft_step(drawn)]


class Feed(NamedTuple):
    """The rows of a stage, what is drawn of them as a step's batches, and held-out rows as one."""

    rows: Any
    of_step: Callable[..., Any]
    of_heldout: Callable[..., Batch]


BATCHES = {
    Stage.contrastive: (_contrastive_step, prompt_batch),
    Stage.sft: (_sft_step, pair_batch),
}


class SafetyData(LightningDataModule):
    """Batches of one stage, for its LightningModule.

    Stage one yields PromptBatch, SFT a list of PairBatch (the micro-batches of one step), each of
    this rank's part of the rows. Called like `StageRows`, with its errors; the stage of an
    extension brings its `feed`.
    """

    def __init__(
        self,
        stage: Stage,
        rows: Splits,
        chat: ChatFormat,
        settings: TrainConfig,
        context: int | None = None,
        feed: Feed | None = None,
    ) -> None:
        super().__init__()
        if feed is None:
            feed = Feed(StageRows(stage, rows, chat, settings, context), *BATCHES[stage])
        self.rows, self.of_step, self.of_heldout = feed
        self.sampler = self.rows.sampler

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch, the same on every rank."""
        return len(self.sampler)

    def train_dataloader(self) -> DataLoader:
        rows, trainer = self.rows, self.trainer
        if trainer is not None:
            self.sampler.start = trainer.global_step
            rows.rank, rows.world = trainer.global_rank, trainer.world_size
            rows.sharded = isinstance(trainer.strategy, ModelParallelStrategy)
        step = partial(self.of_step, rows)
        # what has a length and items is a dataset to torch
        return DataLoader(rows.drawn, batch_sampler=self.sampler, collate_fn=step)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        passes = self.heldout()
        return DataLoader(passes, batch_size=None) if passes else []  # pyright: ignore[reportArgumentType]

    def heldout(self) -> list[Any]:
        """The batches of held-out rows, whole on every rank."""
        return [self.of_heldout(rows, self.rows.pad) for rows in self.rows.heldout_passes]
