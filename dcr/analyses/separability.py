"""The separability of two classes of prompts, layer by layer (A.9).

The measures of clusters take points of one layer and labels 0 and 1, and give NaN if they are
undefined: too few prompts, one class alone, or a feature that is not finite. Probes are scored on
groups that they have not seen. `layerwise` applies them to every block, read in one pass.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from dcr import activations
from dcr.clusters import kmeans_accuracy
from dcr.core import machine, statistics
from dcr.core.config.training import Pooling
from dcr.core.data.rows import SEEMINGLY_TOXIC, TOXIC, PromptRow, prompt_rows
from dcr.core.machine import attention_mask, padded
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example
from dcr.core.statistics import Interval
from dcr.inference import finite

BATCH_TOKENS = 2048  # padded tokens of one pass; with pooling=mean every layer is held for them
INVERSE_PENALTY = 0.1  # C of the L2 penalty on standardised features: there are more than prompts
FOLDS = 5
RESAMPLES = 1000
UNDEFINED = Interval(math.nan, 0.0, 1.0)
DIGITS = 5  # of a plotted coordinate

Scores = Float[np.ndarray, " prompts"]


# --- the measures ---------------------------------------------------------------------------------


def silhouette(features: Float[Tensor, "prompts width"], labels: Int[Tensor, "prompts"]) -> float:
    """Mean silhouette of the classes themselves, Euclidean, in [-1, 1] (Rousseeuw 1987).

    A prompt alone in its class counts 0.
    """
    if len(labels) < 3 or len(labels.unique()) < 2 or not features.isfinite().all():
        return math.nan
    return float(silhouette_score(features.double().numpy(), labels.numpy()))


def fisher_ratio(features: Float[Tensor, "prompts width"], labels: Int[Tensor, "prompts"]) -> float:
    """(m₁ − m₀)² / (s₀² + s₁²) of the prompts projected on the difference of the class means.

    Fisher's criterion (1936; Bishop 2006, Eq. 4.25) with sample variances (n − 1), on that
    direction rather than the one that maximises it, which more dimensions than prompts would make
    infinite. The direction is fitted to the same prompts, so that without any difference the value
    is still about (1/n₀ + 1/n₁)·d/2 in d equally spread dimensions: compare layers of one model on
    one set. The value is infinite if neither class spreads along the direction.
    """
    first, second = (features.double()[labels == label] for label in (0, 1))
    if min(len(first), len(second)) < 2 or not features.isfinite().all():
        return math.nan
    direction = second.mean(0) - first.mean(0)
    if not direction.any():
        return 0.0
    direction = direction / direction.norm()
    one, other = first @ direction, second @ direction
    between = (other.mean() - one.mean()) ** 2
    return float(between / (one.var() + other.var()))


def probe_weights(
    features: Float[Tensor, "prompts width"], labels: Int[Tensor, "prompts"]
) -> tuple[Float[Tensor, " width"], float]:
    """The weights and the bias of `linear_probe` on features that are not standardised."""
    fitted: Any = _fitted(features, labels)
    scaler, regression = fitted
    weights = regression.coef_[0] / scaler.scale_
    bias = float(regression.intercept_[0] - scaler.mean_ @ weights)
    return torch.from_numpy(weights).float(), bias


def linear_probe(
    features: Float[Tensor, "prompts width"], labels: Int[Tensor, "prompts"]
) -> Callable[[Float[Tensor, "others width"]], Scores]:
    """Logistic regression on features standardised by these prompts; the result gives log-odds.

    Both classes weigh the same whatever their counts, so that scores of probes fitted to different
    folds share their zero. Raises ValueError if a class is absent or a feature is not finite.
    """
    fitted = _fitted(features, labels)
    return lambda others: fitted.decision_function(others.double().numpy())


def _fitted(features: Float[Tensor, "prompts width"], labels: Int[Tensor, "prompts"]) -> Pipeline:
    regression = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000)
    return make_pipeline(StandardScaler(), regression).fit(
        features.double().numpy(), labels.numpy()
    )


def folds(
    labels: Int[Tensor, "prompts"], groups: Sequence[str], seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """The (train, test) places of up to five folds, none of which has a group on both sides.

    A class with fewer groups leaves fewer folds; there are none if not even two folds leave both
    classes to train on.
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
    """The cross-validated AUROC of `linear_probe`, with a bootstrap interval over its scores.

    The probe that scores a prompt never saw its group. The interval holds the probes fixed and
    takes prompts as independent. Too few groups, or a feature that is not finite, give NaN within
    [0, 1].
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
    """The AUROC, on prompts of another origin, of a probe fitted to all of the first ones.

    A value below 0.5 says that the direction means the opposite there. The bootstrap interval is
    over the test prompts, with the probe held fixed. A side without one of the classes, or a
    feature that is not finite, gives NaN within [0, 1].
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


