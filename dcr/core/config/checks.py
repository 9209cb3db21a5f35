"""What a setting must be: a range for every number, and the relations between settings."""

import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass

from dcr.core.config.evaluation import AUTO_LENGTH, EvalConfig
from dcr.core.config.schema import (
    AUTO_LAYER,
    ContrastiveConfig,
    Kind,
    Moments,
    Precision,
    Stage,
    TrainConfig,
    stages_of,
)

PARAMETERS = re.compile(r"(tail|trunk):([0-9]+)|all|adapter")
CORE_TASKS, KEYWORD = ("over_refusal", "safety", "discernment"), "keyword"
ON_WEIGHTS = (
    "discernment",
    "ability",
    "refusal_probability",
    "kernel",
    "separability",
    "claims",
)
STEERINGS = ("none", "scans", "surgical", "ablation", "probe")
SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")  # as Lightning spells them
FSDP = "fsdp"  # weights split over the devices
STRATEGIES = ("auto", "ddp", FSDP)
THREADS = 1024  # torch starts as many as it is told, until it crashes
TAG, PROJECT = 64, 128  # characters that W&B takes


class UserError(Exception):
    """What the user can mend: entry scripts print it as one line and exit with its code."""

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
        raise ConfigError(f"{wanted}: needs {package}; run pip install 'dcr[{extra}]'")


def _positive(value: float) -> bool:
    return value > 0


def _not_negative(value: float) -> bool:
    return value >= 0


def _share(value: float) -> bool:
    return 0 <= value < 1


# Every numeric field by its path, or by its name wherever it stands: what it is besides finite.
RANGES = {
    name: (holds, cure)
    for names, holds, cure in (
        ("epochs", lambda v: 0 < v <= 10**6, "give 1 or more, at most 1000000"),
        ("margin", lambda v: 0 < v < 1, "give a number inside (0, 1)"),
        ("scale", _positive, "give a number above 0"),
        ("ratio", lambda v: 0 < v <= 1e6, "give toxic rows per seemingly toxic row, above 0"),
        ("draws", lambda v: 0 < v <= 10**7, "give the prompts drawn per epoch, 1 to 10000000"),
        ("batch_size general_batch_size max_new_tokens repeat", _positive, "give 1 or more"),
        ("devices num_nodes checkpoint_every_n_steps", _positive, "give 1 or more"),
        ("micro_tokens", _positive, "give the padded tokens of one forward pass, above 0"),
        ("depth", lambda v: 0 < v <= 1, "give a share of the depth inside (0, 1]"),
        ("layer", _not_negative, "blocks are counted from 1"),
        ("lr", lambda v: 0 < v <= 1, "give a learning rate above 0, at most 1"),
        ("weight weight_decay drift greedy snapshots retries", _not_negative, "give 0 or more"),
        ("dropout", _share, "give a number in [0, 1)"),
        ("clip", _positive, "give a gradient norm above 0, or null"),
        ("rank", lambda v: 0 < v <= 2**16, "give 1 to 65536"),
        ("alpha", lambda v: 0 < v <= 2**24, "give 1 to 16777216"),
        ("warmup", _share, "give a share of the steps in [0, 1)"),
        ("max_len", lambda v: v >= 8, "give 8 tokens or more"),
        ("count", _positive, "give 1 or more, or null for all rows"),
        ("data.safety.count", _not_negative, "give 0 or more, or null for all rows"),
        ("group_holdout", _share, "give a share of the template groups in [0, 1)"),
        ("validation", _share, "give a share of the rows in [0, 1)"),
        ("near_duplicate", lambda v: 0 < v <= 1, "give a similarity inside (0, 1]"),
        ("threads", lambda v: 0 < v <= THREADS, f"give 1 to {THREADS}, or null"),
        ("limit", _positive, "give 1 or more, or null for whole sets"),
        ("concurrency", _positive, "give the requests under way at once, 1 or more"),
        ("timeout", _positive, "give seconds above 0"),
        ("input_price output_price", _not_negative, "give USD per million tokens, or null"),
        ("strength", math.isfinite, "give a finite number; 0 leaves the model as it is"),
        ("self_cd", _not_negative, "give a weight of 0 or more, or null"),
        ("adacd", _positive, "give a ratio above 0, or null"),
        ("anchors train prompts", _positive, "give prompts of each kind, 1 or more"),
        ("steering.surgical.validation", _positive, "give prompts of each kind, 1 or more"),
        ("threshold", lambda v: -1 <= v <= 1, "give a cosine in [-1, 1], or null to calibrate it"),
        ("ablation_kl addition_kl", _positive, "give a divergence above 0"),
        ("top_k", _positive, "give tokens of each prompt, 1 or more"),
        ("budget_gib", _positive, "give GiB above 0"),
        ("pairs", _positive, "give pairs to take a step on, 1 or more"),
        ("drop", _positive, "give nats above 0"),
        ("sft.readout.steps", lambda v: 0 <= v <= 10**6, "give 1 to 1000000, or 0 for no readout"),
        ("heldout", _share, "give a share of the topics in [0, 1)"),
        ("share", _share, "give a share of the rows in [0, 1)"),
        ("blocks", _positive, "give 1 or more of the last blocks"),
        ("every_n_steps", _positive, "give 1 or more, or null"),
        ("shots", _not_negative, "give 0 or more examples"),
        ("seed", lambda v: 0 <= v < 2**32, "give a whole number in [0, 2**32)"),
    )
    for name in names.split()
}


