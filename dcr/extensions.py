"""The one table of our extensions: what each name of a setting stands for.

Whoever trains hands `TrainSettings` to the core, which knows `TrainConfig` alone, and whoever
evaluates `EvalSettings`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from dcr.core import ending
from dcr.core.config import EvalConfig, Part, Table, TrainConfig, TrainTable

if TYPE_CHECKING:
    from dcr.core.passes import Passes

TABLE = Table(
    tasks={
        "ability": "dcr.ability:Ability",
        "quality": "dcr.quality:Quality",
        "refusal_probability": "dcr.analyses.weights:RefusalProbability",
        "kernel": "dcr.analyses.weights:Kernel",
        "separability": "dcr.analyses.weights:Separability",
        "claims": "dcr.analyses.weights:Claims",
    },
    judges=("llm", "llama_guard", "wildguard", "moderation"),
    judging="dcr.judges:Ours",
    changes=(
        Part(
            "dcr.steering:Steering",
            lambda of: of.steering.method != "none" or of.steering.validation,
        ),
        Part("dcr.contrast:Contrasted", lambda of: bool(of.gen.contrast)),
        Part("dcr.core.evaluation.subjects:Prefilled", lambda of: of.gen.prefill is not None),
        Part("dcr.calibration:Calibrated", lambda of: of.calibrate is not None),
    ),
    endpoint="dcr.endpoints.subject:Served",
    sharing="dcr.workers:Workers",
)


@dataclass
class EvalSettings(EvalConfig):
    """Everything `eval.py` can be told."""

    table: ClassVar[Table] = TABLE


@dataclass
class TrainSettings(TrainConfig):
    """Everything `train.py` can be told."""

    table: ClassVar[TrainTable] = TrainTable(
        examining="dcr.balance:examined",
        best_layer="dcr.choice:best_layer",
        watching="dcr.tracking:watching",
        sharding="dcr.sharding:Shards",
    )


ending.SCHEMAS |= {"train": TrainSettings, "eval": EvalSettings}


def fast_passes() -> "Passes":
    """Those that take less time on a CPU, see `dcr.core.passes`."""
    from dcr.fast.passes import Fast  # with torch, which help and a user's error need not wait for

    return Fast()


def hand_in_passes() -> None:
    """From now on this process computes with them."""
    from dcr.core import passes

    passes.use(fast_passes())
