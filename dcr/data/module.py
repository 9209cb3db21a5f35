"""The LightningDataModule of both stages: tokenised rows, ordered and padded."""

from dataclasses import replace
from typing import Any

from lightning import LightningDataModule
from torch import randperm
from torch.utils.data import DataLoader

from dcr.config import ConfigError, ContrastiveConfig, DataError, NLLSource, SFTConfig, Stage
from dcr.data.batches import (
    DRAWS,
    NO_CLASS,
    SEEMINGLY_TOXIC,
    TOXIC,
    EpochBatches,
    PairBatch,
    PromptBatch,
    generator,
    micro_batches,
    pair_batch,
    prompt_batch,
    share,
)
from dcr.data.splits import Splits
from dcr.prompts import IGNORED, ChatFormat, PairRow, PromptRow
from dcr.sources import Example

HELD_OUT_BATCH = 16


def check_lengths(chat: ChatFormat, rows: Splits, config: SFTConfig, context: int) -> None:
    """Raises ConfigError where the model cannot read `sft.max_len` tokens or no pair fits."""
    if config.max_len > context:
        raise ConfigError(
            f"sft.max_len={config.max_len}: the model's context is {context} tokens; lower it"
        )
    pairs = (*rows.normal, *rows.refusals, *rows.augmented)
    fits = (chat.pair(row.prompt, row.response or "", config.max_len)[0] for row in pairs)
    if not any(fits):
        raise ConfigError(f"sft.max_len={config.max_len}: no training pair fits; raise it")


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
        dcr: ContrastiveConfig,
        sft: SFTConfig,
        seed: int,
        context: int | None = None,
    ) -> None:
        super().__init__()
        self.stage, self.seed, self.dcr, self.sft, self.context = stage, seed, dcr, sft, context
        pad: Any = chat.tokenizer.pad_token_id
        self.pad: int = chat.stop[0] if pad is None else pad
        self.rank, self.world = 0, 1
        self.too_long: list[str] = []  # ids of pairs without room for a response
        self.general: list[PairRow] = []  # what the NLL of stage one looks at with source=general
        if stage is Stage.contrastive:
            self.prompts = self._prompts(chat, rows.seemingly_toxic, rows.toxic)
            self.heldout = self._prompts(chat, rows.seemingly_toxic_heldout, rows.toxic_heldout)
            if len({row.label for row in self.prompts}) < 2:
                raise ConfigError("data: stage one needs seemingly toxic and toxic prompts, both")
            if dcr.nll.source is NLLSource.general and dcr.nll.weight > 0:
                self.general = self._pairs(chat, rows.normal, refusal=False)
                self._refuse_none(self.general)
        else:
            self.pairs = self._pairs(chat, rows.normal, refusal=False)
            self.pairs += self._pairs(chat, rows.refusals, refusal=True)
            self.pairs += self._pairs(chat, rows.augmented, refusal=False)
            self._refuse_none(self.pairs)
            self.heldout = self._pairs(chat, rows.normal_heldout, refusal=False)
            self.heldout += self._pairs(chat, rows.refusals_heldout, refusal=True)
        self.sampler = self._sampler()

    def _pairs(self, chat: ChatFormat, rows: list[Example], refusal: bool) -> list[PairRow]:
        made = []
        for row in rows:
            ids, targets = chat.pair(
                row.prompt, row.response or "", self.sft.max_len, self.sft.train_on_prompt
            )
            if ids:
                made.append(PairRow(row.id, ids, targets, refusal))
            else:
                self.too_long.append(row.id)
        return made

    def _refuse_none(self, pairs: list[PairRow]) -> None:
        if not pairs:
            raise ConfigError(f"sft.max_len={self.sft.max_len}: no training pair fits; raise it")

    def _prompts(
        self, chat: ChatFormat, safe: list[Example], toxic: list[Example]
    ) -> list[PromptRow]:
        user_nll = self.dcr.nll.source is NLLSource.user_tokens
        made = []
        for label, rows in ((SEEMINGLY_TOXIC, safe), (TOXIC, toxic)):
            for row in rows:
                prompt = chat.feature_row(
                    row.id, row.prompt, label, self.dcr.template, self.dcr.pooling, user_nll
                )
                if self.context is not None and len(prompt.ids) > self.context:
                    raise DataError(
                        f"{row.source}: {row.id}: its {len(prompt.ids)} tokens exceed the model's "
                        f"context of {self.context}; shorten or remove it"
                    )
                made.append(prompt)
        return made

    def _sampler(self) -> EpochBatches:
        if self.stage is Stage.contrastive:
            labels = [row.label for row in self.prompts]
            draws = self.dcr.draws or len(labels)
            drawn = DRAWS[self.dcr.sampler]
            return EpochBatches(
                lambda chance: drawn(labels, draws, chance),
                draws,
                self.dcr.batch_size,
                self.seed,
            )
        count = len(self.pairs)
        return EpochBatches(
            lambda chance: randperm(count, generator=chance).tolist(),
            count,
            self.sft.batch_size,
            self.seed,
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
