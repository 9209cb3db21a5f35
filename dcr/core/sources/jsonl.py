"""Decodes and validates rows of JSONL files; each fault names file, line and field."""

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import IO, Any

from dcr.core.config import DataError
from dcr.core.text import ROLES, TURN, conversation, follows
from dcr.core.thoughts import opens_one

LONGEST_LINE = 8 * 2**20  # bytes
SURROGATE = re.compile("[\ud800-\udfff]")
INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})

Row = Mapping[str, Any]  # one decoded JSON object; every field is checked before it is used


def rows(stream: IO[bytes], name: str) -> Iterator[tuple[int, Row]]:
    """Yields (line number, row) for each line that is not blank.

    A byte order mark, CRLF ends and blank lines are accepted. Raises DataError at a line that is
    too long, not UTF-8, or not one JSON object, and at the end of a file without rows.
    """
    number, any_row = 0, False
    while line := stream.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise DataError(
                f"{name}:{number}: line: longer than {LONGEST_LINE >> 20} MB; "
                "shorten or split the row"
            )
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            any_row = True
            yield number, _decoded(line, f"{name}:{number}")
    if not any_row:
        raise DataError(f"{name}:1: file: holds no rows; write one JSON object a line")


def _decoded(line: bytes, where: str) -> Row:
    if b"\0" in line:
        raise DataError(f"{where}: line: holds a NUL byte; save the file as UTF-8 text")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: line: byte {error.start + 1} is not UTF-8; save the file as UTF-8"
        ) from None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also covers oversized numbers
        what = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        raise DataError(f"{where}: line: not JSON ({what}); write one JSON object a line") from None
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: line: a JSON {type(row).__name__}, not an object; "
            'write {"prompt": "…"} on each line'
        )
    return row


def text(row: Row, key: str, where: str) -> str | None:
    """The string under `key`; None if the key is absent or null.

    Raises DataError for another type and for text that cannot be stored as UTF-8.
    """
    value = row.get(key)
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(f"{where}: {key}: a {type(value).__name__}, not a string; quote it")
    if "\0" in value or SURROGATE.search(value):
        raise DataError(
            f"{where}: {key}: holds a NUL or half a surrogate pair; remove that character"
        )
    return value


def asked(row: Row, where: str) -> str | None:
    """The text under `prompt`, else the conversation under `messages`; None without either."""
    words = text(row, "prompt", where)
    return _conversation(row, f"{where}: messages") if words is None else words


def _conversation(row: Row, where: str) -> str | None:
    """The turns under `messages` as one prompt. Raises DataError for turns that nobody can take."""
    given = row.get("messages")
    if given is None:
        return None
    if not isinstance(given, list) or not given:
        what = "empty" if given == [] else f"a {type(given).__name__}, not a list"
        raise DataError(f'{where}: {what}; write [{{"role": "user", "content": "…"}}]')
    turns: list[tuple[str, str]] = []
    for number, turn in enumerate(given, 1):
        at = f"{where}: turn {number}"
        if not isinstance(turn, Mapping):
            raise DataError(f"{at}: a {type(turn).__name__}, not an object; give role and content")
        if (role := turn.get("role")) not in ROLES:
            raise DataError(f"{at}: role {role!r:.40}; give system, user or assistant")
        if not isinstance(turn.get("content"), str):
            raise DataError(f"{at}: content: no text; give its words alone, as one string")
        words = text(turn, "content", at) or ""
        if is_blank(words) or TURN in words:
            fault = "empty" if is_blank(words) else "holds U+2063, which stands between turns"
            raise DataError(f"{at}: content: {fault}; mend or remove the turn")
        turns.append((role, words))
    if turns[-1][0] != "user":
        raise DataError(
            f"{where}: ends with the {turns[-1][0]}'s turn; let it end with the user's, and put "
            "an answer to it under response"
        )
    if not follows(role for role, _ in turns):
        raise DataError(
            f"{where}: roles {', '.join(role for role, _ in turns)}; let user and assistant take "
            "turns, behind one system turn or none"
        )
    return conversation(turns)


def prompt(row: Row, where: str) -> str:
    """The row's prompt. Raises DataError if it is missing or shows no character."""
    words = asked(row, where)
    if words is None:
        keys = ", ".join(map(repr, row)) or "none"
        raise DataError(f"{where}: prompt: missing (keys found: {keys}); add the user's message")
    if is_blank(words):
        raise DataError(f"{where}: prompt: empty; write the user's message or remove the row")
    return words


def response(row: Row, where: str, required: bool) -> str | None:
    """The row's response.

    Raises DataError if it is empty, or missing though required, or begins with a thought.
    """
    words = text(row, "response", where)
    if words is None and required:
        raise DataError(f"{where}: response: missing; training pairs need the answer to learn")
    if words is not None and is_blank(words):
        raise DataError(f"{where}: response: empty; write the answer or remove the row")
    if words is not None and opens_one(words):
        raise DataError(
            f"{where}: response: begins with a thought; give the answer alone, which is learnt "
            "behind an empty one"
        )
    return words


def identifier(row: Row, default: str, where: str, number: int, taken: dict[str, int]) -> str:
    """The row's id, or `default`; a whole number becomes its digits.

    `taken` holds the numbers of rows by their ids, this one's among them from now on. Raises
    DataError if another row has the id.
    """
    value = row.get("id")
    if isinstance(value, int) and not isinstance(value, bool):
        name = str(value)
    elif (name := text(row, "id", where)) is None:
        name = default
    elif is_blank(name):
        raise DataError(f"{where}: id: empty; name the row or leave id out")
    if name in taken:
        raise DataError(
            f"{where}: id: {name!r} stands on row {taken[name]} too; "
            "give each row its own id or leave ids out"
        )
    taken[name] = number
    return name


def is_blank(value: str) -> bool:
    """Whether the text has no visible character: only spaces, controls and zero-width ones."""
    return all(c.isspace() or unicodedata.category(c) in INVISIBLE for c in value)
