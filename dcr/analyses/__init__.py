"""The paper's analyses of a model's weights: refusal probability, kernel, separability, claims.

Here are the settings of those that training does not follow; `schema` has the others'.
"""

from dataclasses import dataclass, field

from dcr.core.config import Pooling
from dcr.core.config.checks import positive, ranged

OF_EACH_KIND = "give prompts of each kind, 1 or more"


@dataclass
class SeparabilityConfig:
    """How well two classes come apart, block by block (A.9)."""

    pooling: Pooling = Pooling.last
    # Of each kind; null: all.
    prompts: int | None = ranged(None, positive, OF_EACH_KIND)


@dataclass
class ClaimsConfig:
    """The paper's Eq. 2 and 3 and Proposition 1, tried on one model.

    Tokens and memory are those of the kernel, `entk.top_k` and `entk.budget_gib`.
    """

    layer: int | None = None  # the block ℓ of the states; null: the run's, or the model's own
    # Toxic prompts with a refusal, one SGD step on each.
    pairs: int = ranged(6, positive, "give pairs to take a step on, 1 or more")
    prompts: int = ranged(10, positive, OF_EACH_KIND)  # observers of each kind
    # tail:N, trunk:ℓ or all; the bare word trunk is trunk:ℓ of the layer
    params: list[str] = field(default_factory=lambda: ["tail:2", "trunk"])
    # Nats, or of a loss below one nat the share of it, that one step takes off its own pair's loss
    # to first order.
    drop: float = ranged(0.02, positive, "give nats above 0")
