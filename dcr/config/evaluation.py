"""Every setting of `eval.py`: who answers, who judges, and what is measured."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import II, MISSING

from dcr.config.enums import (
    Judge,
    Pooling,
    Precision,
    ScansEnd,
    ScansLayers,
    Stage,
    Steering,
    Task,
)
from dcr.config.tree import (
    DataConfig,
    KernelConfig,
    ModelConfig,
    RefusalProbabilityConfig,
    WandbConfig,
)


@dataclass
class GenConfig:
    max_new_tokens: int = 256
    # Self-CD (OverKill, ACL 2024): how much of what a system prompt that stresses safety adds to
    # the logits is taken away; the released code's weight is 1.5. Null decodes plainly.
    self_cd: float | None = None
    batch_size: int | None = None  # null: as many prompts as the free memory holds


@dataclass
class DeviceConfig:
    """Where a model is evaluated: in one process, on one device."""

    accelerator: str = "auto"
    threads: int | None = None
    progress: bool = True


@dataclass
class HTTPConfig:
    """How every server is called."""

    concurrency: int = 8
    timeout: float = 60.0  # seconds a request may take
    retries: int = 6  # after a time-out, a dropped connection, 429 or 5xx


@dataclass
class ServerConfig:
    """A model behind an OpenAI-compatible server."""

    url: str | None = None  # null: OpenAI's own
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
    precision: Precision = Precision.bf16
    batch_size: int = 8
    max_new_tokens: int = 20


@dataclass
class LlamaGuardConfig(GuardConfig):
    model: str = "meta-llama/Llama-Guard-3-8B"


@dataclass
class WildGuardConfig(GuardConfig):
    model: str = "allenai/wildguard"
    max_new_tokens: int = 32
    prompt: str | None = None  # a file; null: dcr/judges/wildguard.txt, in our own words


@dataclass
class AbilityConfig:
    """Tasks of the lm-evaluation-harness: ours from `data.root` where it holds them."""

    tasks: list[str] = field(
        default_factory=lambda: ["mmlu", "arc_easy", "arc_challenge", "openbookqa", "piqa"]
    )
    shots: int = 0
    limit: int | None = None  # questions a task, or a subject of MMLU; null: all
    batch_size: int = 16


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
    source: str = "alpaca_eval"


@dataclass
class ScansConfig:
    """SCANS (Cao et al. 2025), as released; each contradiction of its code has its switch here."""

    anchors: int = 64  # prompts of each kind
    layers: ScansLayers = ScansLayers.absolute
    until_last: bool = True  # classify up to the last block; else only within the steered ones
    s1: ScansEnd = ScansEnd.user_end
    threshold: float | None = 0.75  # null: calibrated on anchors held out of extraction
    sure_in_vectors: bool = False  # whether "Sure" is appended when the vectors are taken


@dataclass
class SurgicalConfig:
    """Surgical (Wang et al. 2025), as released; each contradiction of its code has its switch."""

    train: int = 128  # prompts of each kind that vectors are computed from
    validation: int = 32  # prompts of each kind that candidates are selected on
    add: float = II("model.surgical_add")
    ablate: float = II("model.surgical_ablate")
    orthogonalise: float = 1.0  # λ: 1 removes the whole component along the harmful direction
    select_coefficient: float = 1.0  # at which candidates for addition are compared; released: 0
    ablation_kl: float = 0.2
    addition_kl: float = 2.0
    prune_layers: float = 0.8  # candidates lie below this share of the depth
    refusal_tokens: list[str] = II("model.refusal_tokens")


@dataclass
class SteeringConfig:
    """Activation edits in evaluation. Strength is α for SCANS and multiplies Surgical's pair."""

    method: Steering = Steering.none
    strength: float = 1.0
    released_data: bool = False  # the prompts of the released code, evaluation prompts among them
    # Ask the prompts that extraction leaves of data.extraction, to choose a strength on.
    validation: bool = False
    scans: ScansConfig = field(default_factory=ScansConfig)
    surgical: SurgicalConfig = field(default_factory=SurgicalConfig)


@dataclass
class SeparabilityConfig:
    """How well two classes come apart, block by block (A.9)."""

    pooling: Pooling = Pooling.last
    standardise: bool = False
    prompts: int | None = None  # of each kind; null: all


@dataclass
class ClaimsConfig:
    """The paper's Eq. 2 and 3 and Proposition 1, tried on one model."""

    layer: int | None = None  # the block ℓ of the states; null: the run's, or the model's own
    pairs: int = 6  # toxic prompts with a refusal, one SGD step on each
    prompts: int = 10  # observers of each kind
    top_k: int = 10
    # tail:N, trunk:ℓ or all; the bare word trunk is trunk:ℓ of the layer
    params: list[str] = field(default_factory=lambda: ["tail:2", "trunk"])
    # Nats, or of a loss below one nat the share of it, that one step takes off its own pair's loss
    # to first order.
    drop: float = 0.02
    budget_gib: float = 4.0


@dataclass
class EvalConfig:
    """Everything `eval.py` can be told."""

    run: str | None = None
    stage: Stage = Stage.all  # whose weights: contrastive, sft, or all for the last that is done
    snapshots: bool = False  # score every adapter snapshot of the run, for the frontier
    steps: list[int] | None = None  # of which snapshots; null: all
    endpoint: str | None = None  # an OpenAI-compatible server to evaluate instead of a model
    endpoint_model: str | None = None
    endpoint_key: str | None = None  # the environment variable that holds the key, if one is needed
    endpoint_parameters: dict[str, Any] = field(default_factory=dict)  # null leaves one of ours out
    tasks: list[Task] = field(default_factory=lambda: [Task.over_refusal, Task.safety])
    judge: list[Judge] = field(default_factory=lambda: [Judge.keyword])
    limit: int | None = None
    seed: int = 0
    output: str = "outputs/base"
    precision: Precision = Precision.bf16
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    gen: GenConfig = field(default_factory=GenConfig)
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
