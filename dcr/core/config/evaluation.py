"""The settings of `eval.py` that are the core's: who answers, who judges, and what is measured.

Nodes that `train.py` has as well are those of `config`; an extension brings its own, see `Table`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

from dcr.core.config import (
    DataConfig,
    ModelConfig,
    Precision,
    Relations,
    ScriptSettings,
    Stage,
)

AUTO_LENGTH = "auto"  # gen.max_new_tokens: until XSTest's keywords have decided
KEYWORD = "keyword"  # the judge by keywords


@dataclass
class GenConfig:
    max_new_tokens: Any = 256  # or auto: each answer ends once XSTest's keywords have decided
    # Words that each answer continues, a simple jailbreak; the text behind them is stored and
    # judged.
    prefill: str | None = None
    # For a model that thinks: the most tokens of a thought before each answer; null: no thought.
    thinking: int | None = None
    batch_size: int | None = None  # prompts at once; null: as many as the free memory holds

    @property
    def contrast(self) -> dict[str, float]:
        """The ways to decode of an extension that are asked for, by name, with their weights."""
        return {}

    def decoding(self, chat: Any) -> Any:
        """The `ChatFormat` of prompts, with an extension's change of the logits of answers."""
        return chat

    @property
    def most(self) -> int:
        """The longest answer in tokens: what ends no row earlier with `auto`, the default."""
        return 256 if self.max_new_tokens == AUTO_LENGTH else self.max_new_tokens


@dataclass
class DeviceConfig:
    """The device that a model is evaluated on."""

    accelerator: str = "auto"  # as Lightning spells it: auto, cpu, gpu, cuda or mps
    devices: int = 1  # processes that share the prompts, each with the whole model on a GPU or CPU
    threads: int | None = None  # of torch; null: its own choice
    progress: bool = True  # show a bar


@dataclass(frozen=True)
class Extension:
    """An extension that takes part where `asked` says so of the settings."""

    path: str
    asked: Callable[[Any], bool]


@dataclass(frozen=True)
class Table:
    """The extensions of evaluation: dotted paths `package.module:Name`.

    Each is imported only where settings ask for it, see `evaluation.protocols`.
    """

    tasks: Mapping[str, str] = field(default_factory=dict)  # of a `protocols.Task`, by name
    on_weights: tuple[str, ...] = ()  # those among them that decode no answers
    judges: Mapping[str, str] = field(default_factory=dict)  # of what `judging` calls, by name
    rules: Mapping[str, str] = field(default_factory=dict)  # of a response's outcome, by name
    judging: str = ""  # of a `protocols.Judges`
    changes: tuple[Extension, ...] = ()  # of a `protocols.Change`
    subjects: tuple[Extension, ...] = ()  # of what gives others than a stage or a model by name
    sharing: str = ""  # of the `subjects.Local` whose prompts several processes share
    contamination: str = ""  # of what counts the prompts of sets that a run was trained on
    metrics: str = ""  # of a `protocols.MetricsFile`
    showing: str = ""  # of a context that shows what is measured
    relations: tuple[Relations, ...] = ()


@dataclass
class EvalConfig(ScriptSettings):
    """Everything `eval.py` can be told without extensions."""

    table: ClassVar[Table] = Table()

    run: str | None = None  # the run folder to evaluate
    # Whose weights: contrastive, sft, readout, or all for the last that is done.
    stage: Stage = Stage.all
    snapshots: bool = False  # score the run's adapter snapshots, for the frontier over SFT
    steps: list[int] | None = None  # whose snapshots; null: all
    endpoint: str | None = None  # an OpenAI-compatible server to evaluate instead of a model
    # What is measured; your own task is named by its path, package.module:Class.
    tasks: list[str] = field(default_factory=lambda: ["over_refusal", "safety"])
    # Who says whether an answer refuses or harms; your own is named by its path as well.
    judge: list[str] = field(default_factory=lambda: [KEYWORD])
    limit: int | None = None  # prompts a set, drawn by seed; null: all
    # Puts a bias on the first token of refusals. A share: refuse this share of toxic prompts; a run
    # folder: refuse as large a share as that run; a calibrated export: take its bias.
    calibrate: str | None = None
    seed: int = 0  # of every draw
    output: str = "outputs/base"  # the folder for a model or an endpoint, which have no run
    # auto: as the run was trained, else what the device does natively.
    precision: Precision = Precision.auto
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    gen: GenConfig = field(default_factory=GenConfig)
    own: dict[str, Any] = field(default_factory=dict)  # settings of a user's own classes, by name
    trainer: DeviceConfig = field(default_factory=DeviceConfig)

    def without(self, *keys: str) -> Self:
        """The same with these settings at their defaults."""
        plain = type(self)()
        return replace(self, **{key: getattr(plain, key) for key in keys})
