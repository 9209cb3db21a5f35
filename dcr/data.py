"""Which rows each stage sees, in which order: splits, samplers, batches, the shared DataModule."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from dcr import contamination, sources
from dcr.config import ConfigError, ContrastiveConfig, DataConfig, Kind, NLLSource, SFTConfig
from dcr.config import Sampler as SamplerName
from dcr.config import Stage
from dcr.prompts import IGNORED, ChatFormat, PairRow, PromptRow, attention_mask, padded
from dcr.sources import Example

TOXIC, SEEMINGLY_TOXIC = 1, 0  # class labels of stage one (Section 6)
CONTRASTIVE_NODES = ("seemingly_toxic", "toxic")
HELD_OUT_PAIRS = 64  # prompts a class that stage one is watched on; more would only cost time


# --- splits -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Splits:
    """The rows of a run: disjoint, drawn by seed, with what was dropped and why."""

    seemingly_toxic: list[Example]
    toxic: list[Example]
    seemingly_toxic_heldout: list[Example]
    toxic_heldout: list[Example]
    normal: list[Example]
    refusals: list[Example]
    normal_heldout: list[Example]
    refusals_heldout: list[Example]
    dropped: dict[str, int] = field(default_factory=dict)
    in_distribution: list[str] = field(default_factory=list)
    unseen_groups: list[str] = field(default_factory=list)

    def parts(self) -> dict[str, list[Example]]:
        """Every list of rows by its name."""
        return {
            name: rows
            for name, rows in vars(self).items()
            if isinstance(rows, list) and (not rows or isinstance(rows[0], Example))
            and name not in ("in_distribution", "unseen_groups")
        }


def split(
    config: DataConfig,
    ratio: float | None,
    seed: int,
    contrastive: bool,
    refuses: Callable[[str], bool],
) -> Splits:
    """Read every source and draw the rows of both stages (Section 7.1).

    The safety pairs of SFT are drawn first and the toxic prompts of stage one from the rest, so
    the two are disjoint and a ratio sweep leaves SFT untouched. Rows too near an evaluation
    prompt are dropped and counted, save those of a source that is itself evaluated on, which
    make that set in-distribution.

    `ratio` is toxic rows per seemingly toxic one, None for every toxic row left. Without
    `contrastive` the lists of stage one stay empty. `refuses` judges a response.
    Raises ConfigError when a source holds fewer rows than asked for.
    """
    tally = _Tally(config)
    normal = tally.clean("normal", Kind.normal)
    pairs = tally.clean("safety", Kind.toxic)
    if config.safety.refusals_only:
        pairs = [row for row in pairs if row.response and refuses(row.response)]
    pairs = _with_response(pairs, "data.safety")
    normal = _with_response(normal, "data.normal")
    refusals, refusals_left = _draw(pairs, config.safety.count, seed, "data.safety.count")
    general, general_left = _draw(normal, config.normal.count, seed, "data.normal.count")
    kept = round(config.validation * len(general)), round(config.validation * len(refusals))
    parts = {
        "normal": general,
        "refusals": refusals,
        "normal_heldout": general_left[: kept[0]],
        "refusals_heldout": refusals_left[: kept[1]],
    }
    one = _contrastive_rows(config, ratio, seed, refusals, tally) if contrastive else ([], [], [], [])
    return Splits(
        *one, **parts, dropped=tally.dropped, in_distribution=tally.in_distribution(contrastive),
        unseen_groups=tally.unseen,
    )


def _contrastive_rows(
    config: DataConfig, ratio: float | None, seed: int, taken: list[Example], tally: "_Tally"
) -> tuple[list[Example], list[Example], list[Example], list[Example]]:
    safe = tally.clean("seemingly_toxic", Kind.seemingly_toxic)
    used = {contamination.normalise(row.prompt) for row in taken}
    toxic = tally.clean("toxic", Kind.toxic)
    toxic = [row for row in toxic if contamination.normalise(row.prompt) not in used]
    safe_unseen: list[Example] = []
    toxic_unseen: list[Example] = []
    if config.group_holdout > 0:
        safe, safe_unseen = sources.split_by_group(safe, config.group_holdout, seed)
        toxic, toxic_unseen = sources.split_by_group(toxic, config.group_holdout, seed)
        tally.unseen = sorted({r.group or r.id for r in [*safe_unseen, *toxic_unseen]})
    safe, safe_left = _draw(safe, config.seemingly_toxic.count, seed, "data.seemingly_toxic.count")
    asked = None if ratio is None else round(ratio * len(safe))
    toxic, toxic_left = _draw(toxic, asked, seed, f"dcr.ratio={ratio}")
    for name, rows in (("seemingly toxic", safe), ("toxic", toxic)):
        if not rows:
            raise ConfigError(f"data: no {name} row is left for stage one; name another source")
    return (
        safe,
        toxic,
        (safe_unseen or safe_left)[:HELD_OUT_PAIRS],
        (toxic_unseen or toxic_left)[:HELD_OUT_PAIRS],
    )


class _Tally:
    """Reads and cleans the sources of one run, counting what it drops."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.dropped: dict[str, int] = {}
        self.unseen: list[str] = []
        self.evaluated = {
            name: [row.prompt for row in sources.read(name, root=config.root, kind=kind)]
            for kind, names in (
                (Kind.seemingly_toxic, config.evaluation.over_refusal),
                (Kind.toxic, config.evaluation.safety),
            )
            for name in names
        }

    def clean(self, node: str, kind: Kind) -> list[Example]:
        rows: list[Example] = []
        for name in getattr(self.config, node).source:
            read = sources.read(name, root=self.config.root, kind=kind)
            rows += self._apart_from_evaluation(node, name, read)
        rows, repeated = sources.drop_duplicates(rows)
        self._count(f"{node}: repeats another row", len(repeated))
        return rows

    def _apart_from_evaluation(self, node: str, name: str, rows: list[Example]) -> list[Example]:
        exempt = {name}
        if node in CONTRASTIVE_NODES:
            exempt |= self._relatives()
        against = {s: prompts for s, prompts in self.evaluated.items() if s not in exempt}
        if not self.config.drop_contaminated or not against:
            return rows
        found = contamination.overlaps(
            [row.prompt for row in rows], against, near=self.config.near_duplicate
        )
        for overlap in found:
            if overlap is not None:
                how = "is" if overlap.exact else "is close to"
                self._count(f"{node}: {how} a prompt of {overlap.set}", 1)
        return [row for row, overlap in zip(rows, found, strict=True) if overlap is None]

    def _relatives(self) -> set[str]:
        """Evaluation sets cut from the same file as a source of stage one.

        XSTest's safe and unsafe prompts are contrasts, near each other by design: dropping one
        for the other's sake would take the very rows that are meant to be learnt.
        """
        used = [n for node in CONTRASTIVE_NODES for n in getattr(self.config, node).source]
        files = {sources.SOURCES[n].file for n in used if n in sources.SOURCES} - {None}
        same = {n for n in self.evaluated if n in sources.SOURCES and sources.SOURCES[n].file in files}
        return same | set(used)

    def _count(self, reason: str, rows: int) -> None:
        if rows:
            self.dropped[reason] = self.dropped.get(reason, 0) + rows

    def in_distribution(self, contrastive: bool) -> list[str]:
        nodes = ["safety", "normal", *(CONTRASTIVE_NODES if contrastive else ())]
        used = {name for node in nodes for name in getattr(self.config, node).source}
        return sorted(used & set(self.evaluated))


