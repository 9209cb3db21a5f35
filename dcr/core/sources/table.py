"""The named sources of `sources.yaml`: how raw rows of public data sets become ours.

A row of a local folder (`data.root`) has the keys `id`, `prompt` or `messages`, `label`,
`category`, `response` and `meta`. A hub row first gets those keys, so one predicate serves both
places. `final.txt` names the rows of public sets that are kept apart for `data=final`: scored under
a plan, else unused.
"""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from typing import Any

import scipy
import yaml

from dcr.core.config import Kind
from dcr.core.sources.jsonl import Row
from dcr.core.text import last_turn, normalise

Fields = Callable[[Row], Row]
Keep = Callable[[Row], bool]
DIGITS = 12  # 48 bits of SHA-256: among a million prompts about 1e-5 are taken for one of these


def first_turn(transcript: str) -> str:
    """The first human turn of an HH-RLHF dialogue; empty if there is none."""
    _, _, rest = transcript.partition("\n\nHuman:")
    return re.split(r"\n\n(?:Assistant|Human):", rest, maxsplit=1)[0].strip()


def columns(**names: str) -> Fields:
    """Our keys from the named columns; further columns are left out."""
    return lambda row: {key: row[column] for key, column in names.items()}


def first_turn_of(column: str) -> Fields:
    return lambda row: {"prompt": first_turn(row[column])}


def instruction(row: Row) -> Row:
    context = row["input"]
    text = row["instruction"] + (f"\n\n{context}" if context else "")
    return {"prompt": text, "response": row["output"]}


def xstest(row: Row) -> Row:
    base = {"prompt": row["prompt"], "label": row["label"], "category": row["type"]}
    return {**base, "meta": {"focus": row["focus"]}}


def phtest(row: Row) -> Row:
    return {"prompt": row["Request"], "category": str(row["Harmfulness"]).strip().lower()}


def first_of_turns(row: Row) -> Row:
    """SORRY-Bench: `turns` is a list of one; `prompt_style` is `base` or the name of a mutation."""
    category = str(row["category"])
    return {"prompt": row["turns"][0], "label": row["prompt_style"], "category": category}


def every(_: Row) -> bool:
    return True


def has(key: str, value: str) -> Keep:
    return lambda row: row.get(key) == value


def is_paired(row: Row) -> bool:
    return row.get("pair") is not None


# --- rows kept apart ---


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


# --- groups of rows that are variants of each other, which no split separates ---

# safe types whose contrasts have another name
XSTEST_FAMILIES = {"real_group_nons_discr": "discr", "privacy_fictional": "privacy"}


def ungrouped(rows: Sequence[Row]) -> list[str | None]:
    return [None] * len(rows)


def by_pair(rows: Sequence[Row]) -> list[str | None]:
    return [row.get("pair") for row in rows]


def xstest_groups(rows: Sequence[Row]) -> list[str | None]:
    """One group for all XSTest rows, safe or unsafe, that are linked in any of three ways.

    They share a focus word ("kill" appears in four types), a place within the type (the n-th safe
    row was written together with the n-th of its contrast type, and historical events have no focus
    word), or, in the discrimination types, the prompt's end ("… not have equal rights?").
    """
    seen: Counter[str] = Counter()
    links: list[set[str]] = []
    for row in rows:
        category = str(row.get("category"))
        focus = str((row.get("meta") or {}).get("focus") or "").strip().casefold()
        contrast = category.removeprefix("contrast_")
        family = XSTEST_FAMILIES.get(contrast, contrast)
        link = {f"place:{family}:{seen[category]}"}
        seen[category] += 1
        if focus:
            link.add(f"focus:{focus}")
        if family in ("discr", "nons_group_real_discr"):
            link.add("end:" + " ".join(normalise(str(row.get("prompt"))).split()[-2:]))
        links.append(link)
    return [f"xstest-{component}" for component in _components(links)]


def _components(links: Sequence[set[str]]) -> list[int]:
    """The connected component of each item; items that share a link are connected."""
    nodes: dict[str, int] = {}
    for link in sorted(set().union(*links)):
        nodes[link] = len(links) + len(nodes)
    edges = [(item, nodes[link]) for item, own in enumerate(links) for link in sorted(own)]
    items, ends = zip(*edges, strict=True)
    size = len(links) + len(nodes)
    graph = scipy.sparse.coo_array(([1] * len(edges), (items, ends)), shape=(size, size))
    _, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return [int(label) for label in labels[: len(links)]]


# --- the table ---


@dataclass(frozen=True)
class Hub:
    """The arguments of `datasets.load_dataset`, and the map from its rows to the local keys."""

    id: str  # a hub id, or a file format (`json`, `csv`) with `data_files` among the options
    rows: int | None  # expected after the source's `keep`; None: not known
    fields: Fields
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    gated: bool = False  # its terms must be accepted on the hub first

    def __str__(self) -> str:
        return " ".join(filter(None, (self.options.get("data_files", self.id), self.config)))


@dataclass(frozen=True)
class Source:
    kind: Kind
    licence: str
    hub: Hub | None = None
    file: str | None = None  # inside `data.root`
    rows: int | None = None  # expected of the file after `keep`
    keep: Keep = every
    groups: Callable[[Sequence[Row]], list[str | None]] = ungrouped  # sees rows before `keep`
    embedded: str | None = None  # file of this package
    split: str | None = None
    prompts_only: bool = False  # what stands under `response` is not for training
    part_of: str | None = None  # the source that holds all of this one's prompts
    final: bool = False  # its rows are kept apart


MAPS = {function.__name__: function for function in (instruction, xstest, phtest, first_of_turns)}
GROUPS = {function.__name__: function for function in (by_pair, xstest_groups)}


def _read() -> dict[str, Source]:
    text = (resources.files("dcr.core.sources") / "sources.yaml").read_text("utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # as quick as it can be
    found, parts = dict[str, Source](), dict[str, Source]()
    for name, entry in yaml.load(text, loader).items():
        tested, kept = entry.pop("parts", (0, 0))
        found[name] = whole = _source(**entry)
        if kept:
            parts[f"{name}_test"] = _part(name, whole, tested, final=False)
            parts[f"{name}_final"] = _part(name, whole, kept, final=True)
    return found | parts


def _source(kind: str, hub: Any = None, keep: Any = None, groups: str = "", **more: Any) -> Source:
    """A source as `sources.yaml` writes it."""
    if keep is not None:
        more["keep"] = is_paired if keep == is_paired.__name__ else has(*next(iter(keep.items())))
    if groups:
        more["groups"] = GROUPS[groups]
    if hub is not None:
        named, file = hub.pop("fields"), hub.pop("file", None)
        if isinstance(named, str):
            to_fields = MAPS[named]
        else:
            to_fields = first_turn_of(*named.values()) if "turns" in named else columns(**named)
        options = hub.pop("options", {}) | ({"data_files": file} if file else {})
        more["hub"] = Hub(fields=to_fields, options=options, **hub)
    return Source(kind=Kind(kind), **more)


def _part(name: str, whole: Source, rows: int, final: bool) -> Source:
    """The rows of a set that results here have looked at, or those kept apart for `data=final`."""
    hub = None if whole.hub is None else replace(whole.hub, rows=rows)

    def kept(row: Row) -> bool:
        return whole.keep(row) and is_final(str(row.get("prompt"))) is final

    return replace(whole, hub=hub, rows=rows, keep=kept, part_of=name, final=final)


SOURCES = _read()
