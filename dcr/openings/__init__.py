"""Beginnings of answers that comply, with no content: what a prefilled opening puts into a mouth.

Ours, in several registers and without anything harmful. A tenth of those with three words or more,
by the hash of the words, is held out for attacks. The others are for training: no model of ours
learns them today, since what was tried cost too much (docs/history.md, "Refusals behind an
opening").
"""

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from dcr.core.text import normalise

PARTS = 10  # one of them is held out
SHORTEST = 3  # words of a held-out opening; shorter ones are what longer ones begin with


@dataclass(frozen=True)
class Opening:
    """One beginning of an answer, without white space at its ends; `register` is how it speaks."""

    id: str
    register: str
    text: str

    @property
    def held_out(self) -> bool:
        words = normalise(self.text)
        digest = hashlib.sha256(words.encode()).digest()
        long = len(words.split()) >= SHORTEST
        return long and int.from_bytes(digest[:8], "big") % PARTS == 0


@functools.cache
def corpus() -> tuple[Opening, ...]:
    """Every opening, in the order of the file."""
    lines = resources.files(__name__).joinpath("openings.jsonl").read_text("utf-8").splitlines()
    return tuple(Opening(**json.loads(line)) for line in lines)


def training() -> list[Opening]:
    """The openings that training may draw."""
    return [opening for opening in corpus() if not opening.held_out]


def held_out() -> list[Opening]:
    """The openings that only attacks use."""
    return [opening for opening in corpus() if opening.held_out]


def draw(openings: Sequence[Opening], count: int, seed: int) -> list[Opening]:
    """So many of the openings in drawn order, each as often as any other up to one.

    The first n of a larger draw are the smaller draw of n. Raises ValueError for no openings.
    """
    if not openings:
        raise ValueError("openings: there is none to draw from")
    drawing = random.Random(f"openings:{seed}")
    drawn: list[Opening] = []
    while len(drawn) < count:
        drawn += drawing.sample(openings, len(openings))
    return drawn[:count]
