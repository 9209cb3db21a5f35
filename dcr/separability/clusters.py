"""Do the classes lie apart without a classifier being told how? In all dimensions, and along one.

Every function takes points of one layer and labels 0 and 1, and gives NaN where the measure is
undefined: too few prompts, one class alone, or a feature that is not finite.
"""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score
from sklearn.preprocessing import StandardScaler
from torch import Tensor


def standardised(features: Float[Tensor, "prompts width"]) -> Float[Tensor, "prompts width"]:
    """Each dimension with mean 0 and variance 1 over the prompts; a constant one becomes 0."""
    if not len(features):
        return features
    return torch.from_numpy(StandardScaler().fit_transform(features.double().numpy()))


def kmeans_accuracy(
    features: Float[Tensor, "prompts width"], labels: Int[Tensor, "prompts"], seed: int = 0
) -> float:
    """Share of prompts in the cluster matched to their class: k-means, k=2, best of ten starts.

    With two classes the Hungarian matching is the better of the two assignments, so the value is
    at least 0.5. NaN for fewer than two prompts.
    """
    if len(labels) < 2:
        return math.nan
    points = torch.nan_to_num(features.double()).numpy()
    if not (points != points[0]).any():
        clusters = np.zeros(len(points), dtype=int)  # all alike: one cluster
    else:
        starts: Any = 10  # its type says str
        clusters = KMeans(n_clusters=2, n_init=starts, random_state=seed).fit_predict(points)
    agreement = float((torch.from_numpy(clusters) == labels).double().mean())
    return max(agreement, 1 - agreement)


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
    one set. Infinite where neither class spreads along the direction.
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
