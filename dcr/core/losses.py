"""The two losses of stage one: Circle loss over prompt features and next-token NLL."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Optima (O_p, O_n) of the pair weights, by name, as functions of the margin.
OPTIMA: dict[str, Callable[[float], tuple[float, float]]] = {
    "paper": lambda margin: (1 - margin, margin),
    "sun2020": lambda margin: (1 + margin, -margin),
}


def circle_loss(
    features: Float[Tensor, "batch width"],
    labels: Int[Tensor, "batch"],
    margin: float,
    scale: float,
    *,
    weights: str = "paper",
) -> Float[Tensor, ""]:
    """Circle loss on cosines, Eq. 5 and appendix A.8, in at least fp32 whatever the input.

    `weights="paper"` uses [target - s]+ as A.8 writes it; `"sun2020"` uses [1 + margin - s]+ and
    [s + margin]+, as the Circle loss paper and its reference implementations do. No gradient passes
    through these weights, as in the references; under `paper` it would be exactly twice as large.

    An anchor without positives or without negatives contributes 0 and a zero gradient. A row of
    norm zero has cosine 0 with every row and a finite gradient.
    """
    positive_optimum, negative_optimum = OPTIMA[weights](margin)
    with torch.autocast(features.device.type, enabled=False):
        cosines = _cosine_matrix(features)
        fixed = cosines.detach()
        positive_weights = torch.relu(positive_optimum - fixed)
        negative_weights = torch.relu(fixed - negative_optimum)
        return _mean_over_anchors(
            -scale * positive_weights * (cosines - (1 - margin)),
            scale * negative_weights * (cosines - margin),
            labels,
        )


def circle_floor(labels: Int[Tensor, "batch"]) -> Float[Tensor, ""]:
    """The Circle loss, with `paper` weights, of a batch in which every pair meets its margin.

    Such a pair has exponent 0, so an anchor keeps log(1 + |P| |N|), the least value that the loss
    of this batch can take. With `sun2020` weights the loss can fall below it.
    """
    exponents = torch.zeros(len(labels), len(labels), device=labels.device)
    return _mean_over_anchors(exponents, exponents, labels)


@torch.no_grad()
def pair_statistics(
    features: Float[Tensor, "batch width"], labels: Int[Tensor, "batch"], margin: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """The cosines within and across classes, and the pairs that miss the margin (Eq. 5), by name.

    Each is a sum over the pairs i < j of the batch and its number of terms, for means over several
    batches. A pair misses the margin if it is within a class and its cosine is below 1 - margin, or
    across classes and above margin.
    """
    with torch.autocast(features.device.type, enabled=False):
        cosines = _cosine_matrix(features)
    within, across = (mask.triu(1) for mask in _pair_masks(labels))
    violating = (within & (cosines < 1 - margin)) | (across & (cosines > margin))
    return {
        "within_cosine": (cosines[within].sum(), within.sum()),
        "across_cosine": (cosines[across].sum(), across.sum()),
        "violating_share": (violating.sum(), within.sum() + across.sum()),
    }


def token_nll(
    hidden: Float[Tensor, "tokens width"],
    head_weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, "tokens"],
    *,
    bias: Float[Tensor, "vocabulary"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int = 256,
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens"]]:
    """The sum of the next-token NLL in nats, differentiable, and each token's NLL, detached.

    Logits are softcap * tanh(logit_scale * (hidden @ head_weight.T + bias) / softcap), multiplied
    in the head's dtype (autocast's, if on) and normalised in at least fp32. At most `chunk` rows
    of them exist at a time; the backward pass computes them again.

    Pass labelled positions only: every target must be a valid row of the head. Checking that would
    wait for the device.
    """

    def nll(inputs: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        logits = F.linear(inputs.to(weight.dtype), weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        return F.cross_entropy(logits, target.long(), reduction="none")

    # cast once, since autocast would cast the head for every chunk
    dtype = product_dtype(head_weight)
    weight, bias = head_weight.to(dtype), None if bias is None else bias.to(dtype)
    parts = zip(hidden.split(chunk), targets.split(chunk), strict=True)
    # nothing here draws random numbers, so there is no generator state to restore
    recompute = partial(checkpoint, nll, use_reentrant=False, preserve_rng_state=False)
    with torch.autocast(hidden.device.type, enabled=False):
        per_token = torch.cat([recompute(inputs, weight, bias, target) for inputs, target in parts])
    return per_token.sum(), per_token.detach()


def product_dtype(weight: Tensor) -> torch.dtype:
    """The type in which a product with this weight is computed: autocast's, if on, or its own."""
    kind = weight.device.type
    # autocast does not cast float64
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def _cosine_matrix(features: Tensor) -> Float[Tensor, "batch batch"]:
    features = features.to(torch.promote_types(features.dtype, torch.float32))
    # Dividing by the largest entry first keeps squares from overflowing or vanishing. It changes
    # neither the direction nor its gradient, so it may be a constant.
    largest = features.detach().abs().amax(1, keepdim=True)
    features = features / largest.masked_fill(largest == 0, 1)
    norms = torch.linalg.vector_norm(features, dim=1, keepdim=True)
    directions = features / norms.masked_fill(norms == 0, 1)
    return directions @ directions.T


def _pair_masks(labels: Tensor) -> tuple[Bool[Tensor, "batch batch"], Bool[Tensor, "batch batch"]]:
    """The masks of ordered pairs that share a label, a row with itself excepted, and of others."""
    same = labels[:, None] == labels[None, :]
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & ~itself, ~same


def _mean_over_anchors(
    positive_exponents: Float[Tensor, "batch batch"],
    negative_exponents: Float[Tensor, "batch batch"],
    labels: Int[Tensor, "batch"],
) -> Float[Tensor, ""]:
    """Eq. 5: the mean of log(1 + sum exp(positive) * sum exp(negative)) over the batch."""
    positive, negative = _pair_masks(labels)
    losses = F.softplus(
        _masked_logsumexp(positive_exponents, positive)
        + _masked_logsumexp(negative_exponents, negative)
    )
    # an anchor without a positive or without a negative has no loss
    losses = losses * (positive.any(1) & negative.any(1))
    return losses.sum() / max(len(losses), 1)


def _masked_logsumexp(exponents: Tensor, mask: Tensor) -> Tensor:
    # finite, since a row of only -inf has NaN gradients; a quarter, so that the sum of two is too
    absent = torch.finfo(exponents.dtype).min / 4
    return exponents.masked_fill(~mask, absent).logsumexp(1)
