"""In which order a stage sees its rows: a function of seed and epoch, the same on every rank.

Drawn as torch's CPU generator would draw, bit for bit and without torch, so that a plan counts the
batches of training without waiting for it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from dcr.core.config import Sampler

Row = TypeVar("Row")


def mixed(*seeds: int) -> int:
    """One seed out of a tuple of numbers, a function of the whole of it."""
    seed = 0
    for number in seeds:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return seed


class Chance:
    """The stream of `torch.Generator().manual_seed(mixed(*seeds))`: a Mersenne Twister."""

    def __init__(self, *seeds: int) -> None:
        self.stream = np.random.RandomState(mixed(*seeds) % 2**32)

    def _numbers(self, count: int) -> np.ndarray:
        return self.stream.randint(0, 2**32, size=count, dtype=np.uint32)

    def permutation(self, count: int) -> list[int]:
        """As `torch.randperm`."""
        order = list(range(count))
        for place, number in enumerate(self._numbers(max(count - 1, 0)).tolist()):
            other = place + number % (count - place)
            order[place], order[other] = order[other], order[place]
        return order

    def choices(self, weights: Sequence[float] | np.ndarray, draws: int) -> list[int]:
        """As `torch.multinomial` with replacement of weights in float64."""
        halves = self._numbers(2 * draws).astype(np.uint64)
        wholes = (halves[0::2] << np.uint64(32)) | halves[1::2]
        uniform = (wholes & np.uint64(2**53 - 1)).astype(np.float64) * 2.0**-53
        up_to = np.cumsum(weights)
        up_to /= up_to[-1]
        up_to[-1] = 1.0
        return np.searchsorted(up_to, uniform).tolist()


def balanced_draws(labels: Sequence[int], draws: int, chance: Chance) -> list[int]:
    """With replacement, weight one over the class count: the classes come up equally often."""
    _, classes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return chance.choices(1.0 / counts[classes], draws)


def proportional_draws(labels: Sequence[int], draws: int, chance: Chance) -> list[int]:
    """Every row once in random order, again and again: classes come up as often as they are."""
    rounds = math.ceil(draws / len(labels))
    return [row for _ in range(rounds) for row in chance.permutation(len(labels))][:draws]


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
        self, order: Callable[[Chance], list[int]], draws: int, batch_size: int, seed: int
    ) -> None:
        self.order, self.draws, self.batch_size, self.seed = order, draws, batch_size, seed
        self.start, self.epoch = 0, 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.draws / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order(Chance(self.seed, self.epoch))
        passed = min(max(self.start - self.epoch * len(self), 0), len(self))
        for index in range(passed, len(self)):
            yield rows[index * self.batch_size : (index + 1) * self.batch_size]


def share(rows: Sequence[Row], rank: int, world: int) -> Sequence[Row]:
    """A rank's part of a batch: disjoint, in order, and as large as any other's up to one row."""
    first, last = (len(rows) * place // world for place in (rank, rank + 1))
    return rows[first:last]
