"""Every setting of `eval.py`: who answers, who judges, and what is measured.

Nodes that `train.py` has as well are those of `schema`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar

from omegaconf import II, MISSING

from dcr.core.config.schema import (
    DataConfig,
    KernelConfig,
    ModelConfig,
    Pooling,
    Precision,
    RefusalProbabilityConfig,
    Stage,
    WandbConfig,
)

AUTO_LENGTH = "auto"  # gen.max_new_tokens: until XSTest's keywords have decided

# --- the choices, by their spelling on the command line ---


class ScansLayers(Enum):
    absolute = "absolute"  # blocks 11 to 20, as released for models of 32
    middle_third = "middle_third"


class ScansEnd(Enum):
    """Where the instruction part of a SCANS query ends."""

    user_end = "user_end"
    prompt_last = "prompt_last"


# --- the nodes ---


@dataclass
class GenConfig:
    max_new_tokens: Any = 256  # or auto: see `refusal.is_decided`
    # Self-CD (OverKill, ACL 2024): how much of what a system prompt that stresses safety adds to
    # the logits is taken away; the released code's weight is 1.5. Null decodes plainly.
    self_cd: float | None = None
    # AdaCD (arXiv 2604.17132): how much of what a system prompt that asks for a refusal adds to the
    # logits is, token by token, added or taken away; the released code's ratio is 4.5.
    adacd: float | None = None
    # Words put into the model's mouth, a simple jailbreak: answers go on from them, and what is
    # stored and judged stands behind them.
    prefill: str | None = None
    batch_size: int | None = None  # null: as many prompts as the free memory holds

    @property
    def contrast(self) -> dict[str, float]:
        """The way to decode that is asked for, by name, with its weight; empty for plain."""
        named = {"self_cd": self.self_cd, "adacd": self.adacd}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def most(self) -> int:
        """The longest answer in tokens: what ends no row earlier with `auto`, the default."""
        return 256 if self.max_new_tokens == AUTO_LENGTH else self.max_new_tokens


@dataclass
class CalibrationConfig:
    """Prompts that `calibrate` chooses a bias on, and whoever steers a strength: none that is
    evaluated on, trained on or extracted from."""

    toxic: list[str] = field(default_factory=lambda: ["contrasts_toxic_heldout"])
    seemingly_toxic: list[str] = field(
        default_factory=lambda: ["contrasts_seemingly_toxic_heldout"]
    )


@dataclass
class DeviceConfig:
    """Where a model is evaluated."""

    accelerator: str = "auto"
    devices: int = 1  # processes that share the prompts, each with the whole model on a GPU or CPU
    threads: int | None = None
    progress: bool = True


@dataclass
class HTTPConfig:
    """How every server is called."""

    concurrency: int = 8  # requests at once to a server
    timeout: float = 60.0  # seconds that an attempt waits for the server
    retries: int = 6  # after a time-out, a dropped connection, 429 or 5xx


@dataclass
class ServerConfig:
    """A model behind an OpenAI-compatible server."""

    url: str | None = None  # its address; null: OpenAI's own
    model: str = MISSING
    # The environment variable that holds the key, never the key itself. Null: OPENAI_API_KEY for
    # OpenAI's own server, and none for another.
    key: str | None = None
    # Sent with each request, by the server's own names; null leaves one of the defaults out.
    parameters: dict[str, Any] = field(default_factory=dict)
    input_price: float | None = None  # USD per million tokens, for the estimate
    output_price: float | None = None


@dataclass
class LLMJudgeConfig(ServerConfig):
    """XSTest's three labels from any chat model (the paper: GPT-4o and GPT-5.1)."""

    model: str = "gpt-4o-2024-11-20"
    parameters: dict[str, Any] = field(default_factory=lambda: {"temperature": 0, "max_tokens": 16})
    prompt: str | None = None  # a file with wording of your own; null: dcr/judges/xstest.txt


@dataclass
class ModerationConfig(ServerConfig):
    """OpenAI Moderation of the response alone, as in STL's script."""

    model: str = "omni-moderation-latest"


@dataclass
class GuardConfig:
    """A guard model run here: a hub id or a local folder."""

    model: str = MISSING
    revision: str | None = None
    precision: Precision = Precision.auto  # of the guard alone
    batch_size: int = 8


@dataclass
class LlamaGuardConfig(GuardConfig):
    model: str = "meta-llama/Llama-Guard-3-8B"


@dataclass
class WildGuardConfig(GuardConfig):
    model: str = "allenai/wildguard"
    prompt: str | None = None  # a file; null: dcr/judges/wildguard.txt, in our own words


@dataclass
class AbilityConfig:
    """Tasks of the lm-evaluation-harness: ours from `data.root` where it holds them."""

    # Any of the harness's.
    tasks: list[str] = field(
        default_factory=lambda: ["mmlu", "arc_easy", "arc_challenge", "openbookqa", "piqa"]
    )
    shots: int = 0  # worked examples before each question
    limit: int | None = None  # questions a task, or a subject of MMLU; null: all
    batch_size: int = 16  # questions at once


@dataclass
class AnnotatorConfig(ServerConfig):
    """Who compares two answers: one token with its log-probabilities, as in AlpacaEval 2."""

    model: str = "gpt-4o-mini-2024-07-18"
    parameters: dict[str, Any] = field(
        default_factory=lambda: {
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 5,
        }
    )
    prompt: str | None = None  # null: dcr/judges/pairwise.txt


