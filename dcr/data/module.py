"""The LightningDataModule of both stages: rows drawn in order, and padded for one forward pass."""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from lightning import LightningDataModule
from torch import Tensor, randperm
from torch.utils.data import DataLoader, Sampler

from dcr import batching
from dcr.batching import attention_mask, padded
from dcr.config import (
    ConfigError,
    DataError,
    NLLSource,
    Pooling,
    SFTConfig,
    Stage,
    TrainConfig,
)
from dcr.config import Sampler as SamplerName
from dcr.data.splits import Splits
from dcr.prompts import IGNORED, ChatFormat, PairRow, PromptRow
from dcr.sources import Example

TOXIC, SEEMINGLY_TOXIC = 1, 0  # class labels of stage one (Section 6)
NO_CLASS = -1  # of a row that only keeps a rank in step with the others: no loss looks at it
HELD_OUT_BATCH = 16  # rows of one validation pass

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


def proportional_draws(labels: Sequence[int], draws: int, chance: torch.Generator) -> list[int]:
    """Every row once in random order, again and again: classes come up as often as they are."""
    rounds = math.ceil(draws / len(labels))
    order = [torch.randperm(len(labels), generator=chance) for _ in range(rounds)]
    return torch.cat(order)[:draws].tolist()


DRAWS = {
    SamplerName.balanced: balanced_draws,
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


# --- the module ---


def check_lengths(chat: ChatFormat, rows: Splits, config: SFTConfig, context: int) -> None:
    """Raises ConfigError where the model cannot read `sft.max_len` tokens or no pair fits."""
    if config.max_len > context:
        raise ConfigError(
            f"sft.max_len={config.max_len}: the model's context is {context} tokens; lower it"
        )
    pairs = (*rows.normal, *rows.refusals, *rows.augmented, *rows.twins_toxic)
    fits = (chat.pair(row.prompt, row.response or "", config.max_len)[0] for row in pairs)
    if not any(fits):
        raise _none_fits(config)


def _none_fits(config: SFTConfig) -> ConfigError:
    return ConfigError(f"sft.max_len={config.max_len}: no training pair fits; raise it")


def prompt_rows(
    chat: ChatFormat,
    examples: Sequence[Example],
    label: int,
    context: int | None,
    pooling: Pooling = Pooling.last,
) -> list[PromptRow]:
    """Prompts as stage one reads them. DataError for one of more than `context` tokens."""
    rows = []
    for example in examples:
        row = chat.feature_row(example.id, example.prompt, label, pooling)
        if context is not None and len(row.ids) > context:
            raise DataError(
                f"{example.source}: {example.id}: its {len(row.ids)} tokens exceed the model's "
                f"context of {context}; shorten or remove it"
            )
        rows.append(row)
    return rows


class SafetyData(LightningDataModule):
    """Batches of one stage, for either LightningModule.

    Stage one yields PromptBatch, SFT a list of PairBatch (the micro-batches of one step): of every
    global batch the share of this rank, or one row that no loss looks at where it has none, since
    a rank without a batch would not join in the exchange of gradients. Call with the chat format
    of the model that is trained, and with its `context` in tokens if known;
    tokenising happens once, in the main process, so that a bad row is named before training
    starts.

    Raises ConfigError when a class or every pair is missing, and DataError for a prompt of stage
    one that is longer than the context.
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
        self.stage, self.seed = stage, settings.seed
        self.dcr, self.sft = settings.dcr, settings.sft
        pad: Any = chat.tokenizer.pad_token_id
        self.pad: int = chat.stop[0] if pad is None else pad
        self.rank, self.world = 0, 1
        self.too_long: list[str] = []  # ids of pairs without room for a response
        self.general: list[PairRow] = []  # what the NLL of stage one looks at with source=general
        if stage is Stage.contrastive:
            parts = (rows.seemingly_toxic, rows.toxic)
            heldout = (rows.seemingly_toxic_heldout, rows.toxic_heldout)
            self.prompts, self.heldout = (
                [
                    row
                    for label, part in zip((SEEMINGLY_TOXIC, TOXIC), both, strict=True)
                    for row in prompt_rows(chat, part, label, context, self.dcr.pooling)
                ]
                for both in (parts, heldout)
            )
            if len({row.label for row in self.prompts}) < 2:
                raise ConfigError("data: stage one needs seemingly toxic and toxic prompts, both")
            if self.dcr.nll.source is NLLSource.general and self.dcr.nll.weight > 0:
                self.general = self._pairs(chat, rows.normal, refusal=False)
                if not self.general:
                    raise _none_fits(self.sft)
        else:
            self.pairs = self._pairs(chat, rows.normal, refusal=False)
            self.pairs += self._pairs(chat, rows.refusals, refusal=True)
            self.pairs += self._pairs(chat, rows.augmented, refusal=False)
            self.pairs += self._pairs(chat, rows.twins_seemingly_toxic, refusal=False)
            self.pairs += self._pairs(chat, rows.twins_toxic, refusal=True)
            if not self.pairs:
                raise _none_fits(self.sft)
            self.heldout = self._pairs(chat, rows.normal_heldout, refusal=False)
            self.heldout += self._pairs(chat, rows.refusals_heldout, refusal=True)
        self.sampler = self._sampler()

    def _pairs(self, chat: ChatFormat, rows: list[Example], refusal: bool) -> list[PairRow]:
        made, encoded = [], functools.cache(chat.pair)  # a plan's placeholders are all alike
        for row in rows:
            ids, targets = encoded(
                row.prompt, row.response or "", self.sft.max_len, self.sft.train_on_prompt
            )
            if ids:
                made.append(PairRow(row.id, ids, targets, refusal))
            else:
                self.too_long.append(row.id)
        return made

    def _sampler(self) -> EpochBatches:
        if self.stage is Stage.contrastive:
            labels = [row.label for row in self.prompts]
            draws, drawn = self.dcr.draws or len(labels), DRAWS[self.dcr.sampler]
            size = self.dcr.batch_size
            return EpochBatches(lambda chance: drawn(labels, draws, chance), draws, size, self.seed)
        count, size = len(self.pairs), self.sft.batch_size
        return EpochBatches(
            lambda chance: randperm(count, generator=chance).tolist(), count, size, self.seed
        )

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch, the same on every rank."""
        return len(self.sampler)

    def train_dataloader(self) -> DataLoader:
        if self.trainer is not None:
            self.rank, self.world = self.trainer.global_rank, self.trainer.world_size
            self.sampler.start = self.trainer.global_step
        one = self.stage is Stage.contrastive
        return DataLoader(
            self.prompts if one else self.pairs,  # pyright: ignore[reportArgumentType]
            batch_sampler=self.sampler,
            collate_fn=self._collate_prompts if one else self._collate_pairs,
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if not self.heldout:
            return []
        batch = prompt_batch if self.stage is Stage.contrastive else pair_batch
        return DataLoader(
            sorted(self.heldout, key=lambda row: len(row.ids)),  # pyright: ignore[reportArgumentType]
            batch_size=HELD_OUT_BATCH,
            collate_fn=lambda rows: batch(rows, self.pad),
        )

    def _collate_pairs(self, rows: list[PairRow]) -> list[PairBatch]:
        mine = self._pairs_of_rank(rows)
        return [pair_batch(g, self.pad) for g in micro_batches(mine, self.sft.micro_tokens)]

    def _pairs_of_rank(self, rows: list[PairRow]) -> list[PairRow]:
        unlearnt = [replace(row, targets=[IGNORED] * len(row.ids)) for row in rows[:1]]
        return list(share(rows, self.rank, self.world)) or unlearnt

    def _collate_prompts(self, rows: list[PromptRow]) -> PromptBatch:
        # the anchor's rows follow from the prompts drawn, so that a resumed run repeats them
        chance = generator(self.seed, *(len(row.ids) for row in rows))
        chosen = randperm(len(self.general), generator=chance)[: self.dcr.nll.general_batch_size]
        general = self._pairs_of_rank([self.general[i] for i in chosen.tolist()])
        unlearnt = replace(rows[0], label=NO_CLASS, nll=[IGNORED] * len(rows[0].ids))
        mine = share(rows, self.rank, self.world) or [unlearnt]
        return prompt_batch(mine, self.pad, general)
