"""The sources of prompts: named data sets and the user's files, read as examples.

A source is read by name or path: from a folder, the hub, the package or a file. `sources.yaml`
lists the named ones, `table` maps their raw rows to ours, and `jsonl` validates rows.
"""

import difflib
import hashlib
import json
import logging
import os
import random
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib import resources
from typing import IO, Any

from dcr.core import extending
from dcr.core.config import ConfigError, DataError, Kind, UserError, class_of, is_path
from dcr.core.sources import jsonl
from dcr.core.sources.jsonl import Row
from dcr.core.sources.table import SOURCES, Hub, Source, first_turn, is_final
from dcr.core.text import normalise

log = logging.getLogger(__name__)


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
        name: a key of `SOURCES`, the path of a JSONL file (ends in `.jsonl` or holds a path
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
        return (_read_own if own else read_jsonl)(name, kind, pairs=pairs)
    source = _source(name, key)
    if kind is not None and kind is not source.kind:
        raise ConfigError(
            f"{key}{name} holds {source.kind.value} prompts, not {kind.value}; "
            "choose another source, or name a .jsonl file of your own"
        )
    rows, expected = _rows(name, source, root, key)
    examples = _examples(name, source, rows, expected)
    chosen = [example for example in examples if example.response is not None or not pairs]
    if not examples:
        raise DataError(f"{name}: none of {len(rows)} rows is one of its prompts; restore the file")
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
    with closing(_opened(path)) as stream:
        return _of_user(jsonl.rows(stream, path), path, stem, kind, pairs)


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


def _read_own(path: str, kind: Kind, pairs: bool) -> list[Example]:
    """The rows of a user's own class, checked as those of a file. Its faults are DataErrors."""
    source = extending.made(path, Rows)
    try:
        given = list(enumerate(source.rows(kind), 1))
    except UserError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{path}: {kind.value} rows cannot be read ({why})") from error
    for number, row in given:
        if not isinstance(row, Mapping):
            raise DataError(f"{path}:{number}: a {type(row).__name__}, not a row with a prompt")
    if not given:
        raise DataError(f"{path}: gives no {kind.value} rows")
    return _of_user(given, path, class_of(path), kind, pairs)


def _of_user(
    rows: Iterable[tuple[int, Row]], path: str, stem: str, kind: Kind, pairs: bool
) -> list[Example]:
    examples: list[Example] = []
    lines: dict[str, int] = {}
    for line, row in rows:
        where = f"{path}:{line}"
        identity = jsonl.identifier(row, f"{stem}-{line}", where)
        _claim(identity, line, lines, where)
        examples.append(
            Example(
                id=identity,
                prompt=jsonl.prompt(row, where),
                kind=kind,
                source=path,
                response=jsonl.response(row, where, required=pairs),
                category=jsonl.text(row, "category", where),
                group=jsonl.text(row, "group", where),
            )
        )
    return examples


def _source(name: str, key: str) -> Source:
    if name in SOURCES:
        return SOURCES[name]
    near = difflib.get_close_matches(name, SOURCES, n=3, cutoff=0)
    raise ConfigError(
        f"{key}no data source is called {name[:80]!r}; did you mean {' or '.join(near)}? "
        "docs/data.md lists all; a file's path ends in .jsonl"
    )


# --- raw rows: (where, row), where errors quote `where` ---

Located = tuple[str, Row]


def _rows(
    name: str, source: Source, root: str | None, key: str
) -> tuple[list[Located], int | None]:
    """All rows of a named source, and the expected number that its `keep` selects."""
    if source.embedded is not None:
        with (resources.files("dcr") / source.embedded).open("rb") as stream:
            return _file_rows(stream, source.embedded), None
    if root is None:
        assert source.hub is not None  # as every source outside the package has
        return _hub_rows(name, source.hub, _cure(source)), source.hub.rows
    if not os.path.isdir(root):
        raise ConfigError(f"data.root={root}: not a folder; name the one with the data files")
    if source.file is None:
        raise DataError(
            f"{key}{name}: only on the hub ({source.hub}), not in data.root={root}; leave "
            f"data.root out, name a file {name}.jsonl made from it (docs/data.md), or choose "
            "another source"
        )
    path = os.path.join(root, source.file)
    with closing(_opened(path, f"; leave data.root out to read {source.hub} instead")) as stream:
        return _file_rows(stream, path), source.rows


def _opened(path: str, cure: str = "; check the path") -> IO[bytes]:
    try:
        # sources are read more than once, and opening a pipe would wait for its writer
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DataError(f"{path}: a folder, pipe or device, not a file{cure}")
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or error}{cure}") from None


def _file_rows(stream: IO[bytes], path: str) -> list[Located]:
    return [(f"{path}:{line}", row) for line, row in jsonl.rows(stream, path)]


def _cure(source: Source) -> str:
    """The cure for a hub set that cannot be read."""
    if source.hub is not None and source.hub.gated:
        return (
            "accept its terms on the hub, then log in with `hf auth login`; or a .jsonl file of "
            "your own can stand in its place"
        )
    if source.file is None:
        return "a .jsonl file of your own can stand in its place"
    return "data.root=<folder> reads it offline"


def _hub_rows(name: str, hub: Hub, cure: str) -> list[Located]:
    import datasets  # takes a second, and only hub reading needs it

    try:
        table = datasets.load_dataset(
            hub.id, hub.config, split=hub.split, revision=hub.revision, **hub.options
        )
    # network, hub, cache and parser each raise their own types; all mean the same to the user
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{name}: cannot read {hub} through datasets ({type(error).__name__}: {reason}); {cure}"
        ) from error
    try:
        return [(f"{name}:{number}", hub.fields(row)) for number, row in enumerate(table, 1)]
    except KeyError as error:
        columns = ", ".join(table.column_names)
        raise DataError(
            f"{name}: {hub} has no column {error} (columns: {columns}); {cure}"
        ) from None


# --- rows to examples ---


def _examples(
    name: str, source: Source, rows: list[Located], expected: int | None
) -> list[Example]:
    for where, row in rows:
        if not isinstance(row.get("meta"), (Mapping, type(None))):
            raise DataError(
                f"{where}: meta: a {type(row['meta']).__name__}, not an object; restore the file"
            )
    groups = source.groups([row for _, row in rows])
    chosen = [(i, *located) for i, located in enumerate(rows) if source.keep(located[1])]
    if expected is not None and len(chosen) != expected:
        log.warning("%s: %d rows, expected %d", name, len(chosen), expected)
    examples: list[Example] = []
    seen: dict[str, int] = {}
    for i, where, row in chosen:
        prompt = jsonl.asked(row, where)
        response = None if source.prompts_only else jsonl.text(row, "response", where)
        category = jsonl.text(row, "category", where)
        identity = jsonl.identifier(row, f"{name}-{i}", where)
        _claim(identity, i + 1, seen, where)
        if prompt is None:
            jsonl.prompt(row, where)  # raises: a row without a prompt is not an empty one
        elif not any(text is not None and jsonl.is_blank(text) for text in (prompt, response)):
            examples.append(
                Example(
                    identity, prompt, source.kind, name, response, category, groups[i], source.split
                )
            )
    if dropped := len(chosen) - len(examples):
        log.warning("%s: %d rows with an empty prompt or response dropped", name, dropped)
    return examples


def _claim(identity: str, number: int, taken: dict[str, int], where: str) -> None:
    if identity in taken:
        raise DataError(
            f"{where}: id: {identity!r} stands on row {taken[identity]} too; "
            "give each row its own id or leave ids out"
        )
    taken[identity] = number


# --- seeded draws and comparisons of examples ---


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
