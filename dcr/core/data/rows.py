"""The tokenised rows of each stage, their order, which of them each step looks at, and batches.

The order is a function of seed and epoch, the same on every rank.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

from jaxtyping import Bool, Int

from dcr.core import machine
from dcr.core.config import ConfigError, DataError, Stage
from dcr.core.config.training import NLLSource, Pooling, Sampler, SFTConfig, TrainConfig
from dcr.core.data import Splits
from dcr.core.machine import attention_mask, padded
from dcr.core.prompts import IGNORED, ChatFormat
from dcr.core.sources import Example

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch import device as Device
else:
    Tensor = Any  # torch is imported in functions: a user's error does not wait for it

Row = TypeVar("Row")
Moved = TypeVar("Moved", bound="Batch")

TOXIC, SEEMINGLY_TOXIC = 1, 0  # class labels of stage one (Section 5)
NO_CLASS = -1  # of a row that only keeps a rank in step with the others: no loss looks at it
HELD_OUT_BATCH = 16  # rows of one validation pass


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


# --- the order, a function of seed and epoch ------------------------------------------------------


def generator(*seeds: int) -> "Generator":
    """Torch's generator on the CPU, seeded by all of the numbers: the same on every machine."""
    import torch

    seed = 0
    for number in seeds:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(seed)


def permutation(count: int, generator: "Generator") -> list[int]:
    """The numbers below `count` in drawn order."""
    import torch

    return torch.randperm(count, generator=generator).tolist()


def balanced_draws(labels: Sequence[int], draws: int, generator: "Generator") -> list[int]:
    """With replacement, weight one over the class count: the classes come up equally often."""
    import torch

    of = torch.as_tensor(labels)
    _, classes, counts = torch.unique(of, return_inverse=True, return_counts=True)
    weights = 1 / counts.double()[classes]
    return torch.multinomial(weights, draws, replacement=True, generator=generator).tolist()


def in_rounds(count: int, draws: int, generator: "Generator") -> list[int]:
    """So many draws of the numbers below `count`: each once in drawn order, again and again."""
    rounds = math.ceil(draws / count)
    return [each for _ in range(rounds) for each in permutation(count, generator)][:draws]


DRAWS = {
    Sampler.balanced: balanced_draws,
    # classes come up as often as they are
    Sampler.proportional: lambda labels, *drawn: in_rounds(len(labels), *drawn),
}


