"""What a model answered, and the files that keep it: one JSON object a line, only appended."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dcr import storage
from dcr.prompts import ChatFormat
from dcr.sources import Example

Encoded = tuple[Example, list[int]]  # a row and its prompt's token ids


@dataclass(frozen=True)
class Completion:
    """What a model answered.

    `refusal_mass` is whatever the caller reads off the first token's logits; None where a server
    answered, which shows no logits.
    """

    id: str
    prompt: str
    response: str
    tokens: int
    ended: bool  # by an end token, not by the token limit
    refusal_mass: float | None


def completion(chat: ChatFormat, row: Example, answer: Sequence[int], mass: float) -> Completion:
    """The record of an answer's token ids; what stands behind an end token does not count."""
    end = next((i for i, token in enumerate(answer) if token in chat.stop), len(answer))
    text = chat.tokenizer.decode(list(answer[:end]), skip_special_tokens=True)
    assert isinstance(text, str)
    return Completion(row.id, row.prompt, text.strip(), end, end < len(answer), mass)


def stored(path: Path) -> dict[str, Completion]:
    """Completions already in a file, by id; a line torn by a kill is left out.

    Raises DataError, naming the line, for another that is no completion.
    """
    return {row.id: row for row in storage.read_lines(path, Completion)}
