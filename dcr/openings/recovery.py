"""Openings before the responses of rows, so that a refusal recovers behind a compliant opening.

Recovery examples of "Safety Alignment Should Be Made More Than Just a Few Tokens Deep" (Qi et al.,
ICLR 2025), whose openings are beginnings of harmful answers. Ours have no content, and stand before
answers to harmless prompts as often as before refusals, so that they tell nothing.
"""

import random
from collections.abc import Sequence
from dataclasses import replace

from dcr import openings
from dcr.core.config import TrainConfig
from dcr.core.data import Splits
from dcr.core.sources import Example, Opening

LONGEST = 30  # tokens of an opening that are kept, at most
BREAK = "\n\n"
ENDS = (".", ":", "!", ")")  # behind which an answer may begin anew
SFT_ROWS = ("normal", "refusals", "augmented")
READOUT_ROWS = ("readout_seemingly_toxic", "readout_toxic")


def opened(settings: TrainConfig, rows: Splits) -> Splits:
    """The rows with openings before a share of them, of SFT's and of the readout's."""
    shares = dict.fromkeys(SFT_ROWS, settings.sft.recovery)
    shares |= dict.fromkeys(READOUT_ROWS, settings.sft.readout.recovery)
    parts = {
        name: behind_openings(getattr(rows, name), share, f"{name}:{settings.seed}")
        for name, share in shares.items()
        if share
    }
    return replace(rows, **parts)


def behind_openings(rows: Sequence[Example], share: float, seed: str) -> list[Example]:
    """The rows, each with this chance behind an opening; both follow from seed and row alone.

    A larger share keeps the openings of a smaller one.
    """
    known = openings.training()
    return [
        _behind_one(row, share, random.Random(f"{seed}:{row.source}/{row.id}"), known)
        for row in rows
    ]


def _behind_one(
    row: Example, share: float, drawing: random.Random, known: Sequence[openings.Opening]
) -> Example:
    if drawing.random() >= share:
        return row
    words, tokens = drawing.choice(known).text, drawing.randint(1, LONGEST)
    if words.endswith(ENDS) and drawing.random() < 0.5:
        words += BREAK
    return replace(row, opening=Opening(words, tokens))
