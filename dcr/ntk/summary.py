"""What is read off a kernel: normalised matrices, means over kinds, predicted changes."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from dcr.statistics import Interval


def _observer(norms: Tensor) -> Tensor:
    return norms / norms.diagonal()[:, None]


def _symmetric(norms: Tensor) -> Tensor:
    own = norms.diagonal()
    return norms / (own[:, None] * own).sqrt()


def _none(norms: Tensor) -> Tensor:
    return norms


NORMALISERS = {"observer": _observer, "symmetric": _symmetric, "none": _none}


def normalised(
    norms: Float[Tensor, "observer trained"], how: str = "observer"
) -> Float[Tensor, "observer trained"]:
    """Norms divided by those of K(x',x').

    `observer` is the paper's ‖K(x',x)‖ / ‖K(x',x')‖, not bounded by 1, and all its asymmetry comes
    from the divisor; `symmetric` is ‖K(x',x)‖ / √(‖K(x',x')‖‖K(x,x)‖), in [0, 1]; `none` leaves
    them. Raises ValueError for another name.
    """
    if how not in NORMALISERS:
        raise ValueError(f"how={how!r}: choose one of {', '.join(NORMALISERS)}")
    return NORMALISERS[how](norms)


def mean_by_kind(
    matrix: Float[Tensor, "observer trained"],
    kinds: Sequence[str],
    self_pairs: bool = False,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Mapping[str, Mapping[str, Interval]]:
    """Mean over pairs of prompts by kind, `[observer kind][trained kind]`, as in Figure 6.

    With percentile bootstrap intervals over prompts: those of each kind are drawn anew, and a
    prompt drawn twice brings its whole row and column twice. A prompt's pair with itself counts
    only with `self_pairs`, also where it is drawn twice. The mean is linear, so that of a
    difference of two kernels over the same prompts is a paired comparison. Kinds stand in the
    order in which they appear; nan within unbounded ends where a kind has no pair.

    Raises ValueError where `kinds` is not one per prompt.
    """
    if len(kinds) != len(matrix):
        raise ValueError(f"{len(kinds)} kinds for {len(matrix)} prompts: give one each")
    values = matrix.double().numpy()
    generator = np.random.default_rng(seed)
    order = list(dict.fromkeys(kinds))
    places = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in order}
    # one draw for all cells: the same prompts observe and are trained on
    drawn = {
        kind: generator.multinomial(len(own), [1 / len(own)] * len(own), size=resamples)
        for kind, own in places.items()
    }
    means: dict[str, dict[str, Interval]] = {kind: {} for kind in order}
    for seen in order:
        for trained in order:
            cell = values[np.ix_(places[seen], places[trained])]
            allowed = np.ones_like(cell)
            if seen == trained and not self_pairs:
                np.fill_diagonal(allowed, 0)
            means[seen][trained] = _mean(cell, allowed, drawn[seen], drawn[trained], confidence)
    return means


def log_probability_change(
    blocks: Float[Tensor, "observer rank rank"],
    log_probabilities: Float[Tensor, "observer rank"],
    residual: Float[Tensor, "rank"],
    rate: float,
) -> Float[Tensor, "observer rank"]:
    """Eq. 2 and 3: what one SGD step does to log-probabilities, -ηAKG to first order.

    `blocks` are K(x',x) of one trained prompt x, `Kernel.blocks[:, :, j]`; `residual` is G, the
    loss's gradient by the logits of x at its tokens, for a cross-entropy probability minus one-hot
    target. A is the softmax's Jacobian at x', I - 1πᵀ. Exact to first order only where the tokens
    are the whole vocabulary: others' part in G and in Aπ is left out.
    """
    logits = -rate * blocks @ residual
    mean = (log_probabilities.exp() * logits).sum(1, keepdim=True)
    return logits - mean


def _mean(
    cell: np.ndarray,
    allowed: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    confidence: float,
) -> Interval:
    if not allowed.any():
        return Interval(math.nan, -math.inf, math.inf)
    kept = np.where(allowed, cell, 0.0)
    totals = np.einsum("ri,ij,rj->r", rows, kept, columns, optimize=True)
    counts = np.einsum("ri,ij,rj->r", rows, allowed, columns, optimize=True)
    # a draw of one prompt alone has no pair of two
    drawn = totals[counts > 0] / counts[counts > 0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail]) if len(drawn) else (-math.inf, math.inf)
    return Interval(float(kept.sum() / allowed.sum()), float(low), float(high))
