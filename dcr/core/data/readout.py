"""The readout's batches, and which of them its steps take: drawn before a model is opened."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dcr.core import machine
from dcr.core.config import SFTConfig
from dcr.core.data.rows import (
    NO_CLASS,
    SEEMINGLY_TOXIC,
    TOXIC,
    generator,
    opening_ids,
    permutation,
)
from dcr.core.data.splits import Splits
from dcr.core.prompts import IGNORED, ChatFormat
from dcr.core.refusal import is_refusal
from dcr.core.sources import Example

if TYPE_CHECKING:
    from torch import Generator

GENERAL_ROWS = 2  # instruction rows in a step, to whose answers the model is held
OPENING = 4  # tokens of a refusal: those that tell "I can't help" from "I can help"
ANSWER = 64  # tokens of an answer that may be looked at
ANSWER_PLACES = 24  # of them are, drawn once, and the first always
HELD_OUT_ROWS = 64  # on which drift is measured
ROUNDS = 8  # parts of the steps, at most, after each of which held-out rows are measured


@dataclass(frozen=True)
class Row:
    """A row's id, its tokens, the positions that are read, and of a prompt its class.

    `opening` has the tokens that a refusal goes on with behind the last positions. The one before
    those decides behind an opening where a prompt has one, and the first decides always.
    """

    id: str
    ids: list[int]
    places: list[int]
    label: int = NO_CLASS
    opening: tuple[int, ...] = ()

    @property
    def decides(self) -> list[int]:
        """The class of a prompt at each position that decides behind an opening, else NO_CLASS."""
        behind = len(self.places) - len(self.opening) - 1 if self.label != NO_CLASS else 0
        return [self.label if behind and i == behind else NO_CLASS for i in range(len(self.places))]


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


@dataclass(frozen=True)
class ReadoutRows:
    """Batches of rows, and which of them every step takes.

    Attributes:
        steps: of each step the places of its batches in `pairs` and `general`.
        pairs: prompts of both kinds.
        general: beside each of them the answers that the model is held to; or none at all.
        watched: held-out prompts of both kinds, on which discernment is measured.
        ordinary: held-out answers, on which drift is measured.
    """

    steps: list[int]
    pairs: list[Sequence[Row]]
    general: list[Sequence[Row]]
    watched: list[Sequence[Row]]
    ordinary: list[Sequence[Row]]

    @property
    def batches(self) -> list[Sequence[Row]]:
        """Every batch; its place here is its number."""
        return [*self.pairs, *self.general, *self.watched, *self.ordinary]

    def of_step(self, place: int) -> list[int]:
        """The numbers of the batches of a step: of prompts, and of answers where there are any."""
        return [place, len(self.pairs) + place] if self.general else [place]

    @property
    def measured(self) -> range:
        """The numbers of the held-out batches."""
        held = len(self.watched) + len(self.ordinary)
        return range(len(self.batches) - held, len(self.batches))


def readout_rows(chat: ChatFormat, rows: Splits, config: SFTConfig, seed: int) -> ReadoutRows:
    """Draws every batch that `config.readout` asks for, the same for the same seed."""
    phase, drawing = config.readout, generator(seed, config.readout.steps)
    learnt = _alternating(
        readout_prompts(chat, _reworded(rows.readout_toxic, rows.refusals), TOXIC),
        readout_prompts(chat, rows.readout_seemingly_toxic, SEEMINGLY_TOXIC),
        drawing,
    )
    watched = readout_prompts(chat, rows.readout_toxic_heldout, TOXIC)
    watched += readout_prompts(chat, rows.readout_seemingly_toxic_heldout, SEEMINGLY_TOXIC)
    pairs = _parted(learnt, phase.batch_size)
    general = _general(chat, rows, config, len(pairs), drawing)
    answers = _answers(chat, rows.normal_heldout, HELD_OUT_ROWS, config.max_len, drawing)
    rounds = math.ceil(phase.steps / len(pairs))
    steps = [place for _ in range(rounds) for place in permutation(len(pairs), drawing)]
    return ReadoutRows(
        steps=steps[: phase.steps],
        pairs=pairs,
        general=general,
        watched=_parted(_by_length(watched), phase.batch_size),
        ordinary=_parted(_by_length(answers), GENERAL_ROWS),
    )


def _reworded(rows: Sequence[Example], refusals: Sequence[Example]) -> list[Example]:
    """Toxic rows with SFT's refusals in turn, since behind another's words it goes on with advice.

    Only the first tokens of a refusal are learnt here, which suit any prompt.
    """
    words = [row.response for row in refusals if row.response and is_refusal(row.response)]
    if not words:
        return list(rows)
    return [replace(row, response=words[place % len(words)]) for place, row in enumerate(rows)]


def readout_prompts(chat: ChatFormat, rows: Sequence[Example], label: int) -> list[Row]:
    """Prompts, read where the first answer token is; toxic ones with how their refusal goes on.

    Those with an opening are read where the first token behind it is as well, and refusals go on
    from there.
    """
    found: list[Row] = []
    for row in rows:
        asked, behind, said = chat.prompt_ids(row.prompt), opening_ids(chat, row), list[int]()
        ids = [*asked, *behind]
        if label == TOXIC and row.response and is_refusal(row.response):
            whole, _ = chat.pair(row.prompt, row.response, len(ids) + OPENING, opening=behind)
            said = whole[len(ids) :]
        last = len(ids) + max(1, len(said)) - 1
        places = [*([len(asked) - 1] if behind else []), *range(len(ids) - 1, last)]
        found.append(Row(row.id, [*ids, *said[:-1]], places, label, tuple(said[1:])))
    return found


def _general(
    chat: ChatFormat, rows: Splits, config: SFTConfig, steps: int, drawing: "Generator"
) -> list[Sequence[Row]]:
    """The rows that the model is held to in each of as many steps.

    They are answers of instruction rows, refusals behind their opening, and answers to harmless
    prompts behind their first token.
    """
    harmless = [row for row in rows.readout_seemingly_toxic if row.response]
    kinds = [
        _answers(chat, part, GENERAL_ROWS * steps, config.max_len, drawing, skipped)
        for part, skipped in ((rows.normal, 0), (rows.refusals, OPENING), (harmless, 1))
    ]
    kinds[0] = _by_length(kinds[0])
    several = [GENERAL_ROWS, 1, 1]
    chosen: list[Sequence[Row]] = [
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
) -> list[Row]:
    """The first rows, read at the first answer token that is not `skipped` and some behind it."""
    found: list[Row] = []
    for row in rows[:count]:
        opening = opening_ids(chat, row)
        ids, targets = chat.pair(row.prompt, row.response or "", max_len, opening=opening)
        answer = [place for place, target in enumerate(targets) if target != IGNORED]
        places = answer[skipped : skipped + ANSWER]
        drawn = permutation(len(places), drawing)[:ANSWER_PLACES]
        if places:
            chosen = sorted({0, *drawn})
            found.append(Row(row.id, ids[: places[-1] + 1], [places[i] for i in chosen]))
    return found


def _alternating(toxic: Sequence[Row], safe: Sequence[Row], drawing: "Generator") -> list[Row]:
    """The rows of both kinds in turn, each in a drawn order, the fewer of them more than once.

    In batches of one kind, or of one length, nearly nothing is learnt in as many steps.
    """
    count = max(len(toxic), len(safe))
    drawn = []
    for rows in (toxic, safe):
        rounds = math.ceil(count / len(rows))
        order = [place for _ in range(rounds) for place in permutation(len(rows), drawing)]
        drawn.append([rows[place] for place in order[:count]])
    return [row for both in zip(*drawn, strict=True) for row in both]


def _by_length(rows: Sequence[Row]) -> list[Row]:
    return [rows[place] for place in machine.by_length([row.ids for row in rows])]


def _parted(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]
