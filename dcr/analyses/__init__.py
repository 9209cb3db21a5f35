"""The paper's analyses of a model's weights: refusal probability, kernel, separability, claims.

Here are their settings, which `tracking` has as well; `weights` has the tasks of an evaluation.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from dcr.core.config import ConfigError, Quantization
from dcr.core.config.evaluation import EvalConfig
from dcr.core.config.training import Pooling
from dcr.resolving import positive, ranged

OF_EACH_KIND = "give prompts of each kind, 1 or more"
PARAMETERS = re.compile(r"(tail|trunk):([0-9]+)|all|adapter")


def relations(settings: EvalConfig) -> Iterator[str]:
    """The tasks that weights in four bits contradict."""
    held = settings.model.quantization
    for task in ("kernel", "claims"):
        if held is not Quantization.none and task in settings.tasks:
            yield (
                f"model.quantization={held.value} tasks=[{task}]: needs gradients of the weights "
                "themselves, which four bits have none of; leave it out"
            )


class Phrases(Enum):
    """Refusals whose probability is summed: the paper's 31 (A.5), or with plain and curly forms."""

    paper = "paper"
    extended = "extended"


class Normalise(Enum):
    """The divisor of a kernel's norms (A.6)."""

    observer = "observer"
    symmetric = "symmetric"
    none = "none"


class KernelMethod(Enum):
    exact = "exact"
    finite_difference = "finite_difference"


@dataclass
class RefusalProbabilityConfig:
    phrases: Phrases = Phrases.paper
    # of each kind; null: all
    prompts: int | None = ranged(300, positive, OF_EACH_KIND)


@dataclass
class KernelConfig:
    """The empirical NTK at the first answer token (A.6)."""

    # tokens of the first answer position that the kernel is taken over
    top_k: int = ranged(10, positive, "give tokens of each prompt, 1 or more")
    # tail:N, trunk:ℓ, all or adapter
    params: list[str] = field(default_factory=lambda: ["tail:2"])
    head: bool = True  # count the head's own matrix
    normalise: Normalise = Normalise.observer  # what norms are divided by
    method: KernelMethod = KernelMethod.exact  # exact, or the paper's finite differences
    prompts: int = ranged(25, positive, OF_EACH_KIND)  # of each kind
    self_pairs: bool = False  # count a prompt with itself in the mean of its kind
    # of memory for the factors of gradients that are held at once
    budget_gib: float = ranged(4.0, positive, "give GiB above 0")


@dataclass
class SeparabilityConfig:
    """The separability of two classes, block by block (A.9)."""

    pooling: Pooling = Pooling.last
    # of each kind; null: all
    prompts: int | None = ranged(None, positive, OF_EACH_KIND)


@dataclass
class ClaimsConfig:
    """The paper's Eq. 2 and 3 and Proposition 1, tried on one model.

    Tokens and memory are those of the kernel, `entk.top_k` and `entk.budget_gib`.
    """

    layer: int | None = None  # the block ℓ of the states; null: the run's, or the model's own
    # toxic prompts with a refusal, one SGD step on each
    pairs: int = ranged(6, positive, "give pairs to take a step on, 1 or more")
    prompts: int = ranged(10, positive, OF_EACH_KIND)  # observers of each kind
    # tail:N, trunk:ℓ or all; the bare word trunk is trunk:ℓ of the layer
    params: list[str] = field(default_factory=lambda: ["tail:2", "trunk"])
    # Nats that one step takes off its own pair's loss, to first order; for a loss below one nat, a
    # share of it.
    drop: float = ranged(0.02, positive, "give nats above 0")


def check_parameters(key: str, names: list[str], depth: int) -> None:
    """Raises ConfigError unless each names parameters of a model `depth` deep (A.6)."""
    if not names:
        raise ConfigError(f"{key}=[]: name parameters, such as tail:2 or trunk:{depth // 2}")
    for name in names:
        match = PARAMETERS.fullmatch(name)
        if match is None:
            raise ConfigError(f"{key}=[{name}]: choose tail:N, trunk:ℓ, all or adapter")
        if match[2] and not 1 <= int(match[2]) <= depth:
            raise ConfigError(f"{key}=[{name}]: the model has blocks 1 to {depth}")
