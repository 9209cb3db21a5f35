"""Rankings with bootstrap intervals, which every evaluation computes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 2000
CONFIDENCE = 0.95
ROUNDING = 1e-9  # in prompts: 0.7 of 10 is 7, whatever the floating point says


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Ranking:
    """The ranking of positives above negatives by scores, as a whole and at some thresholds.

    Attributes:
        auroc: the probability that a positive scores above a negative.
        spared: by a share s of positives, the share of negatives below the threshold at which at
            least s of the positives are caught (a score at the threshold is caught).
        caught: by a share f of negatives, the share of positives at or above the threshold at which
            at most f of the negatives are.
    """

    auroc: Interval
    spared: dict[float, Interval]
    caught: dict[float, Interval]


def resampled(
    counts: Sequence[int] | np.ndarray, generator: np.random.Generator, resamples: int = RESAMPLES
) -> Int[np.ndarray, "draws values"]:
    """The bootstrap counts of each value in each resample, for values that stand `counts` times.

    Drawing rows with replacement is a multinomial draw of counts of distinct values.
    """
    total = int(np.sum(counts))
    return generator.multinomial(total, np.asarray(counts) / total, size=resamples)


def percentiles(drawn: np.ndarray) -> tuple[float, float]:
    """The ends of the percentile interval over the finite draws; unbounded without any."""
    known = drawn[np.isfinite(drawn)]
    if not len(known):
        return -math.inf, math.inf
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(known, [tail, 1 - tail])
    return float(low), float(high)


def of_draws(values: Float[np.ndarray, "draws"]) -> Interval:
    """The first value as estimate, with percentiles of the others; a nan estimate is unbounded."""
    estimate = float(values[0])
    drawn = values[1:] if math.isfinite(estimate) else values[:0]
    return Interval(estimate, *percentiles(drawn))


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """The probability that a positive scores above a negative, ties counting half."""
    positives, negatives = _counts_by_score(positive, negative)
    return float(_auroc_of_counts(positives[None], negatives[None])[0])


def auroc_interval(
    positive: Sequence[float],
    negative: Sequence[float],
    *,
    resamples: int = RESAMPLES,
    seed: int,
) -> Interval:
    """The AUROC with a percentile bootstrap interval over the scores within each class.

    It is the probability that a positive scores above a negative, ties counting half. An empty
    class gives nan within [0, 1]. Raises ValueError if a score is NaN.
    """
    positives, negatives = _counts_by_score(positive, negative)
    if not len(positive) or not len(negative):
        return Interval(math.nan, 0.0, 1.0)
    drawn = _drawn_counts(positives, negatives, resamples, seed)
    return of_draws(_auroc_of_counts(*drawn))


def ranking(
    positive: Sequence[float],
    negative: Sequence[float],
    *,
    caught: Sequence[float],
    alarms: Sequence[float],
    seed: int,
) -> Ranking:
    """The `Ranking` of the scores, with bootstrap intervals as in `auroc_interval`.

    `caught` are the shares of positives at which negatives are spared, `alarms` the shares of
    negatives at which positives are caught. An empty class gives nan within [0, 1]. Raises
    ValueError if a score is NaN.
    """
    positives, negatives = _counts_by_score(positive, negative)
    if not len(positive) or not len(negative):
        unknown = Interval(math.nan, 0.0, 1.0)
        return Ranking(unknown, dict.fromkeys(caught, unknown), dict.fromkeys(alarms, unknown))
    drawn = _drawn_counts(positives, negatives, RESAMPLES, seed)
    # the counts at or above each score; at the last place there is none
    reached, alarmed = (
        np.pad(side[:, ::-1].cumsum(1)[:, ::-1], ((0, 0), (0, 1))) for side in drawn
    )
    rows, many, others = np.arange(len(reached)), len(positive), len(negative)
    spared, reached_at = {}, {}
    for share in caught:
        threshold = (reached >= share * many - ROUNDING).sum(1) - 1
        spared[share] = of_draws(1 - alarmed[rows, threshold] / others)
    for share in alarms:
        threshold = (alarmed > share * others + ROUNDING).sum(1)
        reached_at[share] = of_draws(reached[rows, threshold] / many)
    return Ranking(of_draws(_auroc_of_counts(*drawn)), spared, reached_at)


def _drawn_counts(
    positives: np.ndarray, negatives: np.ndarray, resamples: int, seed: int
) -> list[np.ndarray]:
    """The counts of both classes in each resample, after a first row of the counts themselves."""
    generator = np.random.default_rng(seed)
    return [
        np.concatenate([counts[None], resampled(counts, generator, resamples)])
        for counts in (positives, negatives)
    ]


def _counts_by_score(
    positive: Sequence[float], negative: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """The counts of each distinct score in either class, in ascending order of score."""
    scores = np.concatenate([np.asarray(side, dtype=float) for side in (positive, negative)])
    if np.isnan(scores).any():
        raise ValueError("a score is NaN, so there is no ranking")
    distinct, places = np.unique(scores, return_inverse=True)
    sides = places[: len(positive)], places[len(positive) :]
    first, second = (np.bincount(side, minlength=len(distinct)) for side in sides)
    return first, second


def _auroc_of_counts(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """The AUROC per row of counts by ascending score: negatives below, and half of those level."""
    below = np.cumsum(negatives, axis=1) - negatives / 2
    wins = (positives * below).sum(axis=1)
    return ratio(wins, positives.sum(axis=1) * negatives.sum(axis=1))


def ratio(over: np.ndarray, under: np.ndarray) -> np.ndarray:
    """The quotients, with nan for a divisor that is not positive."""
    return np.divide(over, under, out=np.full(over.shape, math.nan), where=under > 0)
