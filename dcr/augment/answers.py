"""The file of accepted answers: one JSON object a line, never another program's or person's."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dcr import storage
from dcr.config import ConfigError, DataError
from dcr.generation import Completion
from dcr.sources import Example

MARK = "answered_by"  # who wrote a row's answer: rows without it are not of this command


def held(path: Path, author: str, rows: Sequence[Example]) -> set[str]:
    """The ids that the file holds an answer of.

    Raises ConfigError where a row was not written by this command for the same author and source,
    and DataError for a line that is whole but no row.
    """
    prompts = {row.id: row.prompt for row in rows}
    source = {row.source for row in rows}
    found: set[str] = set()
    for number, _, row in _lines(path):
        where, cure = f"out={path}: line {number} ", "name another file"
        if MARK not in row:
            raise ConfigError(f"{where}was not written by this command; {cure}")
        if row[MARK] != author:
            raise ConfigError(f"{where}was answered by {row[MARK]}, not by {author}; {cure}")
        if row.get("source") not in source:
            raise ConfigError(f"{where}answers a prompt of {row.get('source')}; {cure}")
        identity = str(row.get("id"))
        if prompts.get(identity, row.get("prompt")) != row.get("prompt"):
            raise ConfigError(f"{where}holds another prompt than {identity} has now; {cure}")
        found.add(identity)
    return found


def add(path: Path, author: str, rows: Sequence[Example], answers: Sequence[Completion]) -> None:
    """The file with these answers behind what it holds, in the rows' order; replaced as a whole.

    A last line that some other program tore is left out. Raises UserError where it cannot be
    written.
    """
    if not answers:
        return
    by_id = {answer.id: answer for answer in answers}
    lines = [line for _, line, _ in _lines(path)]
    for row in rows:
        if row.id in by_id:
            lines.append(json.dumps(_line(row, by_id[row.id], author), ensure_ascii=False))
    storage.write_text(path, "".join(f"{line}\n" for line in lines))


def _line(row: Example, answer: Completion, author: str) -> dict[str, Any]:
    about = {"category": row.category, "group": row.group}
    return {
        "id": row.id,
        "prompt": row.prompt,
        "response": answer.response,
        **{key: value for key, value in about.items() if value is not None},
        "source": row.source,
        MARK: author,
    }


def _lines(path: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """Each line that is not blank: number, text and row; without a last one that is torn."""
    try:
        whole, _, torn = path.read_bytes().rpartition(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"out={path}: {error.strerror or error}; name a file") from error
    lines = enumerate(whole.split(b"\n"), start=1)
    found = [_row(path, number, line) for number, line in lines if line.strip()]
    try:
        return [*found, _row(path, whole.count(b"\n") + 2, torn)] if torn.strip() else found
    except DataError:
        return found


def _row(path: Path, number: int, line: bytes) -> tuple[int, str, dict[str, Any]]:
    try:
        text = line.decode("utf-8").strip()
        row = json.loads(text)
    except ValueError:
        text, row = "", None
    if not isinstance(row, dict):
        raise DataError(f"{path}:{number}: line: no JSON object; name another file with out=")
    return number, text, row
