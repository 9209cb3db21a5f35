"""Beginnings of answers that comply, with no content: what a prefilled opening puts into a mouth.

Ours, in several registers and without anything harmful. A tenth of those with three words or more,
by the hash of the words, is held out: nothing trains on them, nor on the beginning of another that
is one of them, so that attacks measure openings that no model has seen.

SFT learns pairs behind the others, so that a refusal recovers behind a compliant opening: recovery
examples of "Safety Alignment Should Be Made More Than Just a Few Tokens Deep" (Qi et al., ICLR
2025), whose openings are beginnings of harmful answers. Ours stand before answers to prompts that
look as harmful as often as before refusals, so that the prompt decides.
"""

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

from dcr.core import sources
from dcr.core.config import ConfigError, TrainConfig
from dcr.core.data import Splits
from dcr.core.data.rows import reworded
from dcr.core.refusal import is_refusal
from dcr.core.sources import Example
from dcr.core.text import normalise

PARTS = 10  # one of them is held out
SHORTEST = 3  # words of a held-out opening; shorter ones are what longer ones begin with
LONGEST = 20  # tokens of an opening that are kept, at most
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


# --- pairs behind openings ------------------------------------------------------------------------


def opened(settings: TrainConfig, rows: Splits) -> Splits:
    """The rows, and for a share of SFT's a pair of the readout's behind an opening.

    Toxic prompts with refusals of SFT and seemingly toxic ones with their answers take turns.
    Raises ConfigError where there is none of either.
    """
    share, drawing = settings.sft.recovery, random.Random(f"recovery:{settings.seed}")
    toxic = [
        row for row in reworded(rows.readout_toxic, rows.refusals) if is_refusal(row.response or "")
    ]
    answered = [row for row in rows.readout_seemingly_toxic if row.response]
    if not toxic or not answered:
        raise ConfigError(
            f"sft.recovery={share}: needs seemingly toxic prompts with answers and toxic ones in "
            "sft.readout, and refusals in data.safety; name such sources, or set it to 0"
        )
    count = round(share * sum(len(getattr(rows, name)) for name in SFT_ROWS))
    turns = [drawing.sample(kind, len(kind)) for kind in (toxic, answered)]
    pairs = [turns[n % 2][n // 2 % len(turns[n % 2])] for n in range(count)]
    return replace(rows, recovery=behind_openings(pairs, drawing))


def behind_openings(rows: Sequence[Example], drawing: random.Random) -> list[Example]:
    """The rows, each behind an opening of any kind and length."""
    known = training()
    return [_behind_one(row, drawing, known) for row in rows]


def _behind_one(row: Example, drawing: random.Random, known: Sequence[Opening]) -> Example:
    words, tokens = drawing.choice(known).text, drawing.randint(1, LONGEST)
    if words.endswith(ENDS) and drawing.random() < 0.5:
        words += BREAK
    return replace(row, opening=sources.Opening(words, tokens))
