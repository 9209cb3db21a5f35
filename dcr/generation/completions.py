"""What a model answered, and the files that keep it: one JSON object a line, only appended."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """Completions already in a file, by id; a last line torn by a kill is left out."""
    if not path.is_file():
        return {}
    found: dict[str, Completion] = {}
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or torn within a character
            continue
        found[row["id"]] = Completion(**row)
    return found


def store(path: Path, completions: Sequence[Completion]) -> None:
    """Append completions, one JSON line each, flushed before returning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.is_file() and path.stat().st_size > 0 and not _ends_in_newline(path)
    with path.open("a", encoding="utf-8") as file:
        if torn:
            file.write("\n")
        for done in completions:
            file.write(json.dumps(asdict(done), ensure_ascii=False) + "\n")
        file.flush()


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
