"""Token sequences as a tree of their common beginnings."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool
from torch import Tensor

from dcr.refusal.continuations import Tokens


@dataclass(frozen=True)
class Trie:
    """The trie of a set of token sequences: its inner nodes and its edges.

    Node 0 is the root, which is the prompt's last position. Nodes 1, 2, ... are the other inner
    nodes, parents first. A leaf is no node: nothing is read from it. Edges are sorted by the node
    they leave.

    Attributes:
        tokens: of each node but the root, as `parents` and `depths` (1 below the root) are.
        sources: of each edge, the node it leaves; `labels`: the token it leads to.
        paths: of each sequence, its edges.
        kept: the sequences that no other sequence begins.
    """

    tokens: tuple[int, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    sources: tuple[int, ...]
    labels: tuple[int, ...]
    paths: tuple[tuple[int, ...], ...]
    kept: tuple[int, ...]

    @cached_property
    def children(self) -> dict[int, list[int]]:
        """Of each node, the inner nodes below it."""
        found: dict[int, list[int]] = {node: [] for node in range(len(self.tokens) + 1)}
        for place, parent in enumerate(self.parents):
            found[parent].append(place + 1)
        return found

    def edges(self, node: int) -> list[int]:
        """The tokens of the edges that leave a node."""
        pairs = zip(self.sources, self.labels, strict=True)
        return [label for source, label in pairs if source == node]

    def sight(self) -> Bool[Tensor, "nodes nodes"]:
        """Which node (row, without the root) sees which: itself and its ancestors."""
        seen = torch.eye(len(self.tokens), dtype=torch.bool)
        for place, parent in enumerate(self.parents):
            if parent:
                seen[place] |= seen[parent - 1]
        return seen


def trie(sequences: Sequence[Tokens]) -> Trie:
    """The trie of distinct, non-empty token sequences."""
    beginnings = {y[:i] for y in sequences for i in range(1, len(y) + 1)}
    inner = sorted({y[:i] for y in sequences for i in range(1, len(y))})
    node = {(): 0} | {begun: place + 1 for place, begun in enumerate(inner)}
    ends = sorted(beginnings, key=lambda begun: (node[begun[:-1]], begun[-1]))
    edge = {begun: place for place, begun in enumerate(ends)}
    whole = set(sequences)
    return Trie(
        tokens=tuple(begun[-1] for begun in inner),
        parents=tuple(node[begun[:-1]] for begun in inner),
        depths=tuple(len(begun) for begun in inner),
        sources=tuple(node[begun[:-1]] for begun in ends),
        labels=tuple(begun[-1] for begun in ends),
        paths=tuple(tuple(edge[y[:i]] for i in range(1, len(y) + 1)) for y in sequences),
        kept=tuple(
            place
            for place, y in enumerate(sequences)
            if not any(y[:i] in whole for i in range(1, len(y)))
        ),
    )
