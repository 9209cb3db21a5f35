"""Rates, agreement, and tests and intervals of comparisons: paired prompts, seeds, win rates."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from dcr.core.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Interval,
    of_draws,
    percentiles,
    ratio,
    resampled,
)

SLOPE_PENALTY = 0.1  # keeps the slope finite if one side wins whenever it is the longer one
CHUNK = 2**21  # weights held at once
FEWEST_FOR_LENGTHS = 20  # comparisons, ten per coefficient

Weights = Float[np.ndarray, "draws pairs"]
Statistic = Callable[[np.ndarray], np.ndarray]  # of weights [draws, pairs], one value a draw


@dataclass(frozen=True)
class WinRate:
    """Win rates over comparisons, in percent; nan without one, the error also with only one."""

    win_rate: float
    standard_error: float
    discrete: float


def wilson(successes: int, total: int) -> Interval:
    """A rate with its Wilson score interval; nan within [0, 1] for a total of 0."""
    if total == 0:
        return Interval(math.nan, 0.0, 1.0)
    ends = scipy.stats.binomtest(successes, total).proportion_ci(CONFIDENCE, method="wilson")
    return Interval(successes / total, float(ends.low), float(ends.high))


def finite(value: float) -> float | None:
    """The value for JSON, which has null for an undefined one."""
    return value if math.isfinite(value) else None


def cohen_kappa(a: Sequence[bool], b: Sequence[bool]) -> float:
    """The agreement of two judges' verdicts beyond chance; nan if all verdicts are the same.

    Raises ValueError if the lengths differ.
    """
    check_paired(a, b)
    if not len(a):
        return math.nan
    import torch  # both imports take two seconds
    from torchmetrics.functional.classification import binary_cohen_kappa

    first, second = torch.tensor(a, dtype=torch.int64), torch.tensor(b, dtype=torch.int64)
    return float(binary_cohen_kappa(first, second))


def check_paired(a: Sequence[object], b: Sequence[object]) -> None:
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} verdicts: pairs need equally many")


def resampled_groups(
    groups: Sequence[str], generator: np.random.Generator, resamples: int = RESAMPLES
) -> dict[str, Int[np.ndarray, "draws own"]]:
    """Resamples of each group's own members, group by group in the order in which they appear."""
    sizes = {group: list(groups).count(group) for group in dict.fromkeys(groups)}
    return {group: resampled([1] * n, generator, resamples) for group, n in sizes.items()}


def redrawn(
    groups: Sequence[str], generator: np.random.Generator
) -> Int[np.ndarray, "draws prompts"]:
    """The count of each prompt in each resample, drawn within its group.

    The first row is no draw but has each prompt once.
    """
    counts = np.ones((1 + RESAMPLES, len(groups)), dtype=np.int64)
    for group, own in resampled_groups(groups, generator).items():
        counts[1:, [i for i, other in enumerate(groups) if other == group]] = own
    return counts


