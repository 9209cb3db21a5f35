"""What a model answered, and the files that keep it.

The files hold one JSON object a line and are only appended to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import FiniteFloat

from dcr.core import storage
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example

Encoded = tuple[Example, list[int]]  # a row and its prompt's token ids


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    `refusal_mass` is whatever the caller reads off the first token's logits; None where a server
    answered, which is asked for these apart from its answers.
    """

    id: str
    prompt: str
    response: str
    tokens: int
    ended: bool  # by an end token, not by the token limit
    refusal_mass: FiniteFloat | None


def completion(chat: ChatFormat, row: Example, answer: Sequence[int], mass: float) -> Completion:
    """The record of an answer's token ids; what stands behind an end token does not count."""
    end = next((i for i, token in enumerate(answer) if token in chat.stop), len(answer))
    return Completion(row.id, row.prompt, text(chat, answer), end, end < len(answer), mass)


def text(chat: ChatFormat, answer: Sequence[int]) -> str:
    """What the token ids of an answer say up to its end token."""
    end = next((i for i, token in enumerate(answer) if token in chat.stop), len(answer))
    said = chat.tokenizer.decode(list(answer[:end]), skip_special_tokens=True)
    assert isinstance(said, str)
    return said.strip()


def stored(path: Path) -> dict[str, Completion]:
    """Completions already in a file, by id; a line torn by a kill is left out.

    Raises DataError, naming the line, for another that is no completion.
    """
    return {row.id: row for row in storage.read_lines(path, Completion)}
