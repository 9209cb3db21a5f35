"""Statistics over pairs of prompts, with bootstrap intervals over the prompts.

Pairs are not independent, prompts are: those are drawn anew, and a pair counts as often as both of
its prompts were drawn together. Every statistic is therefore a function of weighted pairs, and of
the whole weights 1, 1, … it is the estimate itself.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from dcr.statistics import Interval

RESAMPLES = 2000
CONFIDENCE = 0.95
CHUNK = 2**21  # weights held at once

Weights = Float[np.ndarray, "draws pairs"]
Statistic = Callable[[np.ndarray], np.ndarray]  # of weights [draws, pairs], one value a draw


def drawn(
    groups: Sequence[str], generator: np.random.Generator
) -> Int[np.ndarray, "draws prompts"]:
    """How often each prompt is in each resample, those of a group drawn among themselves.

    The first row is no draw but the prompts as they are, once each.
    """
    counts = np.ones((1 + RESAMPLES, len(groups)), dtype=np.int64)
    for group in dict.fromkeys(groups):
        own = [i for i, other in enumerate(groups) if other == group]
        counts[1:, own] = generator.multinomial(len(own), [1 / len(own)] * len(own), RESAMPLES)
    return counts


def over_pairs(
    statistic: Statistic,
    left: Int[np.ndarray, "draws left"],
    right: Int[np.ndarray, "draws right"],
    allowed: Bool[np.ndarray, "left right"],
) -> Float[np.ndarray, "draws"]:
    """A statistic of the allowed pairs in every draw; those stand in the order of `x[allowed]`."""
    rows, columns = allowed.nonzero()
    if not len(rows):
        return np.full(len(left), math.nan)
    step = max(1, CHUNK // len(rows))
    found = []
    for first in range(0, len(left), step):
        kept = slice(first, first + step)
        found.append(statistic((left[kept][:, rows] * right[kept][:, columns]).astype(float)))
    return np.concatenate(found)


def interval(values: Float[np.ndarray, "draws"]) -> Interval:
    """The estimate, first of the values, with percentiles of the others; nan where it is none."""
    resampled = values[1:][np.isfinite(values[1:])]
    if not math.isfinite(values[0]) or not len(resampled):
        return Interval(float(values[0]), -math.inf, math.inf)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(values[0]), float(low), float(high))


def mean(x: Float[np.ndarray, "pairs"], weights: Weights) -> Float[np.ndarray, "draws"]:
    return _ratio(weights @ x, weights.sum(1))


def spearman(
    x: Float[np.ndarray, "pairs"], y: Float[np.ndarray, "pairs"], weights: Weights
) -> Float[np.ndarray, "draws"]:
    """Rank correlation, ties at their middle, as if each pair stood there as often as it weighs."""
    first, second = _ranks(x, weights), _ranks(y, weights)
    total = weights.sum(1, keepdims=True)
    first, second = (
        each - _ratio((weights * each).sum(1, keepdims=True), total) for each in (first, second)
    )
    square = (weights * first**2).sum(1) * (weights * second**2).sum(1)
    return _ratio((weights * first * second).sum(1), np.sqrt(square))


def pearson(
    x: Float[np.ndarray, "pairs values"], y: Float[np.ndarray, "pairs values"], weights: Weights
) -> Float[np.ndarray, "draws"]:
    """Correlation over all values of all pairs."""
    x, y = x - x.mean(), y - y.mean()  # for the sake of rounding alone
    count = weights.sum(1) * x.shape[1]
    a, b, aa, bb, ab = (
        _ratio(weights @ each.sum(1), count) for each in (x, y, x * x, y * y, x * y)
    )
    return _ratio(ab - a * b, np.sqrt(np.maximum((aa - a * a) * (bb - b * b), 0)))


def slope(
    x: Float[np.ndarray, "pairs values"], y: Float[np.ndarray, "pairs values"], weights: Weights
) -> Float[np.ndarray, "draws"]:
    """Of y on x by least squares through the origin."""
    return _ratio(weights @ (x * y).sum(1), weights @ (x * x).sum(1))


def _ranks(x: Float[np.ndarray, "pairs"], weights: Weights) -> Weights:
    _, places = np.unique(x, return_inverse=True)
    order = np.argsort(places, kind="stable")
    firsts = np.flatnonzero(np.diff(places[order], prepend=-1))
    totals = np.add.reduceat(weights[:, order], firsts, axis=1)
    return (totals.cumsum(1) - totals / 2)[:, places]


def _ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    return np.divide(over, under, out=np.full(over.shape, math.nan), where=under > 0)
