"""All measures for every layer, and the block that `metrics.json` holds of them."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcr.config import Pooling, Template
from dcr.data import SEEMINGLY_TOXIC, TOXIC
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.separability.clusters import fisher_ratio, kmeans_accuracy, silhouette, standardised
from dcr.separability.features import encoded, features
from dcr.separability.probes import probe_auroc
from dcr.separability.scaling import classical_mds
from dcr.sources import Example

DIGITS = 5  # of a plotted coordinate


@dataclass(frozen=True)
class LayerScores:
    """Of one layer, counted from 1. Probe: cross-validated AUROC with its 95% interval."""

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
    standardise: bool = False,
) -> list[LayerScores]:
    """Every measure for each layer; the labels are 0 and 1.

    `standardise` scales each dimension before k-means, silhouette and Fisher's ratio; the probe
    always does, within its folds.
    """
    scores = []
    for layer, points in enumerate(features, 1):
        shown = standardised(points) if standardise else points
        probe = probe_auroc(points, labels, groups, seed)
        scores.append(
            LayerScores(
                layer=layer,
                kmeans=kmeans_accuracy(shown, labels, seed),
                probe=probe.estimate,
                probe_low=probe.low,
                probe_high=probe.high,
                silhouette=silhouette(shown, labels),
                fisher=fisher_ratio(shown, labels),
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
    template: Template = Template.chat,
    pooling: Pooling = Pooling.last,
    standardise: bool = False,
) -> dict[str, Any]:
    """A.9 for one model as JSON holds it; what is undefined is null.

    `majority` is the share of the larger class, which k-means reaches with one cluster. `mds` has
    for each layer the plane coordinates of the prompts in the order of `ids` and `labels` (1:
    unsafe). Raises DataError for a prompt longer than the model's context.
    """
    text = policy.model.config.get_text_config()
    context = getattr(text, "max_position_embeddings", None) or 2**30
    rows = [
        row
        for label, part in ((SEEMINGLY_TOXIC, safe), (TOXIC, unsafe))
        for row in encoded(chat, part, label, context, template, pooling)
    ]
    labels = torch.tensor([row.label for row in rows], dtype=torch.long)
    points = features(policy, rows)
    scores = layerwise(points, labels, group_names([*safe, *unsafe]), seed, standardise)
    return {
        "layers": [{key: _finite(value) for key, value in asdict(s).items()} for s in scores],
        "majority": max(len(safe), len(unsafe)) / len(rows) if rows else None,
        "mds": {str(layer): _drawn(part) for layer, part in enumerate(points, 1)},
        "ids": [row.id for row in rows],
        "labels": labels.tolist(),
        "pooling": pooling.value,
        "template": template.value,
        "standardise": standardise,
    }


def _drawn(points: Float[Tensor, "prompts width"]) -> list[list[float]] | None:
    if not points.isfinite().all():
        return None
    return [[float(f"{x:.{DIGITS}g}") for x in row] for row in classical_mds(points).tolist()]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
