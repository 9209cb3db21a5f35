"""The choices a user has, by their spelling on the command line."""

from enum import Enum


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
