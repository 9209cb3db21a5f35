"""Intervals and tests against closed forms, scikit-learn, SciPy and brute force."""

import itertools
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import cohen_kappa_score, roc_auc_score

from dcr.core.statistics import Interval, Ranking, auroc_interval, ranking
from dcr.inference import (
    cohen_kappa,
    holm,
    length_controlled_win_rate,
    mcnemar,
    mean_and_spread,
    paired_difference,
    paired_over_seeds,
    wilson,
    win_rates,
)


def random_scores(count: int, shift: float, seed: int, decimals: int | None = None) -> list[float]:
    scores = np.random.default_rng(seed).normal(shift, 1, count)
    return (scores if decimals is None else scores.round(decimals)).tolist()


def random_verdicts(count: int, share: float, seed: int) -> list[bool]:
    return (np.random.default_rng(seed).random(count) < share).tolist()


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (1, 3), (233, 250), (1, 1)])
def test_wilson_equals_its_closed_form(successes: int, total: int) -> None:
    z = stats.norm.ppf(0.975)
    rate = successes / total
    centre = (rate + z * z / (2 * total)) / (1 + z * z / total)
    half = (
        z / (1 + z * z / total)
        * math.sqrt(rate * (1 - rate) / total + z * z / (4 * total * total))
    )  # fmt: skip
    found = wilson(successes, total)
    assert found.estimate == rate
    assert found.low == pytest.approx(centre - half, abs=1e-12)
    assert found.high == pytest.approx(centre + half, abs=1e-12)
    assert 0 <= found.low <= found.estimate <= found.high <= 1


@pytest.mark.parametrize(
    ("found", "ends"),
    [
        (wilson(0, 0), (0, 1)),
        (auroc_interval([], [1.0], seed=0), (0, 1)),
        (auroc_interval([1.0], [], seed=0), (0, 1)),
        (paired_difference([], [], seed=0), (-math.inf, math.inf)),
    ],
)
def test_of_nothing_nothing_is_known(found: Interval, ends: tuple[float, float]) -> None:
    assert math.isnan(found.estimate)
    assert (found.low, found.high) == ends


def auroc(positive: list[float], negative: list[float]) -> float:
    return auroc_interval(positive, negative, resamples=1, seed=0).estimate


def auroc_by_pairs(positive: list[float], negative: list[float]) -> float:
    wins = [(p > n) + (p == n) / 2 for p, n in itertools.product(positive, negative)]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("decimals", [None, 1, 0], ids=["no ties", "some ties", "many ties"])
@pytest.mark.parametrize("seed", range(3))
def test_auroc_equals_counting_and_scikit_learn(decimals: int | None, seed: int) -> None:
    positive = random_scores(23, 0.7, seed, decimals)
    negative = random_scores(31, 0.0, seed + 100, decimals)
    found = auroc(positive, negative)
    assert found == pytest.approx(auroc_by_pairs(positive, negative))
    assert found == pytest.approx(roc_auc_score([1] * 23 + [0] * 31, positive + negative))


def test_auroc_refuses_nan_scores() -> None:
    with pytest.raises(ValueError, match="NaN"):
        auroc_interval([0.5], [1.0, math.nan], seed=0)


@pytest.mark.parametrize("decimals", [None, 0], ids=["no ties", "many ties"])
def test_auroc_interval_equals_a_bootstrap_by_loops(decimals: int | None) -> None:
    positive = np.array(random_scores(40, 0.7, 0, decimals))
    negative = np.array(random_scores(25, 0.0, 1, decimals))
    generator = np.random.default_rng(9)
    drawn = []
    for _ in range(4000):
        first = generator.choice(positive, len(positive))[:, None]
        second = generator.choice(negative, len(negative))[None]
        drawn.append(((first > second) + (first == second) / 2).mean())
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = auroc_interval(positive.tolist(), negative.tolist(), resamples=4000, seed=0)
    assert found.estimate == pytest.approx(auroc(positive.tolist(), negative.tolist()))
    # about four standard errors of a percentile of 4,000 draws
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)


def at_thresholds(positive: np.ndarray, negative: np.ndarray) -> list[float]:
    """Two shares of negatives spared, then two of positives caught, by trying every threshold."""
    thresholds = [*np.unique([*positive, *negative]), math.inf]
    points = [((positive >= t).mean(), (negative >= t).mean()) for t in thresholds]
    spared = [max(1 - alarm for hit, alarm in points if hit >= s - 1e-12) for s in (0.7, 0.9)]
    return spared + [max(hit for hit, a in points if a <= share + 1e-12) for share in (0.05, 0.2)]


def read_at(found: Ranking) -> list[Interval]:
    return [found.spared[0.7], found.spared[0.9], found.caught[0.05], found.caught[0.2]]


