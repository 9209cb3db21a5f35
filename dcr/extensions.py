"""The one table of our extensions: what each name of a setting stands for.

Whoever trains hands `TrainSettings` to the core, which knows `TrainConfig` alone, and whoever
evaluates `EvalSettings`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from dcr import (
    analyses,
    calibration,
    contrast,
    ending,
    endpoints,
    gating,
    looks,
    quality,
    repetition,
    robustness,
    steering,
    thinking,
    tracking,
    wandb_run,
)
from dcr.ability import AbilityConfig
from dcr.analyses import ClaimsConfig, KernelConfig, RefusalProbabilityConfig, SeparabilityConfig
from dcr.calibration import CalibrationConfig
from dcr.contrast import ContrastConfig
from dcr.core.config import is_path
from dcr.core.config.evaluation import KEYWORD, EvalConfig, Extension, Table
from dcr.core.config.training import TrainConfig, TrainTable
from dcr.endpoints import HTTPConfig
from dcr.gating import GatingConfig
from dcr.judges import (
    AnnotatorConfig,
    LlamaGuardConfig,
    LLMJudgeConfig,
    ModerationConfig,
    WildGuardConfig,
)
from dcr.looks import FinalConfig
from dcr.quality import QualityConfig
from dcr.repetition import RepetitionConfig
from dcr.robustness import RobustnessConfig
from dcr.steering import SteeringConfig
from dcr.stl_aug import AugmentConfig
from dcr.tracking import TrackingConfig
from dcr.wandb_run import WandbConfig

if TYPE_CHECKING:
    from dcr.fast.passes import Fast

Node = TypeVar("Node")

TABLE = Table(
    tasks={
        "ability": "dcr.ability.scores:Ability",
        "quality": "dcr.quality.win_rates:Quality",
        "refusal_probability": "dcr.analyses.weights:RefusalProbability",
        "kernel": "dcr.analyses.weights:Kernel",
        "separability": "dcr.analyses.weights:Separability",
        "claims": "dcr.analyses.weights:Claims",
        "frontier": "dcr.frontier.answers:Frontier",
        "robustness": "dcr.robustness.attacked:Robustness",
    },
    on_weights=("ability", "refusal_probability", "kernel", "separability", "claims"),
    judges={
        "llm": "dcr.judges.served:BY_LLM",
        "llama_guard": "dcr.judges.guards:BY_LLAMA_GUARD",
        "wildguard": "dcr.judges.guards:BY_WILDGUARD",
        "moderation": "dcr.judges.served:BY_MODERATION",
        "outcome": "dcr.judges.judging:BY_OUTCOME",
    },
    rules={"recommended": "dcr.keywords:recommended"},
    judging="dcr.judges.judging:JudgeTable",
    changes=(
        Extension(
            "dcr.steering.methods:Steering",
            lambda of: of.steering.method != "none" or of.steering.validation,
        ),
        Extension("dcr.steering.methods:Own", lambda of: is_path(of.steering.method)),
        Extension("dcr.contrast.decoding:Contrasted", lambda of: bool(of.gen.contrast)),
        Extension("dcr.repetition:Penalised", lambda of: of.gen.repetition_penalty != 1),
        Extension("dcr.core.evaluation.subjects:Prefilling", lambda of: of.gen.prefill is not None),
        Extension("dcr.thinking.reasoning:Thinking", lambda of: of.gen.thinking is not None),
        Extension(
            "dcr.calibration.biases:Calibrated",
            lambda of: of.calibrate is not None and of.gate is None,
        ),
        Extension("dcr.gating.answers:Gated", lambda of: of.gate is not None),
        Extension("dcr.looks.counting:Counted", lambda of: of.final.plan is not None),
    ),
    subjects=(
        Extension("dcr.endpoints.subject:subjects", lambda of: of.endpoint is not None),
        Extension("dcr.tracking.snapshots:subjects", lambda of: of.snapshots),
    ),
    sharing="dcr.workers:Shared",
    contamination="dcr.contamination:measured",
    metrics="dcr.results.file:MetricsFile",
    showing="dcr.wandb_scores:showing",
    relations=(
        contrast.relations,
        endpoints.relations,
        steering.relations,
        calibration.relations,
        gating.relations,
        quality.relations,
        robustness.relations,
        looks.relations,
        analyses.relations,
        thinking.relations,
        repetition.relations,
        wandb_run.relations,
    ),
)


def listed(*names: str, behind: str) -> Callable[[type[Node]], type[Node]]:
    """Moves these fields of a dataclass right behind another, for listings of its settings.

    The fields that a subclass adds would otherwise follow all that it inherits.
    """

    def moved(node: type[Node]) -> type[Node]:
        entries: dict[str, Any] = vars(node)["__dataclass_fields__"]
        order = [name for name in entries if name not in names]
        place = order.index(behind) + 1
        for name in (*order[:place], *names, *order[place:]):
            entries[name] = entries.pop(name)
        return node

    return moved


@listed("repetition_penalty", "self_cd", "adacd", behind="max_new_tokens")
@dataclass
class GenSettings(ContrastConfig, RepetitionConfig):
    """How answers are generated."""


@listed("endpoint_model", "endpoint_key", "endpoint_parameters", behind="endpoint")
@listed("own", "trainer", "wandb", behind="final")
@dataclass
class EvalSettings(EvalConfig):
    """Everything `eval.py` can be told."""

    table: ClassVar[Table] = TABLE

    # Who says whether an answer refuses or harms; your own is named by its path as well.
    judge: list[str] = field(default_factory=lambda: [KEYWORD, "outcome"])
    # nobody puts another node there
    gen: GenSettings = field(default_factory=GenSettings)  # pyright: ignore[reportIncompatibleVariableOverride]
    endpoint_model: str | None = None  # its name there
    endpoint_key: str | None = None  # the environment variable that holds the key, if one is needed
    # Sent with each request; null leaves one of ours out.
    endpoint_parameters: dict[str, Any] = field(default_factory=dict)
    # The folder of a gate, which refuses toxic prompts; the model answers the others.
    gate: str | None = None
    gating: GatingConfig = field(default_factory=GatingConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    steering: SteeringConfig = field(default_factory=SteeringConfig)
    http: HTTPConfig = field(default_factory=HTTPConfig)
    llm: LLMJudgeConfig = field(default_factory=LLMJudgeConfig)
    llama_guard: LlamaGuardConfig = field(default_factory=LlamaGuardConfig)
    wildguard: WildGuardConfig = field(default_factory=WildGuardConfig)
    moderation: ModerationConfig = field(default_factory=ModerationConfig)
    ability: AbilityConfig = field(default_factory=AbilityConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    annotator: AnnotatorConfig = field(default_factory=AnnotatorConfig)
    refusal_prob: RefusalProbabilityConfig = field(default_factory=RefusalProbabilityConfig)
    entk: KernelConfig = field(default_factory=KernelConfig)
    sep: SeparabilityConfig = field(default_factory=SeparabilityConfig)
    claims: ClaimsConfig = field(default_factory=ClaimsConfig)
    robustness: RobustnessConfig = field(default_factory=RobustnessConfig)
    final: FinalConfig = field(default_factory=FinalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


@listed("stl_aug", behind="sft")
@listed("tracking", behind="trainer")
@dataclass
class TrainSettings(TrainConfig):
    """Everything `train.py` can be told."""

    table: ClassVar[TrainTable] = TrainTable(
        rows={"stl_aug": "dcr.stl_aug.rows:added"},
        stages={"readout": "dcr.readout.stage:train"},
        best_layer="dcr.choice.transfer:best_layer",
        watching="dcr.tracking.costs:watching",
        showing="dcr.wandb_run:showing",
        relations=(tracking.relations, wandb_run.relations),
    )

    stl_aug: AugmentConfig = field(default_factory=AugmentConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


ending.SCHEMAS |= {"train": TrainSettings, "eval": EvalSettings}


def fast_passes() -> "Fast":
    """Those that take less time on a CPU, see `dcr.core.passes` and `learning`."""
    from dcr.fast.passes import Fast  # with torch, which help and a user's error need not wait for

    return Fast(tracking.measures)


def hand_in_passes() -> None:
    """From now on this process computes with them."""
    from dcr.core import learning, passes

    fast = fast_passes()
    passes.use(fast)
    learning.use(fast)
