"""Probe-gated refusal: a linear probe on the prompt decides how the answer opens.

This is the bar that training must beat; it is not from the paper. A logistic regression on the
stream at the prompt's last token tells toxic from seemingly toxic prompts. Its log-odds move the
last block's output there, along the direction that changes the log-odds of refusals' first tokens.
Nothing else is edited, no later token either.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from dcr.activations import Site, head_logits
from dcr.analyses import separability
from dcr.core.config import ConfigError
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.core.refusal import opening as refusal
from dcr.steering import ProbeConfig, SteeringConfig, vectors
from dcr.steering.edits import Edit, Edits, Plan
from dcr.steering.prompts import Extraction
from dcr.steering.scans import asked_in, rows, starts
from dcr.steering.vectors import Vectors

RELATIVE_DEPTH = 0.6  # probes transfer best there (docs/analyses.md)
STEP = 1e-2  # share of the stream's length, for the slope of the log-odds


def block_of(depth: int, settings: ProbeConfig) -> int:
    """The block that the probe reads. Raises ConfigError if the model has no such block."""
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
    """Tensors `probe` and `direction`, both [width]: a prompt's log-odds are x·probe + `bias`.

    `direction`, added to the last block's output, raises the log-odds of refusals' first tokens by
    about 1.
    """
    model = policy.model
    depth = len(structure.decoder_blocks(model))
    block = block_of(depth, settings.probe)
    asked = vectors.encoded(chat, [*extraction.seemingly_toxic, *extraction.toxic])
    states = vectors.read_states(model, asked, [[-1]] * len(asked))[:, :, 0]
    labels = torch.tensor(
        [0] * len(extraction.seemingly_toxic) + [1] * len(extraction.toxic), dtype=torch.long
    )
    weights, bias = separability.probe_weights(states[block - 1].cpu(), labels)
    direction = _towards_refusal(model, chat, states[depth - 1])
    return {"probe": weights, "direction": direction}, {"block": block, "bias": bias}


def _towards_refusal(
    model: object, chat: ChatFormat, last: Float[Tensor, "prompts width"]
) -> Float[Tensor, " width"]:
    """The direction whose sum raises the mean log-odds of refusals' first tokens by 1."""
    openings, norm = refusal.refusal_openings(chat), structure.final_norm(model)
    head = structure.head(model).weight.detach().float()
    direction = head[openings.to(head.device)].mean(0) - head.mean(0)
    if norm is not None and (gain := getattr(norm[1], "weight", None)) is not None:
        direction = direction * gain.detach().float()
    step = STEP * last.norm(dim=1).mean() / direction.norm() * direction

    def log_odds(states: Tensor) -> Tensor:
        with torch.no_grad():
            normed = states.to(head.device, structure.head(model).weight.dtype)
            normed = normed if norm is None else norm[1](normed)
            return refusal.refusal_log_odds(head_logits(model, normed), openings).double()

    slope = (log_odds(last + step) - log_odds(last - step)).mean() / 2
    if not slope > 0:
        raise ConfigError("steering.method=probe: no direction raises this model's refusals")
    return step / slope.float()


def edits(policy: Policy, chat: ChatFormat, made: Vectors, settings: SteeringConfig) -> Plan:
    """Moves the last block's output at the last prompt token by strength × the probe's log-odds.

    Each batch of prompts takes one further pass up to the probe's block. Texts without a mask, as
    the lm-evaluation-harness scores them, have no first answer token and stay unedited.
    """
    tensors, info = made
    lead, model, depth = chat.lead(), policy.model, len(structure.decoder_blocks(policy.model))
    probe = tensors["probe"].to(policy.model.device)

    def plan(ids: Tensor, mask: Tensor | None) -> Edits:
        if mask is None:
            return []
        prompts, block = rows(ids, mask), info["block"]
        if prompts != asked_in(prompts, lead):  # how these answers open is decided
            return []
        last = [[-1]] * len(prompts)
        states = vectors.read_states(model, prompts, last, until=block, size=len(prompts))
        scale = settings.strength * (states[block - 1, :, 0] @ probe + info["bias"])
        start = starts(ids, mask)
        add = tensors["direction"]
        return [Edit(Site.block_output, depth, add, scale=scale, start=start, once=True)]

    return plan
