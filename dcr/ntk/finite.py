"""The paper's scheme (A.6): directional finite differences along the gradient of one logit."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dcr.config import ConfigError
from dcr.ntk.capture import Batch, last_logits, log_probabilities
from dcr.ntk.exact import Found


def finite_differences(
    model: Any,
    parameters: Sequence[nn.Parameter],
    rows: Sequence[Batch],
    top_k: int,
    tokens: Int[Tensor, "prompts rank"] | None,
    step: float,
) -> Found:
    """As `exact`, one column (z(x';θ+εw) - z(x';θ-εw)) / 2ε after another, w = ∇z_u(x).

    N·k backward passes and 2N²k forward passes, the latter batched. Parameters are moved in place
    and restored bitwise, also after an exception. w is not normalised, so the true step is
    ε‖w‖: too large is biased, too small is rounding noise; repeat with another ε to tell. Raises
    ConfigError below fp32.
    """
    if any(p.dtype.itemsize < 4 for p in parameters):
        raise ConfigError(
            f"method=finite_difference: the model is in {parameters[0].dtype}; a step of {step} "
            "needs fp32 at least, or take method=exact"
        )
    with torch.no_grad():
        logits = [last_logits(model, batch) for batch in rows]
        firsts = [each.topk(top_k, 1).indices for each in logits]
        chosen = torch.cat(firsts) if tokens is None else tokens
        log_p = log_probabilities(torch.cat(logits), chosen)
    columns = []
    saved = [p.detach().clone() for p in parameters]
    try:
        for batch in rows:
            for place in range(len(batch.ids)):
                alone = Batch(0, batch.ids[place, None], batch.mask[place, None])
                for token in chosen[batch.start + place].tolist():
                    along = _gradient(model, parameters, alone, token)
                    ahead = _moved(model, parameters, saved, along, step, rows, chosen)
                    behind = _moved(model, parameters, saved, along, -step, rows, chosen)
                    _restore(parameters, saved)
                    columns.append((ahead - behind) / (2 * step))
    finally:
        _restore(parameters, saved)
    return torch.stack(columns, 2).view(*chosen.shape, *chosen.shape), chosen, log_p


def _gradient(
    model: Any, parameters: Sequence[nn.Parameter], batch: Batch, token: int
) -> list[Tensor]:
    asked = [p.requires_grad for p in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        logit = last_logits(model, batch)[0, token]
        return list(torch.autograd.grad(logit, parameters, materialize_grads=True))
    finally:
        for parameter, asks in zip(parameters, asked, strict=True):
            parameter.requires_grad_(asks)


@torch.no_grad()
def _moved(
    model: Any,
    parameters: Sequence[nn.Parameter],
    saved: Sequence[Tensor],
    along: Sequence[Tensor],
    step: float,
    rows: Sequence[Batch],
    tokens: Int[Tensor, "prompts rank"],
) -> Float[Tensor, "prompts rank"]:
    for parameter, value, direction in zip(parameters, saved, along, strict=True):
        parameter.copy_(value).add_(direction, alpha=step)
    return torch.cat([last_logits(model, batch) for batch in rows]).gather(1, tokens)


@torch.no_grad()
def _restore(parameters: Sequence[nn.Parameter], saved: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(value)
