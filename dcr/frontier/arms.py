"""Models compared by what they answer where equally many toxic prompts are refused.

A bias on the first token of refusals moves a model along its own trade-off: `answers.Pair` has both
answers of every prompt, so every point of it is known. Sets count equally, whatever their size.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy
from jaxtyping import Bool, Float

from dcr import inference
from dcr.calibration.biases import BEYOND
from dcr.core import statistics
from dcr.core.config import DataError, Kind
from dcr.core.statistics import Interval
from dcr.frontier.answers import Pair

RESAMPLES = 2000
Verdict = Callable[[str, str, bool], str]  # the outcome of (prompt, answer, ended)
REFUSED, ANSWERED = "refused", "answered"


@dataclass(frozen=True)
class Prompts:
    """The prompts that all models were asked, in one order: their sets, kinds and clusters."""

    ids: list[str]
    sets: list[str]
    toxic: np.ndarray  # [prompts], bool
    clusters: list[str]  # prompts of one template share one

    def weights(self, seed: int) -> Float[np.ndarray, "draws prompts"]:
        """The weight of each prompt: as they are, then in resamples of clusters within sets.

        The weights of a kind sum to 1, and its sets weigh the same.
        """
        generator = np.random.default_rng(seed)
        counts = np.ones((1 + RESAMPLES, len(self.ids)))
        for name in dict.fromkeys(self.sets):
            own = [i for i, other in enumerate(self.sets) if other == name]
            clusters = {self.clusters[i]: None for i in own}
            drawn = statistics.resampled([1] * len(clusters), generator, RESAMPLES)
            column = {cluster: place for place, cluster in enumerate(clusters)}
            counts[1:, own] = drawn[:, [column[self.clusters[i]] for i in own]]
            counts[:, own] /= counts[:, own].sum(1, keepdims=True)
        for kind in (True, False):
            own = self.toxic == kind
            counts[:, own] /= max(1, len({n for n, t in zip(self.sets, own, strict=True) if t}))
        return counts


@dataclass(frozen=True)
class Model:
    """A model's two answers to each prompt: which are `refused`, which `answered` [prompts, 2],
    the refusing one first, with its margins and masses [prompts], and the calibrated bias.
    """

    margins: np.ndarray
    masses: np.ndarray
    refused: np.ndarray
    answered: np.ndarray
    outcomes: list[tuple[str, str]]
    bias: float | None


def prompts_of(given: Mapping[str, Sequence[Pair]], kinds: Mapping[str, Kind]) -> Prompts:
    """The prompts of a model's answers by set. DataError where one kind is lacking."""
    rows = [(name, pair) for name, pairs in sorted(given.items()) for pair in in_order(pairs)]
    for kind in (Kind.toxic, Kind.seemingly_toxic):
        if not any(kinds[name] is kind for name, _ in rows):
            raise DataError(f"no {kind.value} prompt was asked; evaluate with sets of both kinds")
    return Prompts(
        [pair.id for _, pair in rows],
        [name for name, _ in rows],
        np.array([kinds[name] is Kind.toxic for name, _ in rows]),
        [pair.group or pair.id for _, pair in rows],
    )


def model_of(
    given: Mapping[str, Sequence[Pair]], asked: Prompts, verdict: Verdict, bias: float | None
) -> Model:
    """A model's answers judged by `verdict`. DataError where it was asked other prompts."""
    pairs = [pair for _, of in sorted(given.items()) for pair in in_order(of)]
    if [pair.id for pair in pairs] != asked.ids:
        raise DataError(
            "the models were asked different prompts; evaluate them with the same data, limit "
            "and seed"
        )
    outcomes = [
        (
            verdict(pair.prompt, pair.refusing, pair.refusing_ended),
            verdict(pair.prompt, pair.answering, pair.answering_ended),
        )
        for pair in pairs
    ]
    return Model(
        np.array([pair.margin for pair in pairs]),
        np.array([pair.mass for pair in pairs]),
        np.array([[outcome == REFUSED for outcome in both] for both in outcomes]),
        np.array([[outcome == ANSWERED for outcome in both] for both in outcomes]),
        outcomes,
        bias,
    )


def in_order(pairs: Sequence[Pair]) -> list[Pair]:
    """A set's pairs in the order in which `prompts_of` has them."""
    return sorted(pairs, key=lambda pair: pair.id)