@dataclass
class QualityConfig:
    """AlpacaEval: win rate against the answers of a reference run, the STL run of this model."""

    reference: str | None = None  # a run folder
    source: str = "alpaca_eval"  # the instructions


@dataclass
class ScansConfig:
    """SCANS (Cao et al. 2025), as released."""

    anchors: int = 64  # prompts of each kind
    layers: ScansLayers = ScansLayers.absolute  # which blocks are edited
    s1: ScansEnd = ScansEnd.user_end  # where the instruction ends that is compared
    threshold: float | None = 0.75  # null: calibrated on anchors held out of extraction


@dataclass
class SurgicalConfig:
    """Surgical (Wang et al. 2025); candidates for addition are compared at a coefficient of 1."""

    train: int = 128  # prompts of each kind that vectors are computed from
    validation: int = 32  # prompts of each kind that candidates are selected on
    add: float = II("model.surgical_add")  # of the toxic direction
    ablate: float = II("model.surgical_ablate")  # of the false-refusal direction
    ablation_kl: float = 0.2  # the most that ablating a candidate may change ordinary answers
    addition_kl: float = 2.0  # the same for adding it
    # Whose probability candidates are chosen by.
    refusal_tokens: list[str] = II("model.refusal_tokens")


@dataclass
class ProbeConfig:
    """Probe-gated refusal: a linear probe of the prompt decides how the answer opens."""

    layer: int | None = None  # the block that is read; null: 0.6 of the depth
    train: int = 64  # prompts of each kind that the probe is fitted to


@dataclass
class SteeringConfig:
    """Activation edits in evaluation. Strength is α for SCANS, multiplies Surgical's pair, and is
    what a log-odds of the probe adds to that of refusing."""

    method: str = "none"  # none, scans, surgical, ablation or probe
    strength: float = 1.0  # 0 leaves the model as it is
    released_data: bool = False  # the prompts of the released code, evaluation prompts among them
    # Ask the prompts of `calibration`, to choose a strength on.
    validation: bool = False
    scans: ScansConfig = field(default_factory=ScansConfig)
    surgical: SurgicalConfig = field(default_factory=SurgicalConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


@dataclass
class SeparabilityConfig:
    """How well two classes come apart, block by block (A.9)."""

    pooling: Pooling = Pooling.last
    prompts: int | None = None  # of each kind; null: all


@dataclass
class ClaimsConfig:
    """The paper's Eq. 2 and 3 and Proposition 1, tried on one model.

    Tokens and memory are those of the kernel, `entk.top_k` and `entk.budget_gib`.
    """

    layer: int | None = None  # the block ℓ of the states; null: the run's, or the model's own
    pairs: int = 6  # toxic prompts with a refusal, one SGD step on each
    prompts: int = 10  # observers of each kind
    # tail:N, trunk:ℓ or all; the bare word trunk is trunk:ℓ of the layer
    params: list[str] = field(default_factory=lambda: ["tail:2", "trunk"])
    # Nats, or of a loss below one nat the share of it, that one step takes off its own pair's loss
    # to first order.
    drop: float = 0.02


@dataclass(frozen=True)
class Part:
    """An extension that takes part where `asked` says so of the settings."""

    path: str
    asked: Callable[[Any], bool]


@dataclass(frozen=True)
class Table:
    """What settings may name besides the core's own: dotted paths `package.module:Name`.

    Each is imported only where settings ask for it, see `evaluation.protocols`.
    """

    tasks: Mapping[str, str] = field(default_factory=dict)  # of a `protocols.Task`, by name
    judges: tuple[str, ...] = ()  # their names
    judging: str = ""  # of a `protocols.Judges`
    changes: tuple[Part, ...] = ()  # of a `protocols.Change`
    endpoint: str = ""  # of the `protocols.Subject` that answers for `endpoint=`
    sharing: str = ""  # of the processes that share prompts


@dataclass
class EvalConfig:
    """Everything `eval.py` can be told."""

    table: ClassVar[Table] = Table()

    run: str | None = None  # the run folder to evaluate
    # Whose weights: contrastive, sft, readout, or all for the last that is done.
    stage: Stage = Stage.all
    snapshots: bool = False  # score every adapter snapshot of the run, for the frontier
    steps: list[int] | None = None  # of which snapshots; null: all
    endpoint: str | None = None  # an OpenAI-compatible server to evaluate instead of a model
    endpoint_model: str | None = None  # its name there
    endpoint_key: str | None = None  # the environment variable that holds the key, if one is needed
    endpoint_parameters: dict[str, Any] = field(default_factory=dict)  # null leaves one of ours out
    # What is measured.
    tasks: list[str] = field(default_factory=lambda: ["over_refusal", "safety"])
    # Who says whether an answer refuses or harms.
    judge: list[str] = field(default_factory=lambda: ["keyword"])
    limit: int | None = None  # prompts a set, drawn by seed; null: all
    # A bias on the first token of refusals, so that answers refuse this share of toxic prompts, or
    # the share that the run in this folder refuses; or the bias of the export in this folder.
    calibrate: str | None = None
    seed: int = 0  # of every draw
    output: str = "outputs/base"  # the folder for a model or an endpoint, which have no run
    # auto: as the run was trained, else what the device does natively.
    precision: Precision = Precision.auto
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    gen: GenConfig = field(default_factory=GenConfig)
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
    trainer: DeviceConfig = field(default_factory=DeviceConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)
