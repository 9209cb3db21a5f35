"""The sources of prompts: named data sets and the user's files and classes, read as examples.

A source is read by name or path; an extension knows those that have a name.

`final.txt` names the rows of public sets that are kept apart for `data=final`: scored under a plan,
else unused.
"""

import difflib
import functools
import hashlib
import json
import logging
import os
import random
import re
import stat
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import resources
from typing import IO, Any

from dcr.core import extending
from dcr.core.config import ConfigError, DataError, Kind, UserError, class_of, is_path
from dcr.core.text import ROLES, TURN, conversation, follows, last_turn, normalise, opens_thought

log = logging.getLogger(__name__)

LONGEST_LINE = 8 * 2**20  # bytes
SURROGATE = re.compile("[\ud800-\udfff]")
INVISIBLE = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})
DIGITS = 12  # 48 bits of SHA-256: among a million prompts about 1e-5 are taken for one of these

Row = Mapping[str, Any]  # one decoded JSON object; every field is checked before it is used


@dataclass(frozen=True)
class Example:
    """One prompt, with the answer that came with it, if any."""

    id: str
    prompt: str
    kind: Kind
    source: str
    response: str | None = None
    category: str | None = None
    group: str | None = None  # rows that share a template; no split separates them
    split: str | None = None


@dataclass(frozen=True, kw_only=True)
class Named(ABC):
    """A source that has a name, as a public data set does: an extension's table lists them."""

    kind: Kind
    file: str | None = None  # in `data.root`; it may hold the rows of several sources
    part_of: str | None = None  # the source that holds all of this one's prompts
    final: bool | None = None  # of a part: whether its rows are those kept apart

    @abstractmethod
    def examples(self, name: str, root: str | None, key: str) -> list[Example]:
        """All of its rows, of which there are some, from a folder or wherever it is published.

        `key` stands before the name in faults of the name.
        """


def named() -> Mapping[str, Named]:
    return extending.part("sources")


def read(
    name: str,
    *,
    root: str | None = None,
    kind: Kind | None = None,
    pairs: bool = False,
    scored: bool = False,
    key: str = "",
) -> list[Example]:
    """All rows of a source, in its own order.

    Args:
        name: a key of `named()`, the path of a JSONL file (ends in `.jsonl` or holds a path
            separator), or `package.module:Class` of a user's own `Rows`.
        root: local folder with the named sources' files; the hub if None. The embedded corpora and
            the user's files do not depend on it.
        kind: the kind of the prompts. Required for a file; must agree with a named source.
        pairs: only rows with a response. In a user's file, a row without one is an error.
        scored: with the rows kept apart for `data=final`, which nothing may learn from or be chosen
            on; else they are left out, with a warning.
        key: the setting that names the source, for faults of the name.

    Rows of a named source whose prompt or response is empty are dropped. A warning tells their
    number, and a row count other than the expected one.

    Raises:
        ConfigError: unknown name, `root` not a folder, kind missing or contradicted.
        DataError: a file or hub data set that cannot be read, a malformed row, or nothing but rows
            kept apart.
    """
    rows = _read(name, root, kind, pairs, f"{key}: " if key else "")
    if scored:
        return rows
    usable = [row for row in rows if not is_final(row.prompt)]
    if kept := len(rows) - len(usable):
        if not usable:
            raise DataError(f"{name}: reserved for evaluation with data=final; name another source")
        log.warning("%s: %d rows are reserved for data=final and left out", name, kept)
    return usable


def _read(name: str, root: str | None, kind: Kind | None, pairs: bool, key: str) -> list[Example]:
    own = is_path(name)
    if own or name.endswith(".jsonl") or "/" in name or os.sep in name:
        if kind is None:
            raise ConfigError(f"{name}: say what its prompts are: toxic, seemingly_toxic or normal")
        reader = extending.part("own_rows") if own else read_jsonl
        return reader(name, kind, pairs=pairs)
    if (source := named().get(name)) is None:
        near = difflib.get_close_matches(name, named(), n=3, cutoff=0)
        raise ConfigError(
            f"{key}no data source is called {name[:80]!r}; did you mean {' or '.join(near)}? "
            "docs/data.md lists all; a file's path ends in .jsonl"
        )
    if kind is not None and kind is not source.kind:
        raise ConfigError(
            f"{key}{name} holds {source.kind.value} prompts, not {kind.value}; "
            "choose another source, or name a .jsonl file of your own"
        )
    examples = source.examples(name, root, key)
    chosen = [example for example in examples if example.response is not None or not pairs]
    if not chosen:
        raise DataError(f"{name}: no row has a response; choose a source of pairs")
    return chosen


