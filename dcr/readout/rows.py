"""The rows of the readout and their order, drawn before a model is opened."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from dcr.core.config import ConfigError, Kind
from dcr.core.config.training import ReadoutConfig, SFTConfig, TrainConfig
from dcr.core.data import Cleaning, Splits, group_of, split_by_group
from dcr.core.data.rows import (
    NO_CLASS,
    SEEMINGLY_TOXIC,
    TOXIC,
    by_length,
    generator,
    in_rounds,
    parted,
    permutation,
)
from dcr.core.prompts import IGNORED, ChatFormat
from dcr.core.refusal.keywords import is_refusal
from dcr.core.sources import Example

if TYPE_CHECKING:
    from torch import Generator

GENERAL_ROWS = 2  # instruction rows in a step, to whose answers the model is held
OPENING = 4  # tokens of a refusal: those that tell "I can't help" from "I can help"
ANSWER = 64  # tokens of an answer that may be looked at
ANSWER_PLACES = 24  # so many of these are drawn, once; the first is looked at in any case
HELD_OUT_ROWS = 64  # on which drift is measured
ROUNDS = 8  # parts of the steps, at most, after each of which held-out rows are measured


def with_pairs(rows: Splits, readout: ReadoutConfig, seed: int, cleaning: Cleaning) -> Splits:
    """The rows with the readout's pairs; a share of topics is held out from both kinds alike."""
    parts: dict[str, list[Example]] = {}
    unseen = set(rows.unseen_groups)
    safe, toxic = (
        cleaning.clean(f"readout_{kind.value}", kind, getattr(readout, kind.value))
        for kind in (Kind.seemingly_toxic, Kind.toxic)
    )
    toxic = cleaning.of_one_kind("readout_toxic", toxic, safe)
    for kind, rows_of_kind in ((Kind.seemingly_toxic, safe), (Kind.toxic, toxic)):
        name, names = f"readout_{kind.value}", getattr(readout, kind.value)
        by_topic = [replace(row, group=row.category or row.group) for row in rows_of_kind]
        kept, heldout = split_by_group(by_topic, readout.heldout, seed)
        if not kept:
            raise ConfigError(f"sft.readout.{kind.value}: no row is left of {', '.join(names)}")
        parts |= {name: kept, f"{name}_heldout": heldout}
        learnt = {row.id for row in kept}
        unseen -= {group_of(row) for row in rows_of_kind if row.id in learnt}
    evaluated = cleaning.holding((*readout.seemingly_toxic, *readout.toxic))
    in_distribution = sorted({*rows.in_distribution, *evaluated})
    return replace(rows, **parts, in_distribution=in_distribution, unseen_groups=sorted(unseen))


@dataclass(frozen=True)
class ReadoutRow:
    """A row's id, its tokens, the positions that are read, and of a prompt its class.

    `opening` has the tokens that a refusal goes on with behind all positions but the first.
    """

    id: str
    ids: list[int]
    places: list[int]
    label: int = NO_CLASS
    opening: tuple[int, ...] = ()


class Rounds:
    """One place a step, in equal rounds of steps; Lightning's epochs are these rounds.

    `start` and `sampler` are as those of `EpochBatches`.
    """

    def __init__(self, places: Sequence[int]) -> None:
        self.places, self.start, self.epoch = places, 0, 0
        self.rounds = max(n for n in range(1, ROUNDS + 1) if len(places) % n == 0)
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.places) // self.rounds

    def __iter__(self) -> Iterator[list[int]]:
        first = len(self) * self.epoch
        for step in range(max(first, self.start), first + len(self)):
            yield [self.places[step]]


class ReadoutPass(NamedTuple):
    """The rows of one forward pass, and its number among all of the stage."""

    number: int
    rows: Sequence[ReadoutRow]


