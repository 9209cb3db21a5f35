"""The settings of `train.py`: its stages, how they train, and which extensions take part.

Numbers of the paper that do not vary by model are defaults here (section references are to arXiv
2603.03323); those that do stand in `conf/model/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from omegaconf import II

from dcr.core.config import (
    STAGES,
    ConfigError,
    DataConfig,
    LoraConfig,
    Method,
    ModelConfig,
    Precision,
    Relations,
    ScriptSettings,
    Stage,
    Terminator,
)

AUTO_LAYER = "auto"  # dcr.layer: measured on the model before stage one, as dcr.choice does
DEFAULT_RELATIVE_DEPTH = 14 / 30  # the paper's 13/28 and 15/32 (A.2) are 0.464 and 0.469
FSDP = "fsdp"  # weights split over the devices


class Weights(Enum):
    paper = "paper"
    sun2020 = "sun2020"


class Pooling(Enum):
    last = "last"
    mean = "mean"


class NLLSource(Enum):
    prompt_tokens = "prompt_tokens"
    general = "general"


class Sampler(Enum):
    balanced = "balanced"
    proportional = "proportional"


class Adapter(Enum):
    full = "full"
    lora = "lora"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Moments(Enum):
    """How AdamW keeps its two moments of each weight."""

    full = "full"  # in the weight's own type
    int8 = "int8"  # a byte each, by bitsandbytes


@dataclass
class OptimConfig:
    lr: float = 1e-4  # learning rate
    weight_decay: float = 0.0
    clip: float | None = None  # norm that gradients are clipped to; null: no clipping
    moments: Moments = Moments.full  # AdamW's, in the weight's own type or in a byte each


@dataclass
class CircleConfig:
    weights: Weights = Weights.paper  # of pairs: as in A.8, or as in the paper of Circle loss


@dataclass
class NLLConfig:
    weight: float = 0.001  # λ of the term that keeps language
    # Its tokens: the prompts' own, or answers of normal pairs.
    source: NLLSource = NLLSource.prompt_tokens
    general_batch_size: int = 4  # normal pairs a step with source=general


@dataclass
class ContrastiveConfig:
    """Stage one (Section 5, A.8): full fine-tuning of the blocks up to `layer`."""

    # The block ℓ; null: at `depth`; auto: the best by dcr.choice, measured before training.
    layer: Any = II("model.layer")
    depth: float = DEFAULT_RELATIVE_DEPTH  # share of the blocks, where `layer` is null
    epochs: int = II("model.epochs")  # passes over the prompts
    margin: float = 0.25  # of the Circle loss (Eq. 5)
    scale: float = 16.0  # γ of the Circle loss
    # Toxic prompts for each seemingly toxic one; null: every toxic row that is left.
    ratio: float | None = 2.0
    draws: int | None = None  # prompts an epoch; null: as many as there are
    batch_size: int = 32  # prompts a step
    sampler: Sampler = Sampler.balanced  # both kinds equally often in a batch, or by their numbers
    # Which state stands for a prompt: of its last token, or the mean.
    pooling: Pooling = Pooling.last
    train_embeddings: bool | None = None  # input embeddings too; null: if not tied to the head
    circle: CircleConfig = field(default_factory=CircleConfig)
    nll: NLLConfig = field(default_factory=NLLConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = Schedule.constant  # of the learning rate
    precision: Precision = II("precision")  # of this stage
    gradient_checkpointing: bool = False  # less memory for more time
    adapter: Adapter = Adapter.full  # train the blocks' own weights, or a LoRA adapter on them
    lora: LoraConfig = field(default_factory=LoraConfig)


def block_of(config: ContrastiveConfig, depth: int) -> int:
    """The 1-based block ℓ whose output stage one reads (Section 5), for a model `depth` deep.

    With `auto`, which only training measures, the one at the relative depth stands in. Raises
    ConfigError when the model has no such block.
    """
    if config.layer in (None, AUTO_LAYER):
        return max(1, round(depth * config.depth))
    if not 1 <= config.layer <= depth:
        raise ConfigError(f"dcr.layer={config.layer}: the model has blocks 1 to {depth}")
    return config.layer


@dataclass
class ReadoutConfig:
    """Stage three: SFT's adapter in the last blocks is trained on for how an answer begins.

    It is no part of the paper; docs/train.md says what it does.
    """

    # Harmless sides of pairs: prompts of one topic and form that differ by intent.
    seemingly_toxic: list[str] = field(
        default_factory=lambda: ["contrasts_seemingly_toxic", "demo_seemingly_toxic"]
    )
    # Harmful sides of the pairs, of the same topics.
    toxic: list[str] = field(default_factory=lambda: ["contrasts_toxic", "demo_toxic"])
    steps: int = 0  # of the stage; 0: no such stage
    heldout: float = 0.1  # share of topics that are only measured on
    blocks: int = 2  # how many of the last blocks train
    batch_size: int = 32  # prompts a step
    lr: float = 1e-3  # the highest learning rate
    weight_decay: float = 0.01
    drift: float = 1.0  # weight of the KL, on ordinary answers, to the model before the stage
    # Weight of a contrast of the margin, by which greedy decoding decides. Above 0, greedy answers
    # need no calibration to refuse toxic prompts and answer the others, and rank a little worse.
    greedy: float = 0.0


@dataclass
class SFTConfig:
    """Stage two, safety-tuned fine-tuning (A.3)."""

    epochs: int = II("model.sft_epochs")  # passes over the rows
    batch_size: int = II("model.sft_batch_size")  # rows a step
    micro_tokens: int = 2048  # of one pass, with padding; another number draws other dropout masks
    lr: float = II("model.sft_lr")  # the highest learning rate
    weight_decay: float = 0.01
    schedule: Schedule = Schedule.linear  # of the learning rate
    warmup: float = 0.03  # share of the steps
    max_len: int = 512  # tokens a row; longer ones are cut
    train_on_prompt: bool = False  # learn the prompt's tokens too
    # What answers end with; auto: the end of a chat turn if the model knows one.
    terminator: Terminator = Terminator.auto
    precision: Precision = II("precision")  # of this stage
    gradient_checkpointing: bool = False  # less memory for more time
    lora: LoraConfig = field(default_factory=LoraConfig)
    readout: ReadoutConfig = field(default_factory=ReadoutConfig)


@dataclass
class TrainerConfig:
    accelerator: str = "auto"  # as Lightning spells it: auto, cpu, gpu, cuda or mps
    devices: int = 1  # of this machine
    num_nodes: int = 1  # machines
    strategy: str = "auto"  # auto, ddp or fsdp
    threads: int | None = None  # of torch; null: its own choice
    checkpoint_every_n_steps: int = 20  # the most steps that a kill can cost
    progress: bool = True  # show a bar


@dataclass(frozen=True)
class TrainTable:
    """The extensions of training: dotted paths `package.module:Name`, see `dcr.core.training`.

    Each is imported only where settings ask for it.
    """

    rows: Mapping[str, str] = field(default_factory=dict)  # of a `data.Added`, by method
    stages: Mapping[str, str] = field(default_factory=dict)  # of a `Train`, by the stage's name
    best_layer: str = ""  # of a `FindLayer`: for `dcr.layer=auto`
    watching: str = ""  # of a `Watch`: measures while stages train
    showing: str = ""  # of a `Show`: loggers beside `metrics.csv`
    relations: tuple[Relations, ...] = ()


@dataclass
class TrainConfig(ScriptSettings):
    """Everything `train.py` can be told without extensions."""

    table: ClassVar[TrainTable] = TrainTable()

    # What is trained: DCR, SFT alone (STL), or SFT with answers to seemingly toxic prompts too.
    method: Method = Method.dcr
    stage: Stage = Stage.all  # which of the method's stages
    preset_name: str = "paper"  # set by preset=
    seed: int = 0  # of every draw of rows, batches and weights
    # Of the stages and their evaluation; auto: what the device does natively.
    precision: Precision = Precision.auto
    plan: bool = False  # say what would be done and stop
    # In a folder made with other settings: train anew the stages that are not done.
    force: bool = False
    # The run folder; null: named after the settings, so that a command finds its own.
    run: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dcr: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    own: dict[str, Any] = field(default_factory=dict)  # settings of a user's own classes, by name
    # Counts that nobody set: a source with fewer rows gives all. Commands fill this in.
    at_most: list[str] = field(default_factory=list)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)


def stages_of(settings: "TrainConfig") -> tuple[Stage, ...]:
    """The stages that a command trains, in order: the one table of training, plan and studies.

    There are none where `stage` names one that the method does not have.
    """
    chain = {
        Stage.contrastive: settings.method is Method.dcr,
        Stage.sft: True,
        Stage.readout: settings.sft.readout.steps > 0,
    }
    return tuple(each for each in STAGES if chain[each] and settings.stage in (Stage.all, each))
