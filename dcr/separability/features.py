"""What the blocks hold of each prompt: one vector a layer, from one forward pass a batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dcr import activations, models
from dcr.config import DataError, Pooling, Template
from dcr.models import Policy
from dcr.prompts import ChatFormat, PromptRow, attention_mask, padded
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
    for places in _batches(rows, batch_tokens):
        found[:, places] = _pooled(policy.model, [rows[place] for place in places]).cpu()
    return found


def _batches(rows: Sequence[PromptRow], tokens: int) -> Iterator[list[int]]:
    """Places of rows of similar length, at most `tokens` padded tokens at once, the longest first.

    A row longer than that comes alone.
    """
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda i: -len(rows[i].ids)):
        if batch and (len(batch) + 1) * len(rows[batch[0]].ids) > tokens:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


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
