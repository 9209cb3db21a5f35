"""In which order a stage sees its rows: a function of seed and epoch, the same on every rank."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from dcr.core.config import Sampler

if TYPE_CHECKING:
    from torch import Generator

Row = TypeVar("Row")


def mixed(*seeds: int) -> int:
    """One seed out of a tuple of numbers, a function of the whole of it."""
    seed = 0
    for number in seeds:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return seed


def generator(*seeds: int) -> "Generator":
    """Torch's generator on the CPU, seeded by all of the numbers: the same on every machine."""
    import torch  # help and a user's error need none

    return torch.Generator().manual_seed(mixed(*seeds))


def permutation(count: int, generator: "Generator") -> list[int]:
    """The numbers below `count` in drawn order."""
    import torch

    return torch.randperm(count, generator=generator).tolist()


def balanced_draws(labels: Sequence[int], draws: int, generator: "Generator") -> list[int]:
    """With replacement, weight one over the class count: the classes come up equally often."""
    import torch

    of = torch.as_tensor(labels)
    _, classes, counts = torch.unique(of, return_inverse=True, return_counts=True)
    weights = 1 / counts.double()[classes]
    return torch.multinomial(weights, draws, replacement=True, generator=generator).tolist()


def proportional_draws(labels: Sequence[int], draws: int, generator: "Generator") -> list[int]:
    """Every row once in random order, again and again: classes come up as often as they are."""
    rounds = math.ceil(draws / len(labels))
    return [row for _ in range(rounds) for row in permutation(len(labels), generator)][:draws]


DRAWS = {
    Sampler.balanced: balanced_draws,
    Sampler.proportional: proportional_draws,
}


class EpochBatches:
    """Batches of row indices as a pure function of (seed, epoch), the same on every rank.

    A batch holds the `batch_size` rows of all ranks, of which each takes its `share`. `start`
    optimiser steps are passed over, which is how a resumed run continues with the next one.
    Lightning announces epochs through the attribute `sampler`.
    """

    def __init__(
        self, order: "Callable[[Generator], list[int]]", draws: int, batch_size: int, seed: int
    ) -> None:
        self.order, self.draws, self.batch_size, self.seed = order, draws, batch_size, seed
        self.start, self.epoch = 0, 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.draws / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order(generator(self.seed, self.epoch))
        passed = min(max(self.start - self.epoch * len(self), 0), len(self))
        for index in range(passed, len(self)):
            yield rows[index * self.batch_size : (index + 1) * self.batch_size]


def share(rows: Sequence[Row], rank: int, world: int) -> Sequence[Row]:
    """A rank's part of a batch: disjoint, in order, and as large as any other's up to one row."""
    first, last = (len(rows) * place // world for place in (rank, rank + 1))
    return rows[first:last]
