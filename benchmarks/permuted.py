"""The preset's pairs with labels drawn at random, to see what of stage one is due to its labels.

    python benchmarks/permuted.py <out> [--seed 0]

Writes `<out>/seemingly_toxic.jsonl` and `<out>/toxic.jsonl`. The two prompts of each pair change
sides with probability one half, so topics, templates and counts stay as they are. Prompts without a
partner change sides in equal numbers of both kinds: none of the preset's 228 does, since all are
toxic, so that their labels still tell something.
"""

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

from dcr.core import sources, storage
from dcr.core.config import Kind
from dcr.core.config.training import ReadoutConfig
from dcr.core.sources import Example

KINDS = (Kind.seemingly_toxic, Kind.toxic)


def permuted(rows: list[Example], seed: int) -> dict[Kind, list[Example]]:
    """Rows of both kinds, by the kind that they are given; a row's own kind stays in it."""
    pairs: dict[str, list[Example]] = defaultdict(list)
    for row in rows:
        pairs[row.group or row.id].append(row)
    drawn, given = random.Random(seed), {kind: [] for kind in KINDS}
    alone: dict[Kind, list[Example]] = {kind: [] for kind in KINDS}
    for _, members in sorted(pairs.items()):
        if {row.kind for row in members} != set(KINDS):
            for row in members:
                alone[row.kind].append(row)
            continue
        changes = drawn.random() < 0.5
        for row in members:
            given[KINDS[(row.kind is Kind.toxic) != changes]].append(row)
    change = min(len(members) for members in alone.values()) // 2
    for kind, members in alone.items():
        drawn.shuffle(members)
        other = KINDS[kind is not Kind.toxic]
        given[other] += members[:change]
        given[kind] += members[change:]
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    named = ReadoutConfig()
    rows = [
        row
        for kind in KINDS
        for source in getattr(named, kind.value)
        for row in sources.read(source, kind=kind)
    ]
    for kind, members in permuted(rows, told.seed).items():
        lines = [
            json.dumps({"id": row.id, "prompt": row.prompt, "group": row.group or row.id})
            for row in members
        ]
        path = told.out / f"{kind.value}.jsonl"
        storage.write_bytes(path, ("\n".join(lines) + "\n").encode())
        changed = sum(row.kind is not kind for row in members)
        print(f"{path}: {len(members)} prompts, {changed} of the other kind")


if __name__ == "__main__":
    main()