def classical_mds(
    points: Float[Tensor, "prompts width"], dimensions: int = 2
) -> Float[Tensor, "prompts {dimensions}"]:
    """Coordinates whose distances come nearest to the points' own (Torgerson 1952), in float64.

    The leading eigenvectors of the double-centred squared Euclidean distances, −½·J·D²·J, times the
    roots of their eigenvalues. For points this matrix is exactly the Gram matrix of the centred
    ones, which is formed directly: squaring and centring distances would lose half the digits. An
    eigenvector's sign is free: the coordinate largest in magnitude is made positive. Dimensions
    beyond the rank are 0.
    """
    coordinates = torch.zeros(len(points), dimensions, dtype=torch.float64)
    if not len(points):
        return coordinates
    centred = points.double() - points.double().mean(0)
    values, vectors = torch.linalg.eigh(centred @ centred.T)  # ascending
    leading = min(dimensions, len(points))
    values, vectors = values.flip(0)[:leading], vectors.flip(1)[:, :leading]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    coordinates[:, :leading] = vectors * largest.sign() * values.clamp(min=0).sqrt()
    return coordinates


# --- every layer ----------------------------------------------------------------------------------


def features(
    policy: Policy, rows: Sequence[PromptRow], batch_tokens: int = BATCH_TOKENS
) -> Float[Tensor, "layers prompts width"]:
    """The output of every block, 1 to L, averaged over each row's `features` span; fp32, on CPU.

    Prompts of similar length share a pass and are padded on the left; the result has their order.
    The model runs as it stands: in training mode dropout acts.
    """
    depth = len(structure.decoder_blocks(policy.model))
    width = structure.unwrapped(policy.model).config.get_text_config().hidden_size
    points = torch.empty(depth, len(rows), width)
    for places in machine.by_tokens([row.ids for row in rows], batch_tokens):
        points[:, places] = _pooled(policy.model, [rows[place] for place in places]).cpu()
    return points


def _pooled(model: Any, rows: Sequence[PromptRow]) -> Float[Tensor, "layers batch width"]:
    sequences = [row.ids for row in rows]
    ids, mask = padded(sequences, 0, left=True), attention_mask(sequences, left=True)
    spans = torch.tensor([row.features for row in rows])
    starts = (~mask).sum(1) + spans[:, 0]
    counts = (spans[:, 1] - spans[:, 0])[:, None]
    steps = torch.arange(int(counts.max()))
    places = starts[:, None] + steps.minimum(counts - 1)  # a short span repeats its last position
    inside = (steps < counts).to(model.device)
    ids, mask, places = (tensor.to(model.device) for tensor in (ids, mask, places))
    states = activations.states(model, ids, mask, places)
    return torch.where(inside[..., None], states, 0).sum(2) / inside.sum(1, keepdim=True)


@dataclass(frozen=True)
class LayerScores:
    """The measures of one layer, counted from 1; `probe` is an AUROC with its 95% interval."""

    layer: int
    kmeans: float
    probe: float
    probe_low: float
    probe_high: float
    silhouette: float
    fisher: float


def group_names(examples: Sequence[Example]) -> list[str]:
    """The template group of each prompt; one without a group is its own."""
    return [e.group if e.group is not None else f"{e.source}:{e.id}" for e in examples]


def layerwise(
    features: Float[Tensor, "layers prompts width"],
    labels: Int[Tensor, "prompts"],
    groups: Sequence[str],
    seed: int,
) -> list[LayerScores]:
    """Every measure for each layer; the labels are 0 and 1."""
    scores = []
    for layer, points in enumerate(features, 1):
        probe = probe_auroc(points, labels, groups, seed)
        scores.append(
            LayerScores(
                layer=layer,
                kmeans=kmeans_accuracy(points, labels, seed),
                probe=probe.estimate,
                probe_low=probe.low,
                probe_high=probe.high,
                silhouette=silhouette(points, labels),
                fisher=fisher_ratio(points, labels),
            )
        )
    return scores


def analyse(
    policy: Policy,
    chat: ChatFormat,
    safe: Sequence[Example],
    unsafe: Sequence[Example],
    seed: int,
    *,
    pooling: Pooling = Pooling.last,
) -> dict[str, Any]:
    """The measures of A.9 on one model, as JSON; an undefined value is null.

    `majority` is the share of the larger class, which k-means reaches with one cluster. `mds` has
    each layer's plane coordinates of the prompts in the order of `ids` and `labels` (1: unsafe).
    Raises DataError for a prompt longer than the model's context.
    """
    context = structure.context_length(policy.model.config)
    rows = [
        row
        for label, part in ((SEEMINGLY_TOXIC, safe), (TOXIC, unsafe))
        for row in prompt_rows(chat, part, label, context, pooling)
    ]
    labels = torch.tensor([row.label for row in rows], dtype=torch.long)
    points = features(policy, rows)
    scores = layerwise(points, labels, group_names([*safe, *unsafe]), seed)
    return {
        "layers": [{key: finite(value) for key, value in asdict(s).items()} for s in scores],
        "majority": max(len(safe), len(unsafe)) / len(rows) if rows else None,
        "mds": {str(layer): _plane(part) for layer, part in enumerate(points, 1)},
        "ids": [row.id for row in rows],
        "labels": labels.tolist(),
        "pooling": pooling.value,
    }


def _plane(points: Float[Tensor, "prompts width"]) -> list[list[float]] | None:
    if not points.isfinite().all():
        return None
    return [[float(f"{x:.{DIGITS}g}") for x in row] for row in classical_mds(points).tolist()]
