"""All measures for every layer, from one forward pass a batch, and the block of `metrics.json`."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcr import activations, batching, models
from dcr.config import DataError, Pooling, Template
from dcr.data import SEEMINGLY_TOXIC, TOXIC
from dcr.models import Policy
from dcr.prompts import ChatFormat, PromptRow, attention_mask, padded
from dcr.separability.measures import (
    classical_mds,
    fisher_ratio,
    kmeans_accuracy,
    probe_auroc,
    silhouette,
    standardised,
)
from dcr.sources import Example

BATCH_TOKENS = 2048  # padded tokens of one pass; with pooling=mean every layer is held for them


def encoded(
    chat: ChatFormat,
    examples: Sequence[Example],
    label: int,
    context: int,
    template: Template = Template.chat,
    pooling: Pooling = Pooling.last,
) -> list[PromptRow]:
    """The prompts as stage one reads them.

    Raises DataError for one of more than `context` tokens.
    """
    rows = []
    for example in examples:
        row = chat.feature_row(example.id, example.prompt, label, template, pooling, False)
        if len(row.ids) > context:
            raise DataError(
                f"{example.source}: {example.id}: its {len(row.ids)} tokens exceed the model's "
                f"context of {context}; shorten or remove it"
            )
        rows.append(row)
    return rows


def features(
    policy: Policy, rows: Sequence[PromptRow], batch_tokens: int = BATCH_TOKENS
) -> Float[Tensor, "layers prompts width"]:
    """The output of every block, 1 to L, averaged over each row's `features` span; fp32, on CPU.

    Prompts of similar length share a pass and are padded on the left; the result has their order.
    The model runs as it stands: in training mode dropout acts.
    """
    depth = len(models.decoder_blocks(policy.model))
    width = models.unwrapped(policy.model).config.get_text_config().hidden_size
    found = torch.empty(depth, len(rows), width)
    for places in batching.by_tokens([row.ids for row in rows], batch_tokens):
        found[:, places] = _pooled(policy.model, [rows[place] for place in places]).cpu()
    return found


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
    context = batching.context_length(policy.model.config)
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
