"""Two clusters of prompt features against their classes (A.9), also while stage one trains."""

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from lightning import Callback, LightningModule, Trainer
from torch import Tensor


def kmeans_accuracy(
    features: Float[Tensor, "prompts width"], labels: Int[Tensor, "prompts"], seed: int = 0
) -> float:
    """Share of prompts in the cluster matched to their class: k-means, k=2, best of ten starts.

    With two classes the Hungarian matching is the better of the two assignments, so the value is
    at least 0.5. NaN for fewer than two prompts.
    """
    if len(labels) < 2:
        return math.nan
    from sklearn.cluster import KMeans  # held-out rows alone need it

    points = torch.nan_to_num(features.double()).numpy()
    if not (points != points[0]).any():
        clusters = np.zeros(len(points), dtype=int)  # all alike: one cluster
    else:
        starts: Any = 10  # its type says str
        clusters = KMeans(n_clusters=2, n_init=starts, random_state=seed).fit_predict(points)
    agreement = float((torch.from_numpy(clusters) == labels).double().mean())
    return max(agreement, 1 - agreement)


class HeldoutClusters(Callback):
    """Logs the accuracy over all held-out prompts of stage one, which every rank validates on."""

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []  # features and labels of each batch

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        self.seen.append((outputs.detach().float().cpu(), batch.labels.cpu()))

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        features, labels = (torch.cat(part) for part in zip(*self.seen, strict=True))
        self.seen = []
        accuracy = kmeans_accuracy(features, labels)
        key = "contrastive/kmeans_accuracy/heldout"
        pl_module.log(key, accuracy, batch_size=1, sync_dist=True)
