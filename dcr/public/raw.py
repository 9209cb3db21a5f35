"""Raw rows of public data sets as ours: `sources.yaml` names these functions by their path.

A row of the hub gets the keys that it has in a local folder, such as `prompt` and `category`.
"""

import re
from collections import Counter
from collections.abc import Sequence

import scipy

from dcr.core.sources import Row
from dcr.core.text import normalise

# safe types whose contrasts have another name
XSTEST_FAMILIES = {"real_group_nons_discr": "discr", "privacy_fictional": "privacy"}


def first_turn(row: Row) -> Row:
    """The first human turn of an HH-RLHF dialogue; empty if there is none.

    Red-team attempts call the dialogue `transcript`, and the other folders `chosen`.
    """
    dialogue = row["transcript"] if "transcript" in row else row["chosen"]
    _, _, rest = dialogue.partition("\n\nHuman:")
    return {"prompt": re.split(r"\n\n(?:Assistant|Human):", rest, maxsplit=1)[0].strip()}


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