def mean_interval(values: Sequence[float], *, seed: int) -> Interval:
    """A mean with its percentile bootstrap interval over the values, drawn one by one."""
    drawn = np.random.default_rng(seed).choice(np.asarray(values), (RESAMPLES, len(values))).mean(1)
    return Interval(float(np.mean(values)), *percentiles(drawn))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Exact two-sided p of McNemar's test on two methods' verdicts over the same prompts.

    1 if they never differ. Raises ValueError if the lengths differ.
    """
    check_paired(a, b)
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(scipy.stats.binomtest(only_first, only_first + only_second).pvalue)


def kappa(
    a: Sequence[object], b: Sequence[object], groups: Sequence[str], *, seed: int
) -> Interval:
    """Cohen's κ of two raters' labels of the same things, with a bootstrap interval over `groups`.

    Things of one group, such as answers to one prompt, are drawn together. It is nan, unbounded, if
    all labels are the same; so are draws, which then count in no interval. Raises ValueError if the
    lengths differ.
    """
    check_paired(a, b)
    check_paired(a, groups)
    _, labels = np.unique([str(label) for label in (*a, *b)], return_inverse=True)
    kinds, (first, second) = int(labels.max(initial=0)) + 1, labels.reshape(2, -1)
    names, group = np.unique(groups, return_inverse=True)
    counts = np.zeros((len(names), kinds * kinds), dtype=np.int64)
    np.add.at(counts, (group, first * kinds + second), 1)
    drawn = np.ones((1, len(names)), dtype=np.int64)
    if len(names):
        drawn = np.concatenate([drawn, resampled(drawn[0], np.random.default_rng(seed))])
    tables = (drawn @ counts).reshape(len(drawn), kinds, kinds)
    total, agreed = tables.sum((1, 2)), np.trace(tables, axis1=1, axis2=2)
    chance = (tables.sum(1) * tables.sum(2)).sum(1)  # of total²
    return of_draws(ratio(total * agreed - chance, total**2 - chance))


def paired_difference(
    a: Sequence[float] | Sequence[bool],
    b: Sequence[float] | Sequence[bool],
    *,
    seed: int,
) -> Interval:
    """mean(a) - mean(b) over the same prompts, with a percentile bootstrap interval over prompts.

    Verdicts count as 0 and 1. Without prompts it is nan, unbounded. Raises ValueError if the
    lengths differ.
    """
    check_paired(a, b)
    if not len(a):
        return Interval(math.nan, -math.inf, math.inf)
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    # counts per distinct difference, as for AUROC; verdicts have three
    values, counts = np.unique(differences, return_counts=True)
    generator = np.random.default_rng(seed)
    drawn = resampled(counts, generator) @ values / len(a)
    return Interval(float(differences.mean()), *percentiles(drawn))


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (n - 1); nan for too few values."""
    mean = float(np.mean(values)) if len(values) else math.nan
    return mean, float(np.std(values, ddof=1)) if len(values) > 1 else math.nan