def _with_response(rows: list[Example], key: str) -> list[Example]:
    answered = [row for row in rows if row.response]
    if rows and not answered:
        raise ConfigError(f"{key}.source: its rows have no response; name a source of pairs")
    return answered


def _draw(
    rows: list[Example], count: int | None, seed: int, key: str
) -> tuple[list[Example], list[Example]]:
    """`count` rows (all for None) and those left, both in drawn order."""
    if count is not None and count > len(rows):
        raise ConfigError(f"{key} asks for {count} rows: only {len(rows)} are left; ask for fewer")
    drawn = sources.draw(rows, len(rows), seed)
    return drawn[:count], drawn[count:] if count is not None else []


# --- batches ------------------------------------------------------------------------------------


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


# --- samplers -----------------------------------------------------------------------------------


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
    """Batches of row indices as a pure function of (seed, epoch, rank, world).

    A batch holds `batch_size` rows over all ranks; each rank yields its share. `start` optimiser
    steps are passed over, which is how a resumed run continues with the next one. Lightning
    announces epochs through the attribute `sampler`.
    """

    def __init__(
        self,
        order: Callable[[torch.Generator], list[int]],
        draws: int,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
    ) -> None:
        self.order, self.draws, self.batch_size, self.seed = order, draws, batch_size, seed
        self.drop_last = drop_last
        self.rank, self.world, self.start, self.epoch = 0, 1, 0, 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        rounded = math.floor if self.drop_last else math.ceil
        return max(1, rounded(self.draws / self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order(generator(self.seed, self.epoch))
        passed = min(max(self.start - self.epoch * len(self), 0), len(self))
        for index in range(passed, len(self)):
            batch = rows[index * self.batch_size : (index + 1) * self.batch_size]
            # a rank without rows would not join the gradient exchange: give it the first one
            yield batch[self.rank :: self.world] or batch[:1]


# --- the DataModule -----------------------------------------------------------------------------


class SafetyData(LightningDataModule):
    """Batches of one stage, for either LightningModule.

    Stage one yields PromptBatch, SFT a list of PairBatch (the micro-batches of one step). Call
    with the chat format of the model that is trained; tokenising happens once, in the main
    process, so that a bad row is named before training starts.
    """

    def __init__(
        self,
        stage: Stage,
        rows: Splits,
        chat: ChatFormat,
        dcr: ContrastiveConfig,
        sft: SFTConfig,
        seed: int,
    ) -> None:
        super().__init__()
        self.stage, self.seed, self.dcr, self.sft = stage, seed, dcr, sft
        self.pad = chat.tokenizer.pad_token_id
        self.pad = chat.stop[0] if self.pad is None else self.pad
        self.too_long: list[str] = []
        self.general = self._pairs(chat, rows.normal, refusal=False)
        if stage is Stage.contrastive:
            self.prompts = self._prompts(chat, rows.seemingly_toxic, rows.toxic)
            self.heldout = self._prompts(chat, rows.seemingly_toxic_heldout, rows.toxic_heldout)
            self._refuse_one_class()
        else:
            self.pairs = self.general + self._pairs(chat, rows.refusals, refusal=True)
            self.heldout = self._pairs(chat, rows.normal_heldout, refusal=False)
            self.heldout += self._pairs(chat, rows.refusals_heldout, refusal=True)
            if not self.pairs:
                raise ConfigError(f"sft.max_len={sft.max_len}: no training pair fits; raise it")
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

    def _prompts(
        self, chat: ChatFormat, safe: list[Example], toxic: list[Example]
    ) -> list[PromptRow]:
        user_nll = self.dcr.nll.source is NLLSource.user_tokens
        return [
            chat.feature_row(
                row.id, row.prompt, label, self.dcr.template, self.dcr.pooling, user_nll
            )
            for label, rows in ((SEEMINGLY_TOXIC, safe), (TOXIC, toxic))
            for row in rows
        ]

    def _refuse_one_class(self) -> None:
        if len({row.label for row in self.prompts}) < 2:
            raise ConfigError("data: stage one needs seemingly toxic and toxic prompts, both")

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
                self.dcr.drop_last,
            )
        count = len(self.pairs)
        return EpochBatches(
            lambda chance: torch.randperm(count, generator=chance).tolist(),
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
            self.sampler.rank, self.sampler.world = (
                self.trainer.global_rank,
                self.trainer.world_size,
            )
            self.sampler.start = self.trainer.global_step
        if self.stage is Stage.contrastive:
            return DataLoader(
                self.prompts,  # pyright: ignore[reportArgumentType]
                batch_sampler=self.sampler,
                collate_fn=self._collate_prompts,
            )
        return DataLoader(
            self.pairs,  # pyright: ignore[reportArgumentType]
            batch_sampler=self.sampler,
            collate_fn=self._collate_pairs,
        )

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        if not self.heldout:
            return []
        ordered = sorted(self.heldout, key=lambda row: len(row.ids))
        collate = (
            self._collate_heldout_prompts
            if self.stage is Stage.contrastive
            else lambda rows: pair_batch(rows, self.pad)
        )
        return DataLoader(ordered, batch_size=16, collate_fn=collate)  # pyright: ignore

    def _collate_pairs(self, rows: list[PairRow]) -> list[PairBatch]:
        groups = micro_batches(rows, self.sft.micro_tokens)
        return [pair_batch(group, self.pad) for group in groups]

    def _collate_heldout_prompts(self, rows: list[PromptRow]) -> PromptBatch:
        return prompt_batch(rows, self.pad)

    def _collate_prompts(self, rows: list[PromptRow]) -> PromptBatch:
        if self.dcr.nll.source is not NLLSource.general or not self.general:
            return prompt_batch(rows, self.pad)
        count = min(self.dcr.nll.general_batch_size, len(self.general))
        # the anchor's rows follow from the prompts drawn, so a resumed run repeats them
        chance = generator(self.seed, *(len(row.ids) for row in rows))
        chosen = torch.randperm(len(self.general), generator=chance)[:count].tolist()
        return prompt_batch(rows, self.pad, [self.general[i] for i in chosen])


def warn_of_forms(rows: Splits) -> str | None:
    """One line when the two classes differ plainly in grammatical form, else None."""
    return sources.form_gap(rows.seemingly_toxic, rows.toxic)


def row_record(rows: Splits) -> Mapping[str, object]:
    """Ids and fingerprint of every list of rows, for the run folder."""
    return {
        "rows": {
            name: {
                "count": len(part),
                "fingerprint": sources.fingerprint(part),
                "ids": [row.id for row in part],
            }
            for name, part in rows.parts().items()
        },
        "dropped": rows.dropped,
        "in_distribution": rows.in_distribution,
        "unseen_groups": rows.unseen_groups,
    }
