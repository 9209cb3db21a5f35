"""Linear probes: does a direction tell the classes apart on prompts it was not fitted to?"""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from dcr import statistics
from dcr.statistics import Interval

INVERSE_PENALTY = 0.1  # C of the L2 penalty on standardised features: there are more than prompts
FOLDS = 5
RESAMPLES = 1000
UNDEFINED = Interval(math.nan, 0.0, 1.0)

Scores = Float[np.ndarray, " prompts"]


def linear_probe(
    features: Float[Tensor, "prompts width"], labels: Int[Tensor, "prompts"]
) -> Callable[[Float[Tensor, "others width"]], Scores]:
    """Logistic regression on features standardised by these prompts; the result gives log-odds.

    Both classes weigh the same whatever their counts, so that scores of probes fitted to different
    folds share their zero. Raises ValueError if a class is absent or a feature is not finite.
    """
    regression = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000)
    fitted = make_pipeline(StandardScaler(), regression).fit(
        features.double().numpy(), labels.numpy()
    )
    return lambda others: fitted.decision_function(others.double().numpy())


def folds(
    labels: Int[Tensor, "prompts"], groups: Sequence[str], seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) places of up to five folds: a group is never on both sides of one.

    Fewer where a class has fewer groups; none where not even two folds leave both classes to train
    on.
    """
    y, names = labels.numpy(), np.asarray(groups, dtype=object).astype(str)
    count = min([FOLDS, *(len(set(names[y == label])) for label in (0, 1))])
    if count < 2:
        return []
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    parts = list(splitter.split(np.zeros((len(y), 1)), y, names))
    return parts if all(len(set(y[train])) == 2 and len(test) for train, test in parts) else []


def probe_auroc(
    features: Float[Tensor, "prompts width"],
    labels: Int[Tensor, "prompts"],
    groups: Sequence[str],
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval:
    """Cross-validated AUROC of `linear_probe`, each prompt scored by the probe that never saw its
    group, with a bootstrap interval over these scores.

    The interval holds the probes fixed and takes prompts as independent. NaN within [0, 1] where
    there are too few groups or a feature is not finite.
    """
    parts = folds(labels, groups, seed)
    if not parts or not features.isfinite().all():
        return UNDEFINED
    scores = np.empty(len(labels))
    for train, test in parts:
        scores[test] = linear_probe(features[train], labels[train])(features[test])
    return _interval(scores, labels, seed, resamples)


def transfer_auroc(
    train_features: Float[Tensor, "prompts width"],
    train_labels: Int[Tensor, "prompts"],
    test_features: Float[Tensor, "others width"],
    test_labels: Int[Tensor, "others"],
    *,
    seed: int,
    resamples: int = RESAMPLES,
) -> Interval:
    """AUROC on prompts of another origin of a probe fitted to all of the first ones.

    Below 0.5 the direction means the opposite there. The bootstrap interval is over the test
    prompts, the probe held fixed. NaN within [0, 1] where either side lacks a class or a feature is
    not finite.
    """
    whole = all(part.isfinite().all() for part in (train_features, test_features))
    if not whole or len(train_labels.unique()) < 2 or len(test_labels.unique()) < 2:
        return UNDEFINED
    scores = linear_probe(train_features, train_labels)(test_features)
    return _interval(scores, test_labels, seed, resamples)


def _interval(scores: Scores, labels: Int[Tensor, "prompts"], seed: int, count: int) -> Interval:
    toxic = labels.numpy() == 1
    sides = scores[toxic].tolist(), scores[~toxic].tolist()
    return statistics.auroc_interval(*sides, resamples=count, seed=seed)
