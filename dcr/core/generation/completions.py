"""The completions of a model, and their files of one JSON object a line, only appended to."""

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
    """A model's answer to a prompt.

    `refusal_mass` is the caller's score of the first token's logits; None for an answer of a
    server, which is asked for those separately.
    """

    id: str
    prompt: str
    response: str
    tokens: int
    ended: bool  # by an end token, not by the token limit
    refusal_mass: FiniteFloat | None


def completion(chat: ChatFormat, row: Example, answer: Sequence[int], mass: float) -> Completion:
    """The record of an answer's token ids; tokens behind an end token do not count."""
    end = next((i for i, token in enumerate(answer) if token in chat.stop), len(answer))
    return Completion(row.id, row.prompt, text(chat, answer), end, end < len(answer), mass)


def text(chat: ChatFormat, answer: Sequence[int]) -> str:
    """The text of an answer's token ids up to its end token."""
    end = next((i for i, token in enumerate(answer) if token in chat.stop), len(answer))
    decoded = chat.tokenizer.decode(list(answer[:end]), skip_special_tokens=True)
    assert isinstance(decoded, str)
    return decoded.strip()


def stored(path: Path) -> dict[str, Completion]:
    """The completions in a file, by id; a line torn by a kill is left out.

    Raises DataError, naming the line, for any other line that is no completion.
    """
    return {row.id: row for row in storage.read_lines(path, Completion)}
