"""Intervals, paired tests and agreement, for every number that a table shows."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import stats
from torchmetrics.functional.classification import binary_cohen_kappa


@dataclass(frozen=True)
class Interval:
    """An estimate with the ends of its confidence interval."""

    estimate: float
    low: float
    high: float


def wilson(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """A rate with its Wilson score interval; of nothing, nan within [0, 1].

    Raises ValueError unless 0 <= successes <= total.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"{successes} successes of {total}: must lie between 0 and the total")
    if total == 0:
        return Interval(math.nan, 0.0, 1.0)
    ends = stats.binomtest(successes, total).proportion_ci(confidence, method="wilson")
    return Interval(successes / total, float(ends.low), float(ends.high))


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float:
    """Probability that a positive scores above a negative, ties counting half; nan if one is empty.

    Raises ValueError if a score is NaN.
    """
    positives, negatives = _counts_by_score(positive, negative)
    return float(_auroc_of_counts(positives[None], negatives[None])[0])


def auroc_interval(
    positive: Sequence[float],
    negative: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int,
) -> Interval:
    """AUROC with a percentile bootstrap interval over the scores within each class.

    If either class is empty: nan within [0, 1]. Raises ValueError if a score is NaN.
    """
    positives, negatives = _counts_by_score(positive, negative)
    if not len(positive) or not len(negative):
        return Interval(math.nan, 0.0, 1.0)
    generator = np.random.default_rng(seed)
    drawn = _auroc_of_counts(
        # Drawing rows with replacement is, per distinct score, a multinomial draw of counts.
        generator.multinomial(len(positive), positives / len(positive), size=resamples),
        generator.multinomial(len(negative), negatives / len(negative), size=resamples),
    )
    estimate = _auroc_of_counts(positives[None], negatives[None])[0]
    return Interval(float(estimate), *_percentiles(drawn, confidence))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test on two methods' verdicts over the same prompts.

    1 if they never differ. Raises ValueError if the lengths differ.
    """
    _check_paired(a, b)
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(stats.binomtest(only_first, only_first + only_second).pvalue)


def paired_difference(
    a: Sequence[float] | Sequence[bool],
    b: Sequence[float] | Sequence[bool],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int,
) -> Interval:
    """mean(a) - mean(b) over the same prompts, with a percentile bootstrap interval over prompts.

    Verdicts count as 0 and 1. Of no prompts: nan, unbounded. Raises ValueError if the lengths
    differ.
    """
    _check_paired(a, b)
    if not len(a):
        return Interval(math.nan, -math.inf, math.inf)
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    # As for AUROC, counts per distinct difference; verdicts have three.
    values, counts = np.unique(differences, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = generator.multinomial(len(a), counts / len(a), size=resamples) @ values / len(a)
    return Interval(float(differences.mean()), *_percentiles(drawn, confidence))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1), as over seeds; nan where too few to tell."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def cohen_kappa(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Agreement of two judges' verdicts beyond chance; nan if both give one and the same verdict.

    Raises ValueError if the lengths differ.
    """
    _check_paired(a, b)
    if not len(a):
        return math.nan
    first, second = torch.tensor(a, dtype=torch.int64), torch.tensor(b, dtype=torch.int64)
    return float(binary_cohen_kappa(first, second))


def _counts_by_score(
    positive: Sequence[float], negative: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    """How often either class has each distinct score, in ascending order of score."""
    scores = np.concatenate([np.asarray(side, dtype=float) for side in (positive, negative)])
    if np.isnan(scores).any():
        raise ValueError("a score is NaN, so there is no ranking")
    distinct, places = np.unique(scores, return_inverse=True)
    sides = places[: len(positive)], places[len(positive) :]
    first, second = (np.bincount(side, minlength=len(distinct)) for side in sides)
    return first, second


def _auroc_of_counts(positives: np.ndarray, negatives: np.ndarray) -> np.ndarray:
    """AUROC per row of counts by ascending score: negatives below, and half of those level."""
    below = np.cumsum(negatives, axis=1) - negatives / 2
    wins = (positives * below).sum(axis=1)
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    return np.divide(wins, pairs, out=np.full(len(wins), np.nan), where=pairs > 0)


def _percentiles(drawn: np.ndarray, confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)


def _check_paired(a: Sequence[object], b: Sequence[object]) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} verdicts: pairs need equally many")
