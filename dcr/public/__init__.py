"""The sources that have a name: public data sets, and the corpora of the package.

`sources.yaml` lists them. Rows of a local folder (`data.root`) have the keys `id`, `prompt` or
`messages`, `label`, `category`, `response` and `meta`; rows of the hub get them, some
by `raw`.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import IO, Any

import yaml
from pydantic import TypeAdapter

from dcr.core import extending, sources
from dcr.core.config import ConfigError, DataError, is_path
from dcr.core.evaluation import SetPair
from dcr.core.sources import Example, Named, Row, is_final, opened

log = logging.getLogger(__name__)

Located = tuple[str, Row]  # a raw row behind its place, which errors quote


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


@dataclass(frozen=True, kw_only=True)
class Source(Named):
    licence: str
    hub: Hub | None = None
    rows: int | None = None
    keep: Mapping[str, str] = field(default_factory=dict)
    paired: bool = False
    groups: str = ""
    parts: tuple[int, int] | None = None
    embedded: str | None = None  # file of this package
    split: str | None = None
    prompts_only: bool = False  # what stands under `response` is not for training

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

    def examples(self, name: str, root: str | None, key: str) -> list[Example]:
        """Warns of rows whose prompt or response is empty, which are dropped, and of a row count
        other than the expected one.
        """
        rows, expected = _located(name, self, root, key)
        for where, row in rows:
            if not isinstance(row.get("meta"), (Mapping, type(None))):
                what = type(row["meta"]).__name__
                raise DataError(f"{where}: meta: a {what}, not an object; restore the file")
        groups = self.grouped([row for _, row in rows])
        chosen = [(i, *located) for i, located in enumerate(rows) if self.keeps(located[1])]
        if expected is not None and len(chosen) != expected:
            log.warning("%s: %d rows, expected %d", name, len(chosen), expected)
        examples: list[Example] = []
        seen: dict[str, int] = {}
        for i, where, row in chosen:
            prompt = sources.asked(row, where)
            response = None if self.prompts_only else sources.text(row, "response", where)
            category = sources.text(row, "category", where)
            identity = sources.identifier(row, f"{name}-{i}", where, i + 1, seen)
            if prompt is None:
                sources.prompt(row, where)  # raises: a row without a prompt is not an empty one
            elif not any(sources.is_blank(text) for text in (prompt, response) if text is not None):
                of = (self.kind, name, response, category, groups[i], self.split)
                examples.append(Example(identity, prompt, *of))
        if dropped := len(chosen) - len(examples):
            log.warning("%s: %d rows with an empty prompt or response dropped", name, dropped)
        if not examples:
            raise DataError(
                f"{name}: none of {len(rows)} rows is one of its prompts; restore the file"
            )
        return examples


def _named() -> dict[str, Source]:
    text = (resources.files("dcr.public") / "sources.yaml").read_text("utf-8")
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


def _located(
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
    with closing(opened(path, f"; leave data.root out to read {source.hub} instead")) as stream:
        return _file_rows(stream, path), source.rows


def _file_rows(stream: IO[bytes], path: str) -> list[Located]:
    return [(f"{path}:{line}", row) for line, row in sources.rows(stream, path)]


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


# --- sets that belong together --------------------------------------------------------------------

# The toxic sets of the paper's tables, 938 prompts.
PAPER_SAFETY: tuple[str, ...] = (
    "i_malicious_instructions",
    "i_cona",
    "i_controversial",
    "q_harm",
    "advbench",
)
# Seemingly toxic and toxic sets. OR-Bench's own toxic prompts are on the hub alone, so HarmfulQ
# stands in for them; OKTest was written without a toxic side.
_PAIRS: tuple[SetPair, ...] = (
    (("demo_seemingly_toxic_heldout",), ("demo_toxic_heldout",)),
    (("registers_seemingly_toxic_heldout",), ("registers_toxic_heldout",)),
    (("xstest_safe",), ("xstest_unsafe",)),
    (("coconot_contrast",), ("coconot_original",)),
    (("coconot_safety",), ("coconot_original",)),
    (("orbench_hard",), ("orbench_toxic",)),
    (("orbench_hard",), ("harmfulq",)),
    (("oktest",), PAPER_SAFETY),
    (("jailbreakbench_benign",), ("jailbreakbench",)),
    (("wildguardtest_unharmful",), ("wildguardtest_harmful",)),
    (("xsb_safe",), ("xsb_unsafe",)),
    (("ms_xsb_safe",), ("ms_xsb_unsafe",)),
)
_SIDES: dict[tuple[str, ...], str] = {
    PAPER_SAFETY: "paper_safety"
}  # names of sides that hold several sets
PAIRS = {" / ".join(_SIDES.get(side, side[0]) for side in pair): pair for pair in _PAIRS}
