"""Frames: words around a prompt that leave what it asks for as it is.

Ours, in several registers, none with content: no frame makes a prompt harmful or harmless. Gates
learn pairs in those of most registers. Whole registers are held out, on which settings are chosen,
and nothing here speaks of times long past or tells a story: those are the frames of the attacks in
`dcr.robustness`, so that attacks measure frames that no gate has seen.
"""

import functools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

from dcr.core.sources import Example
from dcr.core.text import conversation, turns_of

HELD_OUT = ("exam", "code", "hypothesis", "news", "future", "distance", "hearsay")  # registers
PLACE = "{}"  # of the prompt in a frame


@dataclass(frozen=True)
class Frame:
    """One frame, with one `{}` for the prompt; `register` is how it speaks."""

    id: str
    register: str
    text: str


@functools.cache
def corpus() -> tuple[Frame, ...]:
    """Every frame, in the order of the file."""
    lines = resources.files(__name__).joinpath("frames.jsonl").read_text("utf-8").splitlines()
    return tuple(Frame(**json.loads(line)) for line in lines)


def training() -> list[Frame]:
    """The frames that training may draw."""
    return [frame for frame in corpus() if frame.register not in HELD_OUT]


def framed(frame: str, prompt: str) -> str:
    """The prompt with its last turn in a frame."""
    *before, (role, words) = turns_of(prompt)
    return conversation([*before, (role, frame.replace(PLACE, words))])


def in_frames(rows: Sequence[Example], seed: int) -> list[Example]:
    """Each row in a frame of training, and each frame as often as any other up to one.

    Rows of two kinds have the same frames in the same order, so that a frame tells no kind.
    """
    drawing, known, drawn = random.Random(f"frames:{seed}"), training(), list[Frame]()
    while len(drawn) < len(rows):
        drawn += drawing.sample(known, len(known))
    return [
        replace(row, id=f"{row.id} in {frame.id}", prompt=framed(frame.text, row.prompt))
        for row, frame in zip(rows, drawn, strict=False)
    ]
