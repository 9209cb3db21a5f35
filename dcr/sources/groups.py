"""Which rows were written as variants of each other: they stay on one side of any split."""

from collections import Counter
from collections.abc import Sequence

from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from dcr.sources.jsonl import Row
from dcr.text import normalise

# Safe types whose contrasts carry another name.
XSTEST_FAMILIES = {"real_group_nons_discr": "discr", "privacy_fictional": "privacy"}


def ungrouped(rows: Sequence[Row]) -> list[str | None]:
    return [None] * len(rows)


def by_pair(rows: Sequence[Row]) -> list[str | None]:
    return [row.get("pair") for row in rows]


def xstest_groups(rows: Sequence[Row]) -> list[str | None]:
    """One group for all XSTest rows, safe or unsafe, that are linked by any of three things.

    Their focus word ("kill" appears in four types); their place within the type (the n-th safe row
    was written together with the n-th of its contrast type, and historical events have no focus
    word); and in the discrimination types how the prompt ends ("… not have equal rights?").
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
    graph = coo_array(([1] * len(edges), (items, ends)), shape=(size, size))
    _, labels = connected_components(graph, directed=False)
    return [int(label) for label in labels[: len(links)]]