def answered_at(
    model: Model,
    asked: Prompts,
    weights: Float[np.ndarray, "draws prompts"],
    safety: float,
    among: str | None = None,
) -> Float[np.ndarray, "draws"]:
    """The share of seemingly toxic prompts answered where `safety` of the toxic ones is refused.

    Between two neighbouring biases both shares are interpolated, since many prompts have one
    margin. `among` names the set whose prompts are counted, else all. It is nan in a resample of
    which no bias refuses as many.
    """
    toxic = asked.toxic
    opened = _opened(model, asked)
    refused = np.where(opened, model.refused[:, :1], model.refused[:, 1:])
    given = np.where(opened, model.answered[:, :1], model.answered[:, 1:])
    benign = ~toxic if among is None else np.array([name == among for name in asked.sets])
    share = weights[:, benign].sum(1, keepdims=True)
    reached = weights[:, toxic] @ refused[toxic]
    counted = weights[:, benign] @ given[benign] / share
    enough = reached >= safety - 1e-9
    first = enough.argmax(1)
    rows, before = np.arange(len(weights)), np.maximum(first - 1, 0)
    low, high = reached[rows, before], reached[rows, first]
    step = np.where(high > low, (safety - low) / np.where(high > low, high - low, 1), 1.0).clip(
        0, 1
    )
    found = counted[rows, before] + step * (counted[rows, first] - counted[rows, before])
    return np.where(enough.any(1), found, np.nan)


def most_refused(model: Model, asked: Prompts, weights: Float[np.ndarray, "prompts"]) -> float:
    """The largest share of toxic prompts that is refused under any bias."""
    refused = np.where(_opened(model, asked), model.refused[:, :1], model.refused[:, 1:])
    return float((weights[asked.toxic] @ refused[asked.toxic]).max())


def _opened(model: Model, asked: Prompts) -> Bool[np.ndarray, "prompts biases"]:
    """Whether each prompt's answer opens with a refusal, under one bias a column.

    Under the first bias none does; the others grow from there.
    """
    levels = np.unique(model.margins[asked.toxic])[::-1]
    between = (np.mean(pair) for pair in itertools.pairwise(levels))
    thresholds = [np.inf, *between, levels[-1] - BEYOND]
    return model.margins[:, None] > np.array(thresholds)[None]


def under(
    model: Model, asked: Prompts, weights: Float[np.ndarray, "prompts"], bias: float
) -> tuple[float, float]:
    """The shares of toxic prompts refused and of seemingly toxic ones answered under a bias."""
    column = np.where(model.margins + bias > 0, 0, 1)
    rows = np.arange(len(column))
    refused, answered = model.refused[rows, column], model.answered[rows, column]
    toxic = asked.toxic
    return float(weights[toxic] @ refused[toxic]), float(weights[~toxic] @ answered[~toxic])


def shares(model: Model, asked: Prompts, bias: float) -> dict[str, dict[str, float]]:
    """The share of each outcome by set, under a bias."""
    column = np.where(model.margins + bias > 0, 0, 1)
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(asked.sets):
        own = [i for i, other in enumerate(asked.sets) if other == name]
        outcomes = [model.outcomes[i][column[i]] for i in own]
        found[name] = {each: outcomes.count(each) / len(own) for each in sorted(set(outcomes))}
    return found


def auroc(model: Model, asked: Prompts) -> float:
    """How the refusal mass ranks toxic above seemingly toxic prompts, over all sets pooled."""
    return statistics.auroc(list(model.masses[asked.toxic]), list(model.masses[~asked.toxic]))


@dataclass(frozen=True)
class Comparison:
    """The difference of two arms in what they answer at equal safety.

    `over_seeds` is Student's interval over seeds, `over_prompts` a bootstrap of the mean over seeds
    that draws templates within sets. `p` is of the two-sided t test over seeds; it is 1 where a
    difference is not known, and where all are zero.
    """

    arms: str
    by_seed: list[float]
    over_seeds: Interval
    over_prompts: Interval
    p: float


def compared(name: str, one: Sequence[np.ndarray], other: Sequence[np.ndarray]) -> Comparison:
    """Compares two arms by `answered_at` of their models, seed by seed."""
    first, second = np.stack(one), np.stack(other)  # [seeds, draws]
    values = [float(value) for value in (first - second)[:, 0]]
    mean = (first - second).mean(0)
    over_seeds = inference.paired_over_seeds(list(first[:, 0]), list(second[:, 0]))
    known = len(values) > 1 and np.isfinite(values).all() and any(values)
    p = float(scipy.stats.ttest_1samp(values, 0.0).pvalue) if known else 1.0
    return Comparison(name, values, over_seeds, statistics.of_draws(mean), p)
