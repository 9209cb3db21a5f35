"""How well a probe on each pair of sources, at each layer, carries over to other prompts."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcr import contamination, separability, sources
from dcr.choice.origins import FEWEST, Material, Pair
from dcr.config import ConfigError, Kind
from dcr.statistics import Interval

RESAMPLES = 500  # of each of some hundred intervals

Features = Mapping[tuple[Kind, tuple[str, ...]], Float[Tensor, "layers prompts width"]]
Labelled = tuple[Float[Tensor, "layers prompts width"], Int[Tensor, " prompts"]]


@dataclass(frozen=True)
class LayerTransfer:
    """Of a probe at one layer: AUROC within its sources, on each test set, and their mean."""

    layer: int
    within: Interval
    tests: dict[str, Interval]
    transfer: Interval


@dataclass(frozen=True)
class PairTransfer:
    """All layers of one pair of sources, with what a probe might have learnt instead."""

    pair: Pair
    rows: tuple[int, int]
    questions: tuple[float, float]  # share of prompts that end as questions, by class
    form_gap: str | None
    layers: list[LayerTransfer]

    @property
    def best(self) -> LayerTransfer:
        """The layer of highest transfer, the earliest of equals."""
        return max(self.layers, key=lambda layer: layer.transfer.estimate)

    @property
    def level(self) -> list[int]:
        """Layers whose transfer lies within the interval of the best."""
        low = self.best.transfer.low
        return [layer.layer for layer in self.layers if layer.transfer.estimate >= low]


def ranked(material: Material, features: Features, seed: int, near: float) -> list[PairTransfer]:
    """Every candidate in the given order.

    Test prompts equal to or as close as `near` to a training prompt are left out.
    """
    return [_of_pair(pair, material, features, seed, near) for pair in material.candidates]


def common(found: Sequence[PairTransfer]) -> list[str]:
    """The test sets that every pair was tested on."""
    shared = set.intersection(*(set(pair.best.tests) for pair in found))
    return [name for name in found[0].best.tests if name in shared]


def on_common(pair: PairTransfer, names: Sequence[str]) -> Interval | None:
    """Transfer of the pair's best layer on these sets alone; None without any."""
    return mean([pair.best.tests[name] for name in names]) if names else None


def mean(intervals: Sequence[Interval]) -> Interval:
    """The mean of independent estimates, its ends recovered from theirs (Zou and Donner 2008)."""
    count = len(intervals)
    estimate = sum(part.estimate for part in intervals) / count
    below = math.sqrt(sum((part.estimate - part.low) ** 2 for part in intervals)) / count
    above = math.sqrt(sum((part.high - part.estimate) ** 2 for part in intervals)) / count
    return Interval(estimate, estimate - below, estimate + above)


def _of_pair(
    pair: Pair, material: Material, features: Features, seed: int, near: float
) -> PairTransfer:
    safe, toxic = (material.rows[side] for side in pair.sides)
    points, labels = _labelled(pair, features)
    groups = separability.group_names([*safe, *toxic])
    tests = _tests(pair, material, features, near)
    layers = []
    for place, train in enumerate(points):
        on = {
            name: separability.transfer_auroc(
                train, labels, others[place], kinds, seed=seed, resamples=RESAMPLES
            )
            for name, (others, kinds) in tests.items()
        }
        within = separability.probe_auroc(train, labels, groups, seed, RESAMPLES)
        layers.append(LayerTransfer(place + 1, within, on, mean(list(on.values()))))
    if not any(math.isfinite(layer.transfer.estimate) for layer in layers):
        raise ConfigError("model.name: its hidden states are not finite; choose other weights")
    return PairTransfer(
        pair,
        (len(safe), len(toxic)),
        (sources.question_share(safe), sources.question_share(toxic)),
        sources.form_gap(safe, toxic),
        [layer for layer in layers if math.isfinite(layer.transfer.estimate)],
    )


def _labelled(pair: Pair, features: Features) -> Labelled:
    safe, toxic = (features[side] for side in pair.sides)
    labels = torch.tensor([0] * safe.shape[1] + [1] * toxic.shape[1], dtype=torch.long)
    return torch.cat([safe, toxic], 1), labels


def _tests(pair: Pair, material: Material, features: Features, near: float) -> dict[str, Labelled]:
    """By name the prompts of each test set that are not among the pair's."""
    trained = [row.prompt for side in pair.sides for row in material.rows[side]]
    found = {}
    for name, test in material.tests_of(pair).items():
        points, labels = _labelled(test, features)
        prompts = [row.prompt for side in test.sides for row in material.rows[side]]
        overlaps = contamination.overlaps(prompts, {"train": trained}, near=near)
        apart = torch.tensor([overlap is None for overlap in overlaps])
        if torch.bincount(labels[apart], minlength=2).min() >= FEWEST:
            found[name] = (points[:, apart], labels[apart])
    if not found:
        raise ConfigError(
            f"tests: too few prompts of {', '.join(material.tests_of(pair))} are apart from those "
            f"of {pair}; name others with tests=<seemingly toxic>:<toxic>"
        )
    return found
