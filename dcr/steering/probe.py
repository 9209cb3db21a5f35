"""Probe-gated refusal: what a linear probe says of the prompt decides how the answer opens.

The bar that training must beat: a logistic regression on the stream at the prompt's last token
tells toxic from seemingly toxic prompts, and the last block's output is moved there by as much as
the log-odds of refusals' first tokens shall change. Nothing else is edited, no later token either.
Not of the paper.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dcr.analyses import separability
from dcr.core import models, refusal
from dcr.core.activations import Site
from dcr.core.config import ConfigError
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.steering import ProbeConfig, SteeringConfig, vectors
from dcr.steering.edits import Edit, Edits, Plan
from dcr.steering.prompts import Extraction
from dcr.steering.scans import rows, starts
from dcr.steering.vectors import Vectors

RELATIVE_DEPTH = 0.6  # where probes transfer best (docs/analyses.md)
STEP = 1e-2  # of the direction's length by the stream's, for the slope of the log-odds


def block_of(depth: int, settings: ProbeConfig) -> int:
    """The block that is read. ConfigError where the model has none of that number."""
    if settings.layer is None:
        return max(1, round(depth * RELATIVE_DEPTH))
    if not 1 <= settings.layer <= depth:
        raise ConfigError(
            f"steering.probe.layer={settings.layer}: the model has blocks 1 to {depth}"
        )
    return settings.layer


def find(
    policy: Policy, chat: ChatFormat, extraction: Extraction, settings: SteeringConfig
) -> Vectors:
    """Tensors `probe` and `direction` [width]: the log-odds of a prompt are x·probe + `bias`, and a
    direction added to the last block's output raises those of refusals' first tokens by about 1.
    """
    model = policy.model
    depth = len(models.decoder_blocks(model))
    block = block_of(depth, settings.probe)
    asked = vectors.encoded(chat, [*extraction.seemingly_toxic, *extraction.toxic])
    read = vectors.read(model, asked, [[-1]] * len(asked))[:, :, 0]
    labels = torch.tensor(
        [0] * len(extraction.seemingly_toxic) + [1] * len(extraction.toxic), dtype=torch.long
    )
    weights, bias = separability.probe_weights(read[block - 1].cpu(), labels)
    direction = _towards_refusal(model, chat, read[depth - 1])
    return {"probe": weights, "direction": direction}, {"block": block, "bias": bias}


def _towards_refusal(
    model: object, chat: ChatFormat, last: Float[Tensor, "prompts width"]
) -> Float[Tensor, " width"]:
    """Of the length that raises the log-odds of refusals' first tokens by 1, over the prompts."""
    openings, norm = refusal.refusal_openings(chat), models.final_norm(model)
    head = models.head(model).weight.detach().float()
    direction = head[openings.to(head.device)].mean(0) - head.mean(0)
    if norm is not None and (gain := getattr(norm[1], "weight", None)) is not None:
        direction = direction * gain.detach().float()
    step = STEP * last.norm(dim=1).mean() / direction.norm() * direction

    def log_odds(states: Tensor) -> Tensor:
        with torch.no_grad():
            normed = states.to(head.device, models.head(model).weight.dtype)
            normed = normed if norm is None else norm[1](normed)
            return refusal.refusal_log_odds(models.logits(model, normed), openings).double()

    slope = (log_odds(last + step) - log_odds(last - step)).mean() / 2
    if not slope > 0:
        raise ConfigError("steering.method=probe: no direction raises this model's refusals")
    return step / slope.float()


def edits(policy: Policy, chat: ChatFormat, made: Vectors, settings: SteeringConfig) -> Plan:
    """At the last prompt token the last block's output moves by strength × the probe's log-odds.

    One further pass up to the probe's block for each batch of prompts. Texts without a mask, as
    the lm-evaluation-harness scores them, have no first answer token and stay unedited.
    """
    del chat
    tensors, info = made
    model, depth = policy.model, len(models.decoder_blocks(policy.model))
    probe = tensors["probe"].to(policy.model.device)

    def plan(ids: Tensor, mask: Tensor | None) -> Edits:
        if mask is None:
            return []
        prompts, block = rows(ids, mask), info["block"]
        read = vectors.read(model, prompts, [[-1]] * len(prompts), until=block, size=len(prompts))
        scale = settings.strength * (read[block - 1, :, 0] @ probe + info["bias"])
        where = starts(ids, mask)
        return [
            Edit(
                Site.block_output, depth, tensors["direction"], scale=scale, start=where, once=True
            )
        ]

    return plan