@pytest.mark.parametrize("decimals", [None, 0], ids=["no ties", "many ties"])
def test_a_ranking_equals_trying_every_threshold(decimals: int | None) -> None:
    options = {"caught": (0.7, 0.9), "alarms": (0.05, 0.2)}
    positive, negative = [1.0], [0.0]
    found = ranking(positive, negative, **options, seed=0)
    for seed in range(20):  # sizes at which 0.7 and 0.9 of the prompts are whole numbers, and not
        positive = random_scores(10 + seed, 0.7, seed, decimals)
        negative = random_scores(20, 0.0, 100 + seed, decimals)
        found = ranking(positive, negative, **options, seed=0)
        wanted = at_thresholds(np.array(positive), np.array(negative))
        assert [of.estimate for of in read_at(found)] == pytest.approx(wanted)
        assert found.auroc == auroc_interval(positive, negative, seed=0)
    generator, first, second = np.random.default_rng(9), np.array(positive), np.array(negative)
    drawn = [
        at_thresholds(generator.choice(first, len(first)), generator.choice(second, len(second)))
        for _ in range(500)
    ]
    for of, low, high in zip(read_at(found), *np.quantile(drawn, [0.025, 0.975], 0), strict=True):
        assert (of.low, of.high) == pytest.approx((low, high), abs=0.051)  # one of 20 prompts


def test_a_ranking_of_plain_cases() -> None:
    apart = ranking([0.8, 0.9], [0.1, 0.2], caught=(0.7, 0.9), alarms=(0.05, 0.2), seed=0)
    assert read_at(apart) == [Interval(1.0, 1.0, 1.0)] * 4
    level = ranking([0.5, 0.5], [0.5], caught=(0.7, 0.9), alarms=(0.05, 0.2), seed=0)
    assert read_at(level) == [Interval(0.0, 0.0, 0.0)] * 4, "what ties is not told apart"
    nothing = ranking([], [0.5], caught=(0.7, 0.9), alarms=(0.05, 0.2), seed=0)
    assert all(math.isnan(of.estimate) and (of.low, of.high) == (0, 1) for of in read_at(nothing))


def test_bootstraps_follow_their_seed() -> None:
    a, b = random_scores(30, 1.0, 0), random_scores(30, 0.0, 1)
    for bootstrap in (auroc_interval, paired_difference):
        assert bootstrap(a, b, seed=5) == bootstrap(a, b, seed=5)
        assert bootstrap(a, b, seed=5) != bootstrap(a, b, seed=6)


@pytest.mark.parametrize("seed", range(4))
def test_mcnemar_equals_the_binomial_tail(seed: int) -> None:
    a, b = random_verdicts(60, 0.8, seed), random_verdicts(60, 0.6, seed + 10)
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    differing = only_a + only_b
    tail = sum(math.comb(differing, k) for k in range(min(only_a, only_b) + 1)) / 2**differing
    assert mcnemar(a, b) == pytest.approx(min(1.0, 2 * tail))
    assert mcnemar(b, a) == pytest.approx(mcnemar(a, b))
    assert mcnemar(a, a) == mcnemar([], []) == mcnemar([True, False], [False, True]) == 1


def test_paired_difference_equals_a_bootstrap_by_loops() -> None:
    a, b = random_verdicts(50, 0.8, 0), random_verdicts(50, 0.6, 1)
    differences = np.array(a, dtype=float) - np.array(b, dtype=float)
    generator = np.random.default_rng(3)
    drawn = [generator.choice(differences, 50).mean() for _ in range(4000)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    found = paired_difference(a, b, seed=0)
    assert found.estimate == pytest.approx(differences.mean())
    # means move in steps of 1/50
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.021)
    # prompt by prompt these differ by exactly 1, however much prompts differ
    found = paired_difference([x + 1.0 for x in range(40)], range(40), seed=0)
    assert (found.estimate, found.low, found.high) == pytest.approx((1, 1, 1))


@pytest.mark.parametrize("paired", [mcnemar, cohen_kappa, partial(paired_difference, seed=0)])
def test_pairs_need_equal_lengths(paired: Any) -> None:
    with pytest.raises(ValueError, match="1 and 2"):
        paired([True], [True, False])


def test_paired_over_seeds_is_students_interval() -> None:
    a, b = [0.5, 0.7, 0.9], [0.4, 0.7, 0.6]
    known = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired_over_seeds(a, b)
    expected = (0.4 / 3, known.low, known.high)
    assert (found.estimate, found.low, found.high) == pytest.approx(expected)
    assert math.isnan(paired_over_seeds([0.5], [0.4]).low)
    with pytest.raises(ValueError, match="equally many"):
        paired_over_seeds(a, b[:2])


def test_mean_and_spread() -> None:
    assert mean_and_spread([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, math.sqrt(7 / 3)))
    mean, spread = mean_and_spread([3.0])
    assert mean == 3
    assert math.isnan(spread)
    assert all(math.isnan(value) for value in mean_and_spread([]))