def check(config: TrainConfig | EvalConfig) -> None:
    """Raises ConfigError, naming key, value and cure, for the first setting that cannot be."""
    for key, value in _no_lists(config):
        raise ConfigError(f"{key}={value}: give a list, as in {key}=[a,b]")
    for key, value in settings_of(config):
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            known = RANGES.get(key) or RANGES.get(key.split(".")[-1])
            holds, cure = known or (math.isfinite, "give a finite number")
            if not (math.isfinite(value) and holds(value)):
                raise ConfigError(f"{key}={value}: {cure}")
    own = _of_training(config) if isinstance(config, TrainConfig) else _of_evaluation(config)
    for fault in (*_of_both(config), *own):
        raise ConfigError(fault)


def settings_of(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Path and value of every setting, groups among them."""
    assert is_dataclass(node)
    for entry in fields(node):
        value, key = getattr(node, entry.name), prefix + entry.name
        yield key, value
        if is_dataclass(value):
            yield from settings_of(value, f"{key}.")


def _no_lists(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Settings that an interpolation gave text where a list belongs: it would be read by letter."""
    assert is_dataclass(node)
    for entry in fields(node):
        value, key = getattr(node, entry.name), prefix + entry.name
        if is_dataclass(value):
            yield from _no_lists(value, f"{key}.")
        elif "list[" in str(entry.type) and not isinstance(value, (list, type(None))):
            yield key, value


def _of_both(config: TrainConfig | EvalConfig) -> Iterator[str]:
    accelerator, project = config.trainer.accelerator, config.wandb.project
    label = config.model.label
    if label and (label[0] == "." or not SAFE_NAME.fullmatch(label)):
        yield f"model.label={label}: use letters, digits, '.', '_' and '-', and no '.' in front"
    for key, items in settings_of(config):
        if isinstance(items, list) and any(isinstance(item, (list, dict)) for item in items):
            yield f"{key}={items}: give names, as in {key}=[a,b]"
    if accelerator not in ACCELERATORS:
        yield f"trainer.accelerator={accelerator}: choose one of {', '.join(ACCELERATORS)}"
    if not SAFE_NAME.fullmatch(project) or len(project) > PROJECT:
        yield (
            f"wandb.project={project}: use letters, digits, '.', '_' and '-' only, "
            f"{PROJECT} at most"
        )
    for tag in config.wandb.tags:
        if not 1 <= len(tag) <= TAG:
            yield f"wandb.tags=[{tag!r:.60}]: give 1 to {TAG} characters each"


def _of_training(config: TrainConfig) -> Iterator[str]:
    dcr = config.dcr
    if not stages_of(config):
        lacking = {
            Stage.contrastive: f"method={config.method.value}: it has no contrastive stage; use "
            "method=dcr",
            Stage.readout: "sft.readout.steps=0: there is no readout; give its steps, such as 120",
        }
        yield f"stage={config.stage.value} {lacking[config.stage]}"
    if dcr.layer not in (None, AUTO_LAYER) and type(dcr.layer) is not int:
        yield f"dcr.layer={dcr.layer}: give a block's number, auto, or null for dcr.depth"
    if dcr.batch_size < 3:
        yield (
            f"dcr.batch_size={dcr.batch_size}: a prompt needs one of its own class and one of the "
            "other beside it; give 3 or more"
        )
    if dcr.precision is Precision.bf16 and dcr.optim.lr < 1e-6:
        yield (
            f"dcr.optim.lr={dcr.optim.lr}: too small to move bf16 weights; use dcr.precision=mixed"
        )
    yield from _of_several_processes(config)
    if dcr.optim.moments is Moments.int8:
        check_installed("bitsandbytes", "memory", "dcr.optim.moments=int8")
        if config.trainer.strategy == FSDP:
            yield "dcr.optim.moments=int8 trainer.strategy=fsdp: choose one of them"
    for name, node in (("dcr", dcr), ("sft", config.sft)):
        if not node.lora.targets:
            yield f"{name}.lora.targets=[]: name modules, or [all-linear]"
    for kind in ("seemingly_toxic", "toxic"):
        if not getattr(config.sft.readout, kind):
            yield f"sft.readout.{kind}=[]: name sources, or leave it out"


def _of_several_processes(config: TrainConfig) -> Iterator[str]:
    trainer, strategy = config.trainer, f"trainer.strategy={config.trainer.strategy}"
    processes = trainer.devices * trainer.num_nodes
    if trainer.strategy not in STRATEGIES:
        yield f"{strategy}: choose one of {', '.join(STRATEGIES)}"
    if trainer.accelerator == "mps" and (processes > 1 or trainer.strategy != "auto"):
        yield f"{strategy} trainer.accelerator=mps: it trains in one process; use cpu or gpu"
    if trainer.strategy == FSDP and config.tracking.quantities:
        yield (
            f"{strategy} tracking.quantities=[{config.tracking.quantities[0].value}]: is measured "
            "by one process, which holds a part of the weights; take tracking.snapshots=<number> "
            "and eval.py snapshots=true, or trainer.strategy=ddp"
        )


def _of_evaluation(config: EvalConfig) -> Iterator[str]:
    yield from _unknown(config)
    if not config.tasks:
        yield "tasks=[]: nothing to evaluate; name at least one task"
    if not config.judge:
        yield "judge=[]: name at least one judge, such as keyword"
    if config.endpoint is not None:
        yield from _at_an_endpoint(config)
    elif config.endpoint_model is not None:
        yield f"endpoint_model={config.endpoint_model}: say where, with endpoint=http://…/v1"
    if config.trainer.devices > 1:
        yield from _shared_among(config, f"trainer.devices={config.trainer.devices}")
    if config.steps is not None and not config.snapshots:
        yield f"steps={config.steps}: picks among snapshots; add snapshots=true"
    if config.steps == []:
        yield "steps=[]: name at least one step, or leave it out for all"
    contrasts = [f"gen.{name}={value}" for name, value in config.gen.contrast.items()]
    if config.gen.max_new_tokens == AUTO_LENGTH:
        yield from _cut_short(config)
    elif type(config.gen.max_new_tokens) is not int:
        yield f"gen.max_new_tokens={config.gen.max_new_tokens}: give a number of tokens, or auto"
    if len(contrasts) > 1:
        yield f"{' '.join(contrasts)}: two ways to decode; give one"
    for contrast in contrasts:
        yield from _decoding_alone(config, contrast, "a contrast is a way to decode answers")
        if (steering := config.steering.method) != "none":
            yield f"{contrast} steering={steering}: two methods at once; give one"
    yield from _steered(config)
    if config.gen.prefill is not None:
        yield from _prefilled(config, f"gen.prefill={config.gen.prefill!r}")
    if config.calibrate is not None:
        yield from _calibrated(config, f"calibrate={config.calibrate}", contrasts)
    if "quality" in config.tasks:
        if config.steering.validation:
            yield (
                "steering.validation=true tasks=[quality]: asks other prompts than quality "
                "compares; leave one of the two out"
            )
        if config.quality.reference is None:
            yield (
                "tasks=[quality]: needs answers to compare with; name the STL run of the same "
                "model, quality.reference=<run folder>"
            )


def _unknown(config: EvalConfig) -> Iterator[str]:
    """Names that the table of extensions lacks."""
    for key, named, known in (
        ("tasks", config.tasks, (*CORE_TASKS, *config.table.tasks)),
        ("judge", config.judge, (KEYWORD, *config.table.judges)),
        ("steering.method", config.steering.method, STEERINGS),
    ):
        for name in [named] if isinstance(named, str) else named:
            if name not in known:
                told = named if isinstance(named, str) else f"[{','.join(named)}]"
                yield f"{key}={told}: choose one of {', '.join(known)}"


def _steered(config: EvalConfig) -> Iterator[str]:
    if config.steering.method == "probe" and config.steering.released_data:
        yield (
            "steering=probe steering.released_data=true: no prompts were released for it; leave "
            "steering.released_data out"
        )
    for kind in (Kind.toxic, Kind.seemingly_toxic) if config.steering.validation else ():
        own = getattr(config.data.extraction, kind.value)
        for name in sorted(set(getattr(config.calibration, kind.value)) & set(own)):
            yield (
                f"steering.validation=true calibration.{kind.value}: {name} is extracted from as "
                "well, and a strength chosen there flatters; name another source"
            )


def _at_an_endpoint(config: EvalConfig) -> Iterator[str]:
    """What only a model that is here can be asked for."""
    if config.endpoint_model is None:
        yield f"endpoint={config.endpoint}: say which model there, with endpoint_model=<name>"
    for task in ON_WEIGHTS:
        if task in config.tasks and task != "discernment":
            yield (
                f"tasks=[{task}]: needs the model itself, which an endpoint does not give; "
                f"leave {task} out, or name the model with model="
            )
    if config.snapshots:
        yield "snapshots=true: an endpoint has none; name a run with run="
    for named, given, why, cure in (
        *((f"gen.{name}={value}", True, "an endpoint shows no logits to contrast", "model=")
          for name, value in config.gen.contrast.items()),
        (f"calibrate={config.calibrate}", config.calibrate is not None,
         "an endpoint's logit_bias acts on every token of an answer, not on its first alone",
         "model= or run="),
        (f"gen.prefill={config.gen.prefill!r}", config.gen.prefill is not None,
         "a server writes the assistant's turn from its beginning", "model= or run="),
        (f"steering={config.steering.method}", config.steering.method != "none",
         "an endpoint's activations cannot be edited", "model="),
    ):  # fmt: skip
        if given:
            yield f"{named}: {why}; leave it out, or name the model with {cure}"


def _shared_among(config: EvalConfig, named: str) -> Iterator[str]:
    """What several processes cannot share prompts of."""
    if config.endpoint is not None:
        yield f"{named} endpoint={config.endpoint}: no model is here to share; use http.concurrency"
    if config.trainer.accelerator == "mps":
        yield f"{named} trainer.accelerator=mps: there is one; leave trainer.devices out"


def _cut_short(config: EvalConfig) -> Iterator[str]:
    """What reads whole answers, or has no say in when one ends."""
    others = [f"judge=[{judge}]" for judge in config.judge if judge != KEYWORD]
    others += ["tasks=[quality]"] if "quality" in config.tasks else []
    others += [f"endpoint={config.endpoint}"] if config.endpoint is not None else []
    others += [f"gen.{name}={value}" for name, value in config.gen.contrast.items()]
    for other in others:
        yield (
            f"gen.max_new_tokens=auto {other}: answers end where XSTest's keywords have decided; "
            "give a number of tokens"
        )


def _decoding_alone(config: EvalConfig, named: str, why: str) -> Iterator[str]:
    for task in ON_WEIGHTS:
        if task in config.tasks:
            yield (
                f"{named} tasks=[{task}]: {why}, and {task} decodes none; leave one of the two out"
            )


def _prefilled(config: EvalConfig, named: str) -> Iterator[str]:
    yield from _decoding_alone(config, named, "only answers are prefilled")
    if not config.gen.prefill or config.gen.prefill.isspace():
        yield f"{named}: nothing to begin an answer with; name words or leave it out"


def _calibrated(config: EvalConfig, named: str, contrasts: list[str]) -> Iterator[str]:
    yield from _decoding_alone(config, named, "a bias changes how answers are decoded")
    for contrast in contrasts:
        yield f"{named} {contrast}: contrasted logits take no bias; give one"
    if not config.calibration.toxic:
        yield "calibration.toxic=[]: name prompts to calibrate on"
    evaluated = {*config.data.evaluation.over_refusal, *config.data.evaluation.safety}
    for kind in ("toxic", "seemingly_toxic"):
        for source in getattr(config.calibration, kind):
            if source in evaluated:
                yield (
                    f"calibration.{kind}=[{source}]: is evaluated on as well; name prompts of "
                    "another origin"
                )


def block_of(config: ContrastiveConfig, depth: int) -> int:
    """The 1-based block ℓ whose output stage one reads (Section 7.1), for a model `depth` deep.

    With `auto`, which only training measures, the one at the relative depth stands in. Raises
    ConfigError when the model has no such block.
    """
    if config.layer in (None, AUTO_LAYER):
        return max(1, round(depth * config.depth))
    if not 1 <= config.layer <= depth:
        raise ConfigError(f"dcr.layer={config.layer}: the model has blocks 1 to {depth}")
    return config.layer


def parameters(key: str, names: list[str], depth: int) -> None:
    """Raises ConfigError unless each names parameters of a model `depth` deep (A.6)."""
    if not names:
        raise ConfigError(f"{key}=[]: name parameters, such as tail:2 or trunk:{depth // 2}")
    for name in names:
        match = PARAMETERS.fullmatch(name)
        if match is None:
            raise ConfigError(f"{key}=[{name}]: choose tail:N, trunk:ℓ, all or adapter")
        if match[2] and not 1 <= int(match[2]) <= depth:
            raise ConfigError(f"{key}=[{name}]: the model has blocks 1 to {depth}")