def read_jsonl(path: str, kind: Kind, *, pairs: bool = False) -> list[Example]:
    """The rows of the user's own file: one object a line with `prompt`, or `messages`.

    A row may have `response`, `id`, `category` and `group`; other keys are ignored. Ids default to
    `<file name>-<line>` and must be unique. Raises DataError with file, line and field at the first
    fault.
    """
    stem = os.path.splitext(os.path.basename(path))[0]
    with closing(opened(path)) as stream:
        return of_user(rows(stream, path), path, stem, kind, pairs)


def opened(path: str, cure: str = "; check the path") -> IO[bytes]:
    """A file as bytes. Raises DataError for a path that is none, with the cure."""
    try:
        # sources are read more than once, and opening a pipe would wait for its writer
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: a folder, pipe or device, not a file{cure}")
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}{cure}") from None


class Rows(ABC):
    """The base of a source of a user's own: a dataclass whose fields are its settings."""

    @abstractmethod
    def rows(self, kind: Kind) -> Iterable[Mapping[str, Any]]:
        """Rows of a kind with the keys of a JSONL file's: `prompt` or `messages`, and if wanted
        `response`, `id`, `category` and `group`. The same ones each time: a run finds its rows
        again by their ids.
        """


def origin(name: str) -> dict[str, Any] | None:
    """The hash that tells a user's own source from its other versions; None for other sources."""
    return extending.origin(extending.made(name, Rows)) if is_path(name) else None


def of_user(
    rows: Iterable[tuple[int, Row]], path: str, stem: str, kind: Kind, pairs: bool
) -> list[Example]:
    """Numbered rows of a user's file or class as examples. DataError at the first fault."""
    examples: list[Example] = []
    lines: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}:{line}"
        examples.append(
            Example(
                id=identifier(row, f"{stem}-{line}", where, line, lines),
                prompt=prompt(row, where),
                kind=kind,
                source=path,
                response=response(row, where, required=pairs),
                category=text(row, "category", where),
                group=text(row, "group", where),
            )
        )
    return examples


# --- the rows kept apart --------------------------------------------------------------------------


def digest(prompt: str) -> str:
    """The name of a prompt in `final.txt`, the same whatever its case, punctuation and spacing."""
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()[:DIGITS]


@functools.cache
def _digests() -> frozenset[str]:
    text = resources.files("dcr.core.sources").joinpath("final.txt").read_text(encoding="ascii")
    return frozenset(text.split())


def is_final(prompt: str) -> bool:
    """Whether a prompt is among those kept apart, or a conversation ends with one."""
    return digest(last_turn(prompt)) in _digests()


# --- rows: each fault names place and field -----------------------------------------------------


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
    if words is not None and opens_thought(words):
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


# --- seeded draws and comparisons of examples -----------------------------------------------------


def draw(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Draws exactly `count` examples without replacement, the same for the same rows and seed.

    The first n of a larger draw are the smaller draw of n, so that a sweep over counts adds rows
    and never swaps them. Raises ConfigError if there are too few.
    """
    if not 0 <= count <= len(examples):
        names = ", ".join(sorted({f"{e.source} ({e.kind.value})" for e in examples})) or "no source"
        raise ConfigError(
            f"{count} rows asked for, {len(examples)} available from {names}; "
            "lower the count or add a source"
        )
    shuffled = list(examples)
    random.Random(f"draw:{seed}").shuffle(shuffled)  # seeded by the string, not by its hash
    return shuffled[:count]


def drop_duplicates(examples: Iterable[Example]) -> tuple[list[Example], list[Example]]:
    """(kept, dropped): the first example of each prompt up to case, punctuation and spacing."""
    seen: set[str] = set()
    kept: list[Example] = []
    dropped: list[Example] = []
    for example in examples:
        key = normalise(example.prompt)
        (dropped if key in seen else kept).append(example)
        seen.add(key)
    return kept, dropped


def fingerprint(examples: Iterable[Example]) -> str:
    """The SHA-256 over ids, prompts and responses, in order."""
    digest = hashlib.sha256()
    for row in examples:
        # JSON, so that no text can imitate the border between two fields
        digest.update(json.dumps([row.id, row.prompt, row.response]).encode() + b"\n")
    return digest.hexdigest()


def record(examples: Sequence[Example]) -> dict[str, object]:
    """The record of used rows: their count, fingerprint and ids."""
    ids = [example.id for example in examples]
    return {"count": len(ids), "fingerprint": fingerprint(examples), "ids": ids}
