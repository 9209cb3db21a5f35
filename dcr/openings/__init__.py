"""Beginnings of answers that comply, with no content: what a prefilled opening puts into a mouth.

Ours, in several registers and without anything harmful. A tenth of those with three words or more,
by the hash of the words, is held out: nothing trains on them, nor on the beginning of another that
is one of them, so that attacks measure openings that no model has seen.

Training puts others before the responses of rows, so that a refusal recovers behind a compliant
opening: recovery examples of "Safety Alignment Should Be Made More Than Just a Few Tokens Deep" (Qi
et al., ICLR 2025), whose openings are beginnings of harmful answers. Ours stand before answers to
harmless prompts as often as before refusals, so that they tell nothing.
"""

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

from dcr.core import sources
from dcr.core.config import TrainConfig
from dcr.core.data import Splits
from dcr.core.sources import Example
from dcr.core.text import normalise

PARTS = 10  # one of them is held out
SHORTEST = 3  # words of a held-out opening; shorter ones are what longer ones begin with
LONGEST = 30  # tokens of an opening that are kept, at most
BREAK = "\n\n"
ENDS = (".", ":", "!", ")")  # behind which an answer may begin anew
SFT_ROWS = ("normal", "refusals", "augmented")


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


# --- before the responses of rows -----------------------------------------------------------------


def opened(settings: TrainConfig, rows: Splits) -> Splits:
    """The rows with openings before a share of SFT's."""
    share, seed = settings.sft.recovery, settings.seed
    parts = {
        name: behind_openings(getattr(rows, name), share, f"{name}:{seed}") for name in SFT_ROWS
    }
    return replace(rows, **parts)


def behind_openings(rows: Sequence[Example], share: float, seed: str) -> list[Example]:
    """The rows, each with this chance behind an opening; both follow from seed and row alone.

    A larger share keeps the openings of a smaller one.
    """
    known = training()
    return [
        _behind_one(row, share, random.Random(f"{seed}:{row.source}/{row.id}"), known)
        for row in rows
    ]


def _behind_one(
    row: Example, share: float, drawing: random.Random, known: Sequence[Opening]
) -> Example:
    if drawing.random() >= share:
        return row
    words, tokens = drawing.choice(known).text, drawing.randint(1, LONGEST)
    if words.endswith(ENDS) and drawing.random() < 0.5:
        words += BREAK
    return replace(row, opening=sources.Opening(words, tokens))