def paired_over_seeds(
    a: Sequence[float], b: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """Mean of a - b seed by seed with Student's t interval; ends are nan for a single seed.

    Raises ValueError if the lengths differ.
    """
    check_paired(a, b)
    mean, spread = mean_and_spread([one - other for one, other in zip(a, b, strict=True)])
    if len(a) < 2:
        return Interval(mean, math.nan, math.nan)
    reach = float(scipy.stats.t.ppf((1 + confidence) / 2, len(a) - 1)) * spread / math.sqrt(len(a))
    return Interval(mean, mean - reach, mean + reach)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values in the given order (Holm 1979): below α, the family-wise error is below α.

    Raises ValueError for a p value outside [0, 1] or NaN.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError(f"{list(p_values)}: p values must lie in [0, 1]")
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def win_rates(preferences: Sequence[float]) -> WinRate:
    """The mean preference, its standard error (n - 1), and the share of wins; a tie is half a win.

    A preference in [0, 1] tells how far a comparison goes to one side. Raises ValueError for one
    outside.
    """
    values = _preferences(preferences)
    if not len(values):
        return WinRate(math.nan, math.nan, math.nan)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    discrete = ((values > 0.5) + (values == 0.5) / 2).mean()
    return WinRate(float(100 * values.mean()), float(100 * error), float(100 * discrete))


def length_controlled_win_rate(
    preferences: Sequence[float], differences: Sequence[float]
) -> float | None:
    """The win rate in percent had both sides answered at equal length (Dubois et al. 2024).

    It is a logistic regression of the preferences in [0, 1] on an intercept and tanh(difference /
    standard deviation of the differences), read at difference 0; a difference is this side's
    length minus the other's. Trading sides gives 100 minus the rate. It departs from the source in
    two ways: it leaves out the term for an instruction's difficulty, which is estimated over a
    whole leaderboard, and its penalty is a ridge on the slope alone, while the source has a
    cross-validated lasso and extra annotations of padded baselines.

    The result is None if lengths cannot be told from sides: with fewer than 20 comparisons, with
    one difference throughout, or without convergence. Raises ValueError if the lengths of the
    sequences differ or a preference lies outside [0, 1].
    """
    check_paired(preferences, differences)
    values, lengths = _preferences(preferences), np.asarray(differences, dtype=float)
    if len(values) and not lengths.any():
        return win_rates(preferences).win_rate
    if len(values) < FEWEST_FOR_LENGTHS or np.ptp(lengths) == 0:
        return None
    design = np.stack([np.ones(len(values)), np.tanh(lengths / lengths.std(ddof=1))], axis=1)
    penalty = np.diag([0.0, SLOPE_PENALTY])

    def loss(beta: np.ndarray) -> float:
        logits = design @ beta
        return float(np.logaddexp(0, logits).sum() - values @ logits + beta @ penalty @ beta / 2)

    def gradient(beta: np.ndarray) -> np.ndarray:
        return design.T @ (scipy.special.expit(design @ beta) - values) + penalty @ beta

    def curvature(beta: np.ndarray) -> np.ndarray:
        rates = scipy.special.expit(design @ beta)
        return design.T @ (design * (rates * (1 - rates))[:, None]) + penalty

    fit = scipy.optimize.minimize(
        loss, np.zeros(2), method="trust-exact", jac=gradient, hess=curvature,
        options={"gtol": 1e-6},
    )  # fmt: skip
    return float(100 * scipy.special.expit(fit.x[0])) if fit.success else None


def _preferences(values: Sequence[float]) -> np.ndarray:
    preferences = np.asarray(values, dtype=float)
    if not ((preferences >= 0) & (preferences <= 1)).all():
        raise ValueError("a preference lies outside [0, 1]")
    return preferences


# --- statistics over pairs of prompts ---
#
# Prompts are independent, pairs are not: a resample draws prompts, and a pair counts as often as
# both of its prompts were drawn together. Every statistic is therefore a function of weighted
# pairs, and the weights 1, 1, … give the estimate itself.


def over_pairs(
    statistic: Statistic,
    left: Int[np.ndarray, "draws left"],
    right: Int[np.ndarray, "draws right"],
    allowed: Bool[np.ndarray, "left right"],
) -> Float[np.ndarray, "draws"]:
    """A statistic of the allowed pairs, in the order of `x[allowed]`, in every draw."""
    rows, columns = allowed.nonzero()
    if not len(rows):
        return np.full(len(left), math.nan)
    step = max(1, CHUNK // len(rows))
    values = []
    for first in range(0, len(left), step):
        part = slice(first, first + step)
        values.append(statistic((left[part][:, rows] * right[part][:, columns]).astype(float)))
    return np.concatenate(values)


def weighted_mean(x: Float[np.ndarray, "pairs"], weights: Weights) -> Float[np.ndarray, "draws"]:
    return ratio(weights @ x, weights.sum(1))


def weighted_spearman(
    x: Float[np.ndarray, "pairs"], y: Float[np.ndarray, "pairs"], weights: Weights
) -> Float[np.ndarray, "draws"]:
    """The rank correlation, ties at their middle rank; a pair counts as often as it weighs."""
    first, second = _ranks(x, weights), _ranks(y, weights)
    total = weights.sum(1, keepdims=True)
    first, second = (
        each - ratio((weights * each).sum(1, keepdims=True), total) for each in (first, second)
    )
    square = (weights * first**2).sum(1) * (weights * second**2).sum(1)
    return ratio((weights * first * second).sum(1), np.sqrt(square))


def weighted_pearson(
    x: Float[np.ndarray, "pairs values"], y: Float[np.ndarray, "pairs values"], weights: Weights
) -> Float[np.ndarray, "draws"]:
    """The correlation over all values of all pairs."""
    x, y = x - x.mean(), y - y.mean()  # only against rounding
    count = weights.sum(1) * x.shape[1]
    a, b, aa, bb, ab = (ratio(weights @ each.sum(1), count) for each in (x, y, x * x, y * y, x * y))
    return ratio(ab - a * b, np.sqrt(np.maximum((aa - a * a) * (bb - b * b), 0)))


def weighted_slope(
    x: Float[np.ndarray, "pairs values"], y: Float[np.ndarray, "pairs values"], weights: Weights
) -> Float[np.ndarray, "draws"]:
    """The slope of y on x by least squares through the origin."""
    return ratio(weights @ (x * y).sum(1), weights @ (x * x).sum(1))


def _ranks(x: Float[np.ndarray, "pairs"], weights: Weights) -> Weights:
    _, places = np.unique(x, return_inverse=True)
    order = np.argsort(places, kind="stable")
    firsts = np.flatnonzero(np.diff(places[order], prepend=-1))
    totals = np.add.reduceat(weights[:, order], firsts, axis=1)
    return (totals.cumsum(1) - totals / 2)[:, places]