@pytest.mark.parametrize("seed", range(3))
def test_cohen_kappa_equals_scikit_learn(seed: int) -> None:
    a, noise = random_verdicts(80, 0.3, seed), random_verdicts(80, 0.2, seed + 10)
    b = [x != flip for x, flip in zip(a, noise, strict=True)]
    assert cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b), abs=1e-6)
    assert math.isnan(cohen_kappa([True, True], [True, True]))
    assert math.isnan(cohen_kappa([], []))


def holm_by_closed_testing(p_values: list[float]) -> list[float]:
    """The largest Bonferroni p of all intersections of hypotheses that a hypothesis is part of."""
    places = range(len(p_values))
    subsets = [s for k in places for s in itertools.combinations(places, k + 1)]
    return [
        max(min(1.0, len(s) * min(p_values[i] for i in s)) for s in subsets if place in s)
        for place in places
    ]


@pytest.mark.parametrize("seed", range(4))
def test_holm_equals_closed_testing(seed: int) -> None:
    generator = np.random.default_rng(seed)
    p_values = (generator.random(7) ** 3).round(2).tolist()  # rounded: some are tied
    assert holm(p_values) == pytest.approx(holm_by_closed_testing(p_values), abs=1e-12)

    assert holm([]) == []


@pytest.mark.parametrize("wrong", [-0.1, 1.1, math.nan])
def test_what_is_no_p_value_and_no_preference_is_refused(wrong: float) -> None:
    with pytest.raises(ValueError, match="p values"):
        holm([0.5, wrong])
    with pytest.raises(ValueError, match="outside"):
        win_rates([0.5, wrong])


def test_win_rates_by_hand() -> None:
    found = win_rates([1.0, 0.5, 0.25, 0.75])
    assert found.win_rate == 62.5
    # deviations 3/8, -1/8, -3/8, 1/8: their squares sum to 20/64
    assert found.standard_error == pytest.approx(100 * math.sqrt(20 / 64 / 3 / 4))
    assert found.discrete == pytest.approx(100 * 2.5 / 4)
    assert all(math.isnan(x) for x in vars(win_rates([])).values())
    one = win_rates([0.75])
    assert (one.win_rate, one.discrete) == (75, 100)
    assert math.isnan(one.standard_error)


def random_comparisons(
    count: int, quality: float, verbosity: float, seed: int
) -> tuple[list[float], list[float]]:
    """Preferences that follow the model of length control, with noise, and length differences."""
    generator = np.random.default_rng(seed)
    lengths = generator.normal(150, 400, count)
    logits = quality + verbosity * np.tanh(lengths / lengths.std(ddof=1))
    wins = generator.random(count) < 1 / (1 + np.exp(-logits))
    return np.where(wins, 0.97, 0.03).tolist(), lengths.tolist()


@pytest.mark.parametrize(("count", "seed"), [(20, 0), (100, 1), (805, 2)])
def test_length_control_equals_scikit_learn_on_weighted_rows(count: int, seed: int) -> None:
    preferences, lengths = random_comparisons(count, 0.4, 1.1, seed)
    feature = np.tanh(np.array(lengths) / np.std(lengths, ddof=1))[:, None]
    peer = LogisticRegression(C=10, tol=1e-10, max_iter=1000).fit(
        np.concatenate([feature, feature]),
        np.repeat([1, 0], count),
        sample_weight=np.concatenate([preferences, 1 - np.array(preferences)]),
    )
    found = length_controlled_win_rate(preferences, lengths)
    assert found is not None
    assert found == pytest.approx(100 * peer.predict_proba([[0.0]])[0, 1], abs=1e-3)
    assert abs(found - win_rates(preferences).win_rate) > 1  # length did matter
    back = length_controlled_win_rate([1 - p for p in preferences], [-x for x in lengths])
    assert back == pytest.approx(100 - found, abs=1e-6)


def test_length_control_finds_the_quality_behind_the_lengths() -> None:
    preferences, lengths = random_comparisons(20_000, quality=-0.5, verbosity=3.0, seed=3)
    true = 0.03 + 0.94 / (1 + math.exp(0.5))
    assert length_controlled_win_rate(preferences, lengths) == pytest.approx(100 * true, abs=1.5)
    assert win_rates(preferences).win_rate > 50 > 100 * true


def test_length_control_where_lengths_tell_nothing() -> None:
    preferences, lengths = random_comparisons(40, 0.3, 0.0, seed=5)
    plain = win_rates(preferences).win_rate
    assert length_controlled_win_rate(preferences, [0.0] * 40) == plain
    assert length_controlled_win_rate([0.5] * 40, lengths) == pytest.approx(50, abs=1e-6)
    assert length_controlled_win_rate(preferences, [12.0] * 40) is None  # longer by 12 each time
    assert length_controlled_win_rate(preferences[:19], lengths[:19]) is None
    assert length_controlled_win_rate([], []) is None
    # the longer answer always wins
    lengths = [float(x) for x in range(-30, 31) if x]
    found = length_controlled_win_rate([float(x > 0) for x in lengths], lengths)
    assert found == pytest.approx(50, abs=1e-6)
