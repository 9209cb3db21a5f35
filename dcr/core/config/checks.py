"""What a setting must be: a range for every number, and the relations between settings."""

import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, TypeVar

from dcr.core.config.schema import (
    AUTO_LAYER,
    ContrastiveConfig,
    Moments,
    Precision,
    Settings,
    Stage,
    TrainConfig,
    stages_of,
)

Node = TypeVar("Node")
SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")
OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # a user's own, package.module:Class
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


def is_path(name: str) -> bool:
    """Whether a name is the path of a user's own part, `package.module:Class`."""
    return OWN.fullmatch(name) is not None


def class_of(name: str) -> str:
    """The class that a path names; any other name as it is."""
    return name.rpartition(":")[2] if is_path(name) else name


def positive(value: float) -> bool:
    return value > 0


def not_negative(value: float) -> bool:
    return value >= 0


def ranged(default: Any, holds: Callable[[float], bool], cure: str) -> Any:
    """A numeric field of an extension's node: its default, what it must be, and what to give."""
    return field(default=default, metadata={"range": (holds, cure)})


def listed_last(*names: str) -> Callable[[type[Node]], type[Node]]:
    """A dataclass with these fields behind all others, wherever its settings are listed.

    An extension's would else stand behind those of the node that it adds to.
    """

    def moved(node: type[Node]) -> type[Node]:
        entries: dict[str, Any] = vars(node)["__dataclass_fields__"]
        for name in names:
            entries[name] = entries.pop(name)
        return node

    return moved


def _share(value: float) -> bool:
    return 0 <= value < 1


# Numeric fields by path, or by name wherever they stand: what each is besides finite. A node of an
# extension says it where the field stands, see `ranged`.
RANGES = {
    name: (holds, cure)
    for names, holds, cure in (
        ("epochs", lambda v: 0 < v <= 10**6, "give 1 or more, at most 1000000"),
        ("margin", lambda v: 0 < v < 1, "give a number inside (0, 1)"),
        ("scale", positive, "give a number above 0"),
        ("ratio", lambda v: 0 < v <= 1e6, "give toxic rows per seemingly toxic row, above 0"),
        ("draws", lambda v: 0 < v <= 10**7, "give the prompts drawn per epoch, 1 to 10000000"),
        ("batch_size general_batch_size max_new_tokens repeat", positive, "give 1 or more"),
        ("devices num_nodes checkpoint_every_n_steps", positive, "give 1 or more"),
        ("micro_tokens", positive, "give the padded tokens of one forward pass, above 0"),
        ("depth", lambda v: 0 < v <= 1, "give a share of the depth inside (0, 1]"),
        ("layer", not_negative, "blocks are counted from 1"),
        ("lr", lambda v: 0 < v <= 1, "give a learning rate above 0, at most 1"),
        ("weight weight_decay drift greedy snapshots", not_negative, "give 0 or more"),
        ("dropout", _share, "give a number in [0, 1)"),
        ("clip", positive, "give a gradient norm above 0, or null"),
        ("rank", lambda v: 0 < v <= 2**16, "give 1 to 65536"),
        ("alpha", lambda v: 0 < v <= 2**24, "give 1 to 16777216"),
        ("warmup", _share, "give a share of the steps in [0, 1)"),
        ("max_len", lambda v: v >= 8, "give 8 tokens or more"),
        ("count", positive, "give 1 or more, or null for all rows"),
        ("data.safety.count", not_negative, "give 0 or more, or null for all rows"),
        ("group_holdout", _share, "give a share of the template groups in [0, 1)"),
        ("validation", _share, "give a share of the rows in [0, 1)"),
        ("near_duplicate", lambda v: 0 < v <= 1, "give a similarity inside (0, 1]"),
        ("threads", lambda v: 0 < v <= THREADS, f"give 1 to {THREADS}, or null"),
        ("limit", positive, "give 1 or more, or null for whole sets"),
        ("self_cd", not_negative, "give a weight of 0 or more, or null"),
        ("adacd", positive, "give a ratio above 0, or null"),
        ("sft.readout.steps", lambda v: 0 <= v <= 10**6, "give 1 to 1000000, or 0 for no readout"),
        ("heldout", _share, "give a share of the topics in [0, 1)"),
        ("blocks", positive, "give 1 or more of the last blocks"),
        ("seed", lambda v: 0 <= v < 2**32, "give a whole number in [0, 2**32)"),
    )
    for name in names.split()
}


def check(config: Settings) -> None:
    """Raises ConfigError, naming key, value and cure, for the first setting that cannot be."""
    every = list(_entries(config))
    for key, entry, value in every:
        # an interpolation may give text where a list belongs, which would be read by letter
        if "list[" in str(entry.type) and not isinstance(value, (list, type(None))):
            raise ConfigError(f"{key}={value}: give a list, as in {key}=[a,b]")
    for key, entry, value in every:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            known = RANGES.get(key) or RANGES.get(entry.name)
            holds, cure = (
                entry.metadata.get("range") or known or (math.isfinite, "give a finite number")
            )
            if not (math.isfinite(value) and holds(value)):
                raise ConfigError(f"{key}={value}: {cure}")
    training = _of_training(config) if isinstance(config, TrainConfig) else ()
    for fault in (*_of_both(config), *training, *config.faults()):
        raise ConfigError(fault)


def settings_of(node: object) -> Iterator[tuple[str, object]]:
    """Path and value of every setting, groups among them."""
    return ((key, value) for key, _, value in _entries(node))


def _entries(node: object, prefix: str = "") -> "Iterator[tuple[str, Field[Any], object]]":
    assert is_dataclass(node)
    for entry in fields(node):
        value, key = getattr(node, entry.name), prefix + entry.name
        yield key, entry, value
        if is_dataclass(value):
            yield from _entries(value, f"{key}.")


def unfit_machine(accelerator: str) -> Iterator[str]:
    """A device that Lightning has no name for."""
    if accelerator not in ACCELERATORS:
        yield f"trainer.accelerator={accelerator}: choose one of {', '.join(ACCELERATORS)}"


def _of_both(config: Settings) -> Iterator[str]:
    label, project = config.model.label, config.wandb.project
    if label and (label[0] == "." or not SAFE_NAME.fullmatch(label)):
        yield f"model.label={label}: use letters, digits, '.', '_' and '-', and no '.' in front"
    for key, items in settings_of(config):
        if isinstance(items, list) and any(isinstance(item, (list, dict)) for item in items):
            yield f"{key}={items}: give names, as in {key}=[a,b]"
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
    yield from unfit_machine(config.trainer.accelerator)
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