class EpochBatches:
    """Batches of row indices as a pure function of (seed, epoch), the same on every rank.

    A batch holds the `batch_size` rows of all ranks, of which each takes its `share`. `start`
    optimiser steps are passed over, which is how a resumed run continues with the next one.
    Lightning announces epochs through the attribute `sampler`.
    """

    def __init__(
        self, order: "Callable[[Generator], list[int]]", draws: int, batch_size: int, seed: int
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


# --- the rows of stage one and SFT ----------------------------------------------------------------


def micro_batches(rows: Sequence[PairRow], tokens: int) -> list[list[PairRow]]:
    """Rows of one optimiser step in groups of similar length, at most `tokens` padded tokens each.

    A row longer than that gets a group of its own.
    """
    groups = machine.by_tokens([row.ids for row in rows], tokens)
    return [[rows[place] for place in places] for places in groups]


def none_fits(config: SFTConfig) -> ConfigError:
    return ConfigError(f"sft.max_len={config.max_len}: no training pair fits; raise it")


def prompt_rows(
    chat: ChatFormat,
    examples: Sequence[Example],
    label: int,
    context: int | None,
    pooling: Pooling = Pooling.last,
) -> list[PromptRow]:
    """Prompts of stage one, with the positions of their features and the targets of their NLL.

    The paper names neither: `pooling` chooses the positions, and every next token is a target.
    Raises DataError for a prompt of more than `context` tokens.
    """
    rows = []
    for example in examples:
        ids = chat.prompt_ids(example.prompt)
        if context is not None and len(ids) > context:
            raise DataError(
                f"{example.source}: {example.id}: its {len(ids)} tokens exceed the model's "
                f"context of {context}; shorten or remove it"
            )
        # position 0 is an attention sink with a huge norm
        first = len(ids) - 1 if pooling is Pooling.last else min(1, len(ids) - 1)
        rows.append(PromptRow(example.id, ids, label, (first, len(ids)), [*ids[1:], IGNORED]))
    return rows


class StageRows:
    """The rows of one stage as training reads them: tokens, order, and a rank's part of a step.

    Call with the chat format of the model that is trained, and with its `context` in tokens if
    known; tokenising happens once, in the main process, so that a bad row is named before training
    starts. Of every global batch a rank sees its share, or one row that no loss looks at where it
    has none, since a rank without a batch would not join in the exchange of gradients.

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
        self.stage, self.seed = stage, settings.seed
        self.dcr, self.sft = settings.dcr, settings.sft
        pad: Any = chat.tokenizer.pad_token_id
        self.pad: int = chat.stop[0] if pad is None else pad
        self.rank, self.world, self.sharded = 0, 1, False
        self.too_long: list[str] = []  # ids of pairs without room for a response
        self.general: list[PairRow] = []  # what the NLL of stage one looks at with source=general
        self.prompts, self.pairs = list[PromptRow](), list[PairRow]()  # of stage one, and of SFT
        if stage is Stage.contrastive:
            self.prompts = self._prompts(chat, rows.seemingly_toxic, rows.toxic, context)
            heldout = (rows.seemingly_toxic_heldout, rows.toxic_heldout)
            self.heldout = self._prompts(chat, *heldout, context)
            if len({row.label for row in self.prompts}) < 2:
                raise ConfigError("data: stage one needs seemingly toxic and toxic prompts, both")
            if self.dcr.nll.source is NLLSource.general and self.dcr.nll.weight > 0:
                if not rows.normal:
                    raise ConfigError(
                        "dcr.nll.source=general: data.normal.source has no rows; name another"
                    )
                self.general = self._pairs(chat, rows.normal, refusal=False)
                if not self.general:
                    raise none_fits(self.sft)
        else:
            self.pairs = self._pairs(chat, rows.normal, refusal=False)
            self.pairs += self._pairs(chat, rows.refusals, refusal=True)
            self.pairs += self._pairs(chat, rows.augmented, refusal=False)
            if not self.pairs:
                raise none_fits(self.sft)
            self.heldout = self._pairs(chat, rows.normal_heldout, refusal=False)
            self.heldout += self._pairs(chat, rows.refusals_heldout, refusal=True)
        self.drawn = self.prompts or self.pairs
        self.sampler = self._sampler()

    def _prompts(
        self, chat: ChatFormat, safe: list[Example], toxic: list[Example], context: int | None
    ) -> list[PromptRow]:
        return [
            row
            for label, part in ((SEEMINGLY_TOXIC, safe), (TOXIC, toxic))
            for row in prompt_rows(chat, part, label, context, self.dcr.pooling)
        ]

    def _pairs(self, chat: ChatFormat, rows: list[Example], refusal: bool) -> list[PairRow]:
        made, encoded = [], cache(chat.pair)  # a plan's placeholders are all alike
        for row in rows:
            response, sft = row.response or "", self.sft
            ids, targets = encoded(row.prompt, response, sft.max_len, sft.train_on_prompt)
            if ids:
                made.append(PairRow(row.id, ids, targets, refusal))
            else:
                self.too_long.append(row.id)
        return made

    def _sampler(self) -> EpochBatches:
        if self.stage is Stage.contrastive:
            labels = [row.label for row in self.prompts]
            draws, size = self.dcr.draws or len(labels), self.dcr.batch_size
            order = partial(DRAWS[self.dcr.sampler], labels, draws)
        else:
            draws, size = len(self.pairs), self.sft.batch_size
            order = partial(permutation, draws)
        return EpochBatches(order, draws, size, self.seed)

    def sft_step(self, rows: Sequence[PairRow]) -> list[list[PairRow]]:
        """The micro-batches of this rank among a step's pairs, equally many on all if sharded.

        Ranks gather weights together then, in every forward and backward pass.
        """
        groups = self._groups(rows, self.rank)
        if self.sharded:
            most = max(len(self._groups(rows, rank)) for rank in range(self.world))
            groups += [_unlearnt(rows)] * (most - len(groups))
        return groups

    def _groups(self, rows: Sequence[PairRow], rank: int) -> list[list[PairRow]]:
        mine = list(share(rows, rank, self.world)) or _unlearnt(rows)
        return micro_batches(mine, self.sft.micro_tokens)

    def contrastive_step(
        self, rows: Sequence[PromptRow]
    ) -> tuple[Sequence[PromptRow], list[PairRow]]:
        """The prompts of this rank among a step's, and the general pairs that anchor them."""
        # the anchor's rows follow from the prompts drawn, so that a resumed run repeats them
        drawing = generator(self.seed, *(len(row.ids) for row in rows))
        chosen = permutation(len(self.general), drawing)[: self.dcr.nll.general_batch_size]
        unlearnt = replace(rows[0], label=NO_CLASS, nll=[IGNORED] * len(rows[0].ids))
        mine = share(rows, self.rank, self.world) or [unlearnt]
        general = [self.general[place] for place in chosen]
        return mine, list(share(general, self.rank, self.world)) or _unlearnt(general)

    @property
    def heldout_passes(self) -> list[Sequence[Any]]:
        """Held-out rows by length, as many at once as a validation pass takes."""
        return parted(by_length(self.heldout), HELD_OUT_BATCH)


def _unlearnt(rows: Sequence[PairRow]) -> list[PairRow]:
    """A row that no loss looks at."""
    return [replace(row, targets=[IGNORED] * len(row.ids)) for row in rows[:1]]


def by_length(rows: Sequence[Any]) -> list[Any]:
    return [rows[place] for place in machine.by_length([row.ids for row in rows])]


def parted(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


# --- batches: rows padded for one forward pass ----------------------------------------------------


class Batch:
    """Tensors of one step, which Lightning moves to a device together."""

    def to(self: Moved, device: "Device", non_blocking: bool = False) -> Moved:
        tensors = {name: part for name, part in vars(self).items() if hasattr(part, "to")}
        moved = {name: of.to(device, non_blocking=non_blocking) for name, of in tensors.items()}
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
    import torch

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
    import torch

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


# of a step, and of held-out rows
BATCHES = {Stage.contrastive: (_contrastive_step, prompt_batch), Stage.sft: (_sft_step, pair_batch)}