class ReadoutRows:
    """The passes of the readout, the same for the same seed, and on every rank.

    Attributes:
        drawn: the passes of a step: prompts of both kinds, and the answers that the model is held
            to beside them, if there are any.
        heldout_passes: prompts of both kinds, on which discernment is measured, then answers, on
            which drift is.
        sampler: the place in `drawn` that each step takes.
    """

    def __init__(self, rows: Splits, chat: ChatFormat, settings: TrainConfig) -> None:
        config, phase = settings.sft, settings.sft.readout
        drawing = generator(settings.seed, phase.steps)
        learnt = _alternating(
            readout_prompts(chat, reworded(rows.readout_toxic, rows.refusals), TOXIC),
            readout_prompts(chat, rows.readout_seemingly_toxic, SEEMINGLY_TOXIC),
            drawing,
        )
        watched = readout_prompts(chat, rows.readout_toxic_heldout, TOXIC)
        watched += readout_prompts(chat, rows.readout_seemingly_toxic_heldout, SEEMINGLY_TOXIC)
        pairs = parted(learnt, phase.batch_size)
        general = _general(chat, rows, config, len(pairs), drawing)
        ordinary = _answers(chat, rows.normal_heldout, HELD_OUT_ROWS, config.max_len, drawing)
        heldout = parted(by_length(watched), phase.batch_size)
        heldout += parted(by_length(ordinary), GENERAL_ROWS)
        numbers = itertools.count()
        prompts, answers, self.heldout_passes = (
            [ReadoutPass(next(numbers), part) for part in parts]
            for parts in (pairs, general, heldout)
        )
        self.drawn = [*zip(*filter(None, (prompts, answers)), strict=True)]
        self.sampler = Rounds(in_rounds(len(pairs), phase.steps, drawing))
        self.pad = 0

    def taken(self) -> list[ReadoutPass]:
        """The passes that some step takes, each once."""
        return sorted(each for place in {*self.sampler.places} for each in self.drawn[place])


def reworded(rows: Sequence[Example], refusals: Sequence[Example]) -> list[Example]:
    """Gives toxic rows SFT's own refusals in turn, whose first tokens suit any prompt.

    Only these tokens are learnt. Behind other wordings the model goes on to give advice.
    """
    words = [row.response for row in refusals if row.response and is_refusal(row.response)]
    if not words:
        return list(rows)
    return [replace(row, response=words[place % len(words)]) for place, row in enumerate(rows)]


def readout_prompts(chat: ChatFormat, rows: Sequence[Example], label: int) -> list[ReadoutRow]:
    """Prompts, read where the first answer token is; toxic ones with how their refusal goes on."""
    found: list[ReadoutRow] = []
    for row in rows:
        ids, said = chat.prompt_ids(row.prompt), list[int]()
        if label == TOXIC and row.response and is_refusal(row.response):
            whole, _ = chat.pair(row.prompt, row.response, len(ids) + OPENING)
            said = whole[len(ids) :]
        places = [*range(len(ids) - 1, len(ids) + max(1, len(said)) - 1)]
        found.append(ReadoutRow(row.id, [*ids, *said[:-1]], places, label, tuple(said[1:])))
    return found


def _general(
    chat: ChatFormat, rows: Splits, config: SFTConfig, steps: int, drawing: "Generator"
) -> list[Sequence[ReadoutRow]]:
    """The rows that the model is held to in each of as many steps.

    They are answers of instruction rows, refusals behind their opening, and answers to harmless
    prompts behind their first token.
    """
    harmless = [row for row in rows.readout_seemingly_toxic if row.response]
    kinds = [
        _answers(chat, part, GENERAL_ROWS * steps, config.max_len, drawing, skipped)
        for part, skipped in ((rows.normal, 0), (rows.refusals, OPENING), (harmless, 1))
    ]
    kinds[0] = by_length(kinds[0])
    several = [GENERAL_ROWS, 1, 1]
    chosen: list[Sequence[ReadoutRow]] = [
        [
            kind[(step * count + place) % len(kind)]
            for kind, count in zip(kinds, several, strict=True)
            for place in range(count if kind else 0)
        ]
        for step in range(steps)
    ]
    return chosen if any(kinds) else []


def _answers(
    chat: ChatFormat,
    rows: Sequence[Example],
    count: int,
    max_len: int,
    drawing: "Generator",
    skipped: int = 0,
) -> list[ReadoutRow]:
    """The first rows, read at the first answer token that is not `skipped` and some behind it."""
    found: list[ReadoutRow] = []
    for row in rows[:count]:
        ids, targets = chat.pair(row.prompt, row.response or "", max_len)
        answer = [place for place, target in enumerate(targets) if target != IGNORED]
        places = answer[skipped : skipped + ANSWER]
        drawn = permutation(len(places), drawing)[:ANSWER_PLACES]
        if places:
            chosen = sorted({0, *drawn})
            found.append(ReadoutRow(row.id, ids[: places[-1] + 1], [places[i] for i in chosen]))
    return found


def _alternating(
    toxic: Sequence[ReadoutRow], safe: Sequence[ReadoutRow], drawing: "Generator"
) -> list[ReadoutRow]:
    """The rows of both kinds in turn, each in a drawn order, the fewer of them more than once.

    In batches of one kind, or of one length, nearly nothing is learnt in as many steps.
    """
    count = max(len(toxic), len(safe))
    drawn = [
        [rows[place] for place in in_rounds(len(rows), count, drawing)] for rows in (toxic, safe)
    ]
    return [row for both in zip(*drawn, strict=True) for row in both]
