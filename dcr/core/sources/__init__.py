"""The sources of prompts: named data sets and the user's files, read as examples.

A source is read by name or path: from a folder, the hub, the package or a file. `sources.yaml`
lists the named ones, and `jsonl` validates rows. Rows of a local folder (`data.root`) have the keys
`id`, `prompt` or `messages`, `label`, `category`, `response` and `meta`; rows of the hub get them.

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
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import IO, Any

import yaml
from pydantic import TypeAdapter

from dcr.core import extending
from dcr.core.config import ConfigError, DataError, Kind, UserError, class_of, is_path
from dcr.core.sources import jsonl
from dcr.core.sources.jsonl import Row
from dcr.core.text import last_turn, normalise

log = logging.getLogger(__name__)

DIGITS = 12  # 48 bits of SHA-256: among a million prompts about 1e-5 are taken for one of these


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


# --- the named sources, as `sources.yaml` explains them ---


@dataclass(frozen=True)
class Hub:
    """The arguments of `datasets.load_dataset`, and the map from its rows to the local keys."""

    id: str
    rows: int | None  # None: not known
    fields: Mapping[str, str] | str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False  # its terms must be accepted on the hub first

    def __str__(self) -> str:
        return " ".join(filter(None, (self.options.get("data_files", self.id), self.config)))

    def local(self, row: Row) -> Row:
        """A row with our keys; further columns are left out."""
        if isinstance(self.fields, str):
            return extending.ours(self.fields)(row)
        return {key: row[column] for key, column in self.fields.items()}


@dataclass(frozen=True)
class Source:
    kind: Kind
    licence: str
    hub: Hub | None = None
    file: str | None = None
    rows: int | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    paired: bool = False
    groups: str = ""
    parts: tuple[int, int] | None = None
    embedded: str | None = None  # file of this package
    split: str | None = None
    prompts_only: bool = False  # what stands under `response` is not for training
    part_of: str | None = None  # the source that holds all of this one's prompts
    final: bool | None = None  # of a part: whether its rows are those kept apart

    def keeps(self, row: Row) -> bool:
        """Whether a row of the file is one of this source's."""
        if self.final is not None and is_final(str(row.get("prompt"))) is not self.final:
            return False
        fits = all(row.get(key) == value for key, value in self.keep.items())
        return fits and (not self.paired or row.get("pair") is not None)

    def grouped(self, rows: Sequence[Row]) -> list[str | None]:
        """The group of each row of the file, kept or not."""
        if is_path(self.groups):
            return extending.ours(self.groups)(rows)
        return [row.get(self.groups) for row in rows]


def _named() -> dict[str, Source]:
    text = (resources.files("dcr.core.sources") / "sources.yaml").read_text("utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as quick as it can be
    whole = TypeAdapter(dict[str, Source]).validate_python(yaml.load(text, loader))
    parts: dict[str, Source] = {}
    for name, of in whole.items():
        for rows, final in zip(of.parts or (), (False, True), strict=False):
            hub = of.hub and replace(of.hub, rows=rows)
            part = replace(of, hub=hub, rows=rows, part_of=name, final=final)
            parts[f"{name}_{'final' if final else 'test'}"] = part
    return whole | parts


SOURCES = _named()


def _source(name: str, key: str) -> Source:
    if name in SOURCES:
        return SOURCES[name]
    near = difflib.get_close_matches(name, SOURCES, n=3, cutoff=0)
    raise ConfigError(
        f"{key}no data source is called {name[:80]!r}; did you mean {' or '.join(near)}? "
        "docs/data.md lists all; a file's path ends in .jsonl"
    )


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
        return [(f"{name}:{number}", hub.local(row)) for number, row in enumerate(table, 1)]
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
    groups = source.grouped([row for _, row in rows])
    chosen = [(i, *located) for i, located in enumerate(rows) if source.keeps(located[1])]
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
