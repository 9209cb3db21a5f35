"""Plain ablation of the refusal direction (Arditi et al., NeurIPS 2024), to compare with.

The difference of means of harmful and harmless prompts at their last token, taken out of the
stream at every block's input and of what attention and MLP write to it. Where the authors select
layer and position on a validation set, one layer stands here for all models.
"""

from dcr import models
from dcr.activations import Edit, Edits, Site
from dcr.config import SteeringConfig
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.steering import vectors
from dcr.steering.prompts import Extraction
from dcr.steering.vectors import Found

# Of the depth; the layers that the authors select lie between 0.3 and 0.65 of it, by model.
RELATIVE_DEPTH = 0.6
SITES = (Site.block_input, Site.attention_output, Site.mlp_output)


def find(
    policy: Policy,
    chat: ChatFormat,
    extraction: Extraction,
    _settings: SteeringConfig,
    batch_size: int,
) -> Found:
    """The tensor `vector` [width], of length 1."""
    depth = len(models.decoder_blocks(policy.model))
    block = max(1, round(RELATIVE_DEPTH * depth))
    means = []
    for rows in (extraction.harmful, extraction.harmless):
        prompts = vectors.encoded(chat, rows)
        last = [[-1]] * len(prompts)
        states = vectors.read(policy.model, prompts, last, batch_size, Site.block_input, block)
        means.append(states[-1, :, 0].mean(0))
    vector = vectors.unit(means[0] - means[1], "harmful and harmless prompts")
    return {"vector": vector}, {"block": block}


def edits(policy: Policy, _chat: ChatFormat, found: Found, settings: SteeringConfig) -> Edits:
    """At three sites of every block, x ← x − strength·(x·v)v at all positions."""
    vector = found[0]["vector"]
    return [
        Edit(site, block, ablate=vector, scale=settings.strength)
        for block in range(1, len(models.decoder_blocks(policy.model)) + 1)
        for site in SITES
    ]
