"""How well two classes of prompts come apart in feature space (A.9)."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor


def kmeans_accuracy(
    features: Float[Tensor, "prompts width"], labels: Int[Tensor, "prompts"], seed: int = 0
) -> float:
    """Share of prompts in the cluster matched to their class, k-means with k=2 on raw features.

    With two classes the Hungarian matching is the better of the two assignments, so the value is
    at least 0.5; NaN without prompts.
    """
    if len(labels) < 2:
        return float("nan")
    points = torch.nan_to_num(features.double()).numpy()
    if not (points != points[0]).any():
        clusters = np.zeros(len(points), dtype=int)  # all alike: one cluster
    else:
        starts: Any = 10  # its type says str
        clusters = KMeans(n_clusters=2, n_init=starts, random_state=seed).fit_predict(points)
    agreement = float((torch.from_numpy(clusters) == labels).double().mean())
    return max(agreement, 1 - agreement)
