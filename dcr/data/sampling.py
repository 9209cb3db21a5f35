"""In which order rows are drawn: pure functions of a generator, and batches of what they draw."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler

from dcr.config import Sampler as SamplerName

TOXIC, SEEMINGLY_TOXIC = 1, 0  # class labels of stage one (Section 6)


def generator(*seeds: int) -> torch.Generator:
    """A generator whose stream is a function of the whole tuple of numbers."""
    mixed = 0
    for number in seeds:
        mixed = (mixed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator().manual_seed(mixed)


def balanced_draws(labels: Sequence[int], draws: int, chance: torch.Generator) -> list[int]:
    """With replacement, weight one over the class count: the classes come up equally often."""
    y = torch.tensor(labels)
    weights = 1.0 / torch.bincount(y).clamp(min=1)[y].double()
    return torch.multinomial(weights, draws, replacement=True, generator=chance).tolist()


def stratified_draws(labels: Sequence[int], draws: int, chance: torch.Generator) -> list[int]:
    """Alternating classes, each gone through in a fresh random order before any row repeats."""
    y = torch.tensor(labels)
    streams = []
    for label in (SEEMINGLY_TOXIC, TOXIC):
        rows = torch.nonzero(y == label).flatten()
        rounds = math.ceil(math.ceil(draws / 2) / len(rows))
        shuffled = [rows[torch.randperm(len(rows), generator=chance)] for _ in range(rounds)]
        streams.append(torch.cat(shuffled).tolist())
    return [row for pair in zip(*streams, strict=False) for row in pair][:draws]


def proportional_draws(labels: Sequence[int], draws: int, chance: torch.Generator) -> list[int]:
    """Every row once in random order, again and again: classes come up as often as they are."""
    rounds = math.ceil(draws / len(labels))
    order = [torch.randperm(len(labels), generator=chance) for _ in range(rounds)]
    return torch.cat(order)[:draws].tolist()


DRAWS = {
    SamplerName.balanced: balanced_draws,
    SamplerName.stratified: stratified_draws,
    SamplerName.proportional: proportional_draws,
}


class EpochBatches(Sampler[list[int]]):
    """Batches of row indices as a pure function of (seed, epoch, rank, world).

    A batch holds `batch_size` rows over all ranks; each rank yields its share. `start` optimiser
    steps are passed over, which is how a resumed run continues with the next one. Lightning
    announces epochs through the attribute `sampler`.
    """

    def __init__(
        self,
        order: Callable[[torch.Generator], list[int]],
        draws: int,
        batch_size: int,
        seed: int,
        drop_last: bool = False,
    ) -> None:
        self.order, self.draws, self.batch_size, self.seed = order, draws, batch_size, seed
        self.drop_last = drop_last
        self.rank, self.world, self.start, self.epoch = 0, 1, 0, 0
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        rounded = math.floor if self.drop_last else math.ceil
        return max(1, rounded(self.draws / self.batch_size))

    def __iter__(self) -> Iterator[list[int]]:
        rows = self.order(generator(self.seed, self.epoch))
        passed = min(max(self.start - self.epoch * len(self), 0), len(self))
        for index in range(passed, len(self)):
            batch = rows[index * self.batch_size : (index + 1) * self.batch_size]
            # consecutive rows, because every other row of a stratified batch is of one class
            first, last = (len(batch) * r // self.world for r in (self.rank, self.rank + 1))
            # a rank without rows would not join the gradient exchange: give it the first one
            yield batch[first:last] or batch[:1]
