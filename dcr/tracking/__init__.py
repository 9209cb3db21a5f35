"""The paper's quantities as curves over a stage: their settings; `curves` measures them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from dcr.analyses import KernelConfig, RefusalProbabilityConfig
from dcr.core.config import Quantization
from dcr.core.config.training import FSDP, TrainConfig
from dcr.resolving import not_negative, positive, ranged


class Quantity(Enum):
    """The quantities that can be watched while a stage trains."""

    refusal_probability = "refusal_probability"
    kernel = "kernel"


@dataclass
class TrackingConfig:
    """The quantities to measure while a stage trains, and adapter snapshots to score afterwards.

    Quantities are measured at step 0, at the last step and at 20 steps between, denser early,
    unless `every_n_steps` is given.
    """

    quantities: list[Quantity] = field(default_factory=list)  # what is measured
    every_n_steps: int | None = ranged(None, positive, "give 1 or more, or null")
    snapshots: int = ranged(
        0, not_negative, "give 0 or more"
    )  # adapters kept over SFT, for the frontier
    refusal_prob: RefusalProbabilityConfig = field(
        default_factory=lambda: RefusalProbabilityConfig(prompts=25)
    )
    entk: KernelConfig = field(default_factory=lambda: KernelConfig(prompts=5))


def measures(settings: TrainConfig) -> bool:
    """Whether quantities are measured on the model while a stage trains; snapshots only save it."""
    return bool(settings.node(TrackingConfig).quantities)


def relations(settings: TrainConfig) -> Iterator[str]:
    """The settings that contradict measuring while a stage trains."""
    quantities, strategy = settings.node(TrackingConfig).quantities, settings.trainer.strategy
    if strategy == FSDP and quantities:
        yield (
            f"trainer.strategy={strategy} tracking.quantities=[{quantities[0].value}]: is measured "
            "by one process, which holds a part of the weights; take tracking.snapshots=<number> "
            "and eval.py snapshots=true, or trainer.strategy=ddp"
        )
    if settings.model.quantization is not Quantization.none and Quantity.kernel in quantities:
        yield (
            f"model.quantization={settings.model.quantization.value} tracking.quantities=[kernel]: "
            "needs gradients of the weights themselves, which four bits have none of; leave it out"
        )
