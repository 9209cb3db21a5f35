"""Makes checked dataclasses of what Hydra composed, once, and one line of what is refused."""

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from difflib import SequenceMatcher
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dcr.core.config import (
    ConfigError,
    DataConfig,
    Method,
    ModelConfig,
    Precision,
    Quantization,
    ScriptSettings,
    SourceConfig,
    Stage,
    check_installed,
    class_of,
    is_path,
)
from dcr.core.config.evaluation import AUTO_LENGTH, KEYWORD, EvalConfig
from dcr.core.config.training import AUTO_LAYER, FSDP, Adapter, Moments, TrainConfig, stages_of
from dcr.core.prompts import SWITCHES
from dcr.own import Named

Node = TypeVar("Node", bound=ScriptSettings)

LIKENESS = 0.6  # below it, the nearest name is no help
NEAREST = 3  # names to offer when they are equally near


def resolve(
    composed: DictConfig, schema: type[Node], own: Mapping[str, Named] | None = None
) -> Node:
    """The composed configuration as dataclasses to read only, checked as far as it can be alone.

    `own` are the paths that the user named, where a run's settings stand among the composed ones.
    Raises ConfigError for an unknown key, a wrong type, a value outside its range and settings
    that contradict each other.
    """
    own = own_paths(composed) if own is None else own
    node = OmegaConf.create(OmegaConf.to_container(composed, resolve=False))
    assert isinstance(node, DictConfig)
    if not issubclass(schema, TrainConfig):
        node.data = named(node.data)  # its leaves start as missing: see `cli.prepare`
    default = _defaults(schema)
    plain = OmegaConf.to_container(default, resolve=False)
    for key in _without_value(OmegaConf.to_container(node, resolve=False), plain):
        # a merge would keep the default and say nothing
        raise ConfigError(f"{key}=???: it needs a value")
    try:
        merged = OmegaConf.merge(default, node)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error, schema)) from error
    assert isinstance(config, schema)
    for name in ("seemingly_toxic", "toxic", "safety", "normal"):
        source: SourceConfig = getattr(config.data, name)
        # only training needs every one of them
        if isinstance(config, TrainConfig) or source.source != MISSING:
            source.source = source_names(source.source, f"data.{name}.source")
    if isinstance(config, TrainConfig) and re.fullmatch(r"-?\d+", str(config.dcr.layer)):
        config.dcr.layer = int(config.dcr.layer)  # a node of no one type leaves it text
    check(config)
    if own:
        config = _with_own(config, own)
        assert isinstance(config, schema)
    return config


@functools.cache
def _defaults(schema: type[ScriptSettings]) -> Any:
    """The settings of a schema as nodes: read only, and made once for the many jobs of a study."""
    return OmegaConf.structured(schema)


def own_paths(composed: Any) -> dict[str, Named]:
    """The paths of a user's own parts in composed settings, or in plain ones, by their text.

    Raises ConfigError for settings of a class that nothing names.
    """
    if isinstance(composed, DictConfig):
        composed = OmegaConf.to_container(composed, resolve=False)
    found = {text: Named(text) for text in _texts(composed) if is_path(text)}
    given = composed.get("own") or {}
    classes = [class_of(path) for path in found]
    for name, settings in given.items():
        if name not in classes:
            near = nearest(name, classes)
            hint = f"did you mean own.{near[0]}?" if near else "name it as package.module:Class"
            raise ConfigError(f"own.{name}: no setting names a class of this name; {hint}")
        if not isinstance(settings, Mapping):
            raise ConfigError(f"own.{name}={settings}: set its fields, as own.{name}.<field>=value")
    for path in found.values():
        path.settings = dict(given.get(class_of(path), {}))
    return found


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, (Mapping, list)):
        for each in node.values() if isinstance(node, Mapping) else node:
            yield from _texts(each)


def _with_own(node: Any, own: Mapping[str, Named]) -> Any:
    """The settings with the user's paths in the place of their texts."""
    if is_dataclass(node) and not isinstance(node, type):
        return replace(
            node, **{f.name: _with_own(getattr(node, f.name), own) for f in fields(node)}
        )
    if isinstance(node, list):
        return [_with_own(each, own) for each in node]
    return own.get(node, node) if isinstance(node, str) else node


def named(data: DictConfig) -> Any:
    """The settings of an evaluation's data without those that are left as missing."""

    def given(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        return {key: given(value) for key, value in node.items() if value != MISSING}

    return given(OmegaConf.to_container(data, resolve=False))


def _without_value(given: Any, default: Any, prefix: str = "") -> Iterator[str]:
    """Settings that were given as missing although they have a default."""
    if given == MISSING and default != MISSING:
        yield prefix
    elif isinstance(given, dict) and isinstance(default, dict):
        for key, value in given.items():
            yield from _without_value(value, default.get(key), f"{prefix}.{key}".lstrip("."))


def source_names(value: object, key: str) -> list[str]:
    """`name` and `[name, name]` alike as a list of names; ConfigError for anything else."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, (list, ListConfig)) and names and all(isinstance(n, str) for n in names):
        return [str(name) for name in names]
    raise ConfigError(f"{key}={value}: give a source's name, a JSONL path, or a list of them")


# --- what a run's own config.yaml holds ---


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


def model_of(made_with: Mapping[str, Any], trust_remote_code: bool) -> ModelConfig:
    """The model node of a run's own `config.yaml`, trusted as far as this command's user said."""
    named = literal(made_with["model"])
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), named))
    assert isinstance(model, ModelConfig)
    return replace(model, trust_remote_code=trust_remote_code)


@dataclass
class StageMade:
    """The settings of a run's stage that later commands read."""

    layer: Any = None
    depth: float = 0.0
    precision: Precision = Precision.auto


# Later commands read these nodes of a run's `config.yaml`.
READ_AGAIN = {"model": ModelConfig, "data": DataConfig, "dcr": StageMade, "sft": StageMade}


def fault_of_run(made_with: Mapping[str, Any]) -> str | None:
    """The first node of a run's `config.yaml` that later commands cannot read, and why."""
    own = str(made_with.get("precision", Precision.auto.value))
    if own not in Precision.__members__:
        return f"precision={own}: none of {', '.join(Precision.__members__)}"
    trained = made_with.get("method") in Method.__members__
    for name, schema in READ_AGAIN.items():
        if trained and name not in made_with:
            return f"{name}: missing"
        try:
            node = made_with.get(name, {})
            if schema is StageMade:
                read = (entry.name for entry in fields(schema))
                node = {key: node[key] for key in read if key in node}
            merged: Any = OmegaConf.merge(OmegaConf.structured(schema), literal(node))
            for key in node:  # what our own defaults refer to is not there
                if OmegaConf.is_config(value := merged[key]):  # a leaf is resolved by now
                    OmegaConf.to_container(value, resolve=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            why = getattr(error, "msg", None) or str(error)
            return f"{name}: {getattr(error, 'full_key', None) or name}: {why.splitlines()[0]}"
    return None


# --- checks: a range for every number, and the relations between settings ---

CORE_TASKS = ("over_refusal", "safety", "discernment")
SAFE_NAME = re.compile(r"[A-Za-z0-9._-]+")
ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")  # as Lightning spells them
STRATEGIES = ("auto", "ddp", FSDP)
THREADS = 1024  # torch starts as many as it is told, until it crashes


def positive(value: float) -> bool:
    return value > 0


def not_negative(value: float) -> bool:
    return value >= 0


def ranged(default: Any, holds: Callable[[float], bool], cure: str) -> Any:
    """A numeric field of an extension's node: its default, what it must be, and what to give."""
    return field(default=default, metadata={"range": (holds, cure)})


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
        ("batch_size general_batch_size max_new_tokens", positive, "give 1 or more"),
        ("devices num_nodes checkpoint_every_n_steps", positive, "give 1 or more"),
        ("micro_tokens", positive, "give the padded tokens of one forward pass, above 0"),
        ("depth", lambda v: 0 < v <= 1, "give a share of the depth inside (0, 1]"),
        ("layer", not_negative, "blocks are counted from 1"),
        ("lr", lambda v: 0 < v <= 1, "give a learning rate above 0, at most 1"),
        ("weight weight_decay drift greedy", not_negative, "give 0 or more"),
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
        ("thinking", positive, "give the most tokens of a thought, or null for none"),
        ("sft.readout.steps", lambda v: 0 <= v <= 10**6, "give 1 to 1000000, or 0 for no readout"),
        ("heldout", _share, "give a share of the topics in [0, 1)"),
        ("blocks", positive, "give 1 or more of the last blocks"),
        ("seed", lambda v: 0 <= v < 2**32, "give a whole number in [0, 2**32)"),
    )
    for name in names.split()
}


def check(config: ScriptSettings) -> None:
    """Raises ConfigError, naming key, value and cure, for the first setting that cannot be."""
    for key, entry, value in _entries(config):
        # an interpolation may give text where a list belongs, which would be read by letter
        if "list[" in str(entry.type) and not isinstance(value, (list, type(None))):
            raise ConfigError(f"{key}={value}: give a list, as in {key}=[a,b]")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            known = entry.metadata.get("range") or RANGES.get(key) or RANGES.get(entry.name)
            holds, cure = known or (math.isfinite, "give a finite number")
            if not (math.isfinite(value) and holds(value)):
                raise ConfigError(f"{key}={value}: {cure}")
    for fault in _contradictions(config):
        raise ConfigError(fault)


def check_extras(settings: ScriptSettings) -> None:
    """Raises ConfigError for what needs bitsandbytes, where it is absent."""
    if settings.model.quantization is Quantization.nf4:
        check_installed("bitsandbytes", "memory", "model.quantization=nf4")
    if isinstance(settings, TrainConfig) and settings.dcr.optim.moments is Moments.int8:
        check_installed("bitsandbytes", "memory", "dcr.optim.moments=int8")


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


def _contradictions(config: ScriptSettings) -> Iterator[str]:
    """Settings that contradict each other, each a line that names key, value and cure."""
    yield from _of_both(config)
    if isinstance(config, TrainConfig):
        yield from _of_training(config)
    if isinstance(config, EvalConfig):
        yield from _of_evaluation(config)
    for relations in config.table.relations:
        yield from relations(config)


def _of_both(config: ScriptSettings) -> Iterator[str]:
    if (accelerator := config.trainer.accelerator) not in ACCELERATORS:
        yield f"trainer.accelerator={accelerator}: choose one of {', '.join(ACCELERATORS)}"
    label = config.model.label
    if label and (label[0] == "." or not SAFE_NAME.fullmatch(label)):
        yield f"model.label={label}: use letters, digits, '.', '_' and '-', and no '.' in front"
    for name, value in config.model.template_variables.items():
        told = f"model.template_variables.{name}"
        if not str(name).isidentifier():
            yield f"{told}: no name of a variable; use letters, digits and '_'"
        if name in SWITCHES and value is not False:  # which prompts are rendered with anyway
            yield f"{told}: prompts end where answers begin; gen.thinking=<tokens> lets it think"
    for key, items in settings_of(config):
        if isinstance(items, list) and any(isinstance(item, (list, dict)) for item in items):
            yield f"{key}={items}: give names, as in {key}=[a,b]"


def _of_training(config: TrainConfig) -> Iterator[str]:
    dcr, trainer = config.dcr, config.trainer
    strategy, processes = (
        f"trainer.strategy={trainer.strategy}",
        trainer.devices * trainer.num_nodes,
    )
    if trainer.strategy not in STRATEGIES:
        yield f"{strategy}: choose one of {', '.join(STRATEGIES)}"
    if trainer.accelerator == "mps" and (processes > 1 or trainer.strategy != "auto"):
        yield f"{strategy} trainer.accelerator=mps: it trains in one process; use cpu or gpu"
    if config.model.quantization is Quantization.nf4:
        if config.method is Method.dcr and dcr.adapter is Adapter.full:
            yield (
                "model.quantization=nf4 dcr.adapter=full: stage one would train the blocks' own "
                "weights, which four bits cannot follow; add dcr.adapter=lora, or use method=stl"
            )
        if trainer.strategy == FSDP:
            yield "model.quantization=nf4 trainer.strategy=fsdp: choose one of them"
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
    if dcr.optim.moments is Moments.int8 and trainer.strategy == FSDP:
        yield "dcr.optim.moments=int8 trainer.strategy=fsdp: choose one of them"
    for name, node in (("dcr", dcr), ("sft", config.sft)):
        if not node.lora.targets:
            yield f"{name}.lora.targets=[]: name modules, or [all-linear]"
    for kind in ("seemingly_toxic", "toxic"):
        if not getattr(config.sft.readout, kind):
            yield f"sft.readout.{kind}=[]: name sources, or leave it out"


def _of_evaluation(config: EvalConfig) -> Iterator[str]:
    table, gen, trainer = config.table, config.gen, config.trainer
    yield from unknown("tasks", config.tasks, (*CORE_TASKS, *table.tasks))
    yield from unknown("judge", config.judge, (KEYWORD, *table.judges))
    if not config.tasks:
        yield "tasks=[]: nothing to evaluate; name at least one task"
    if not config.judge:
        yield "judge=[]: name at least one judge, such as keyword"
    if trainer.devices > 1 and trainer.accelerator == "mps":
        yield (
            f"trainer.devices={trainer.devices} trainer.accelerator=mps: there is one; leave "
            "trainer.devices out"
        )
    if config.steps is not None and not config.snapshots:
        yield f"steps={config.steps}: picks among snapshots; add snapshots=true"
    if config.steps == []:
        yield "steps=[]: name at least one step, or leave it out for all"
    if config.run is None and config.stage is not Stage.all:
        yield f"stage={config.stage.value}: is a stage of a run; add run=<folder>, or leave it out"
    if config.run is None and config.snapshots:
        yield "snapshots=true: are those of a run; add run=<folder>, or leave it out"
    if gen.max_new_tokens == AUTO_LENGTH:
        judges = [f"judge=[{judge}]" for judge in config.judge if judge != KEYWORD]
        yield from cut_short(config, *judges, cure=f"give a number of tokens, or judge=[{KEYWORD}]")
    elif type(gen.max_new_tokens) is not int:
        yield f"gen.max_new_tokens={gen.max_new_tokens}: give a number of tokens, or auto"
    if gen.prefill is not None:
        named = f"gen.prefill={gen.prefill!r}"
        yield from decoding_alone(config, named, "only answers are prefilled")
        if not gen.prefill or gen.prefill.isspace():
            yield f"{named}: nothing to begin an answer with; name words or leave it out"


def unknown(key: str, named: str | Sequence[str], known: Sequence[str]) -> Iterator[str]:
    """Names, or one name, that are neither known under this key nor the path of a user's own."""
    names = [named] if isinstance(named, str) else named
    if not all(isinstance(name, str) for name in names):
        yield f"{key}={named}: give names, as in {key}=[a,b]"
        return
    told = named if isinstance(named, str) else f"[{','.join(named)}]"
    classes = [class_of(name) for name in names]
    for name, own in zip(names, classes, strict=True):
        if name not in known and not is_path(name):
            yield f"{key}={told}: choose one of {', '.join(known)}"
        if is_path(name) and (own in known or classes.count(own) > 1):
            yield f"{key}={told}: two are called {own}; rename the class"


def cut_short(
    config: EvalConfig, *others: str, cure: str = "give a number of tokens"
) -> Iterator[str]:
    """Settings that want whole answers, or have no say in when one ends, where length is auto."""
    for other in others if config.gen.max_new_tokens == AUTO_LENGTH else ():
        yield (
            f"gen.max_new_tokens=auto {other}: answers end where XSTest's keywords have decided; "
            f"{cure}"
        )


def decoding_alone(config: EvalConfig, named: str, why: str) -> Iterator[str]:
    """Tasks that decode no answer, beside a setting of how answers are decoded."""
    for task in ("discernment", *config.table.on_weights):
        if task in config.tasks:
            yield (
                f"{named} tasks=[{task}]: {why}, and {task} decodes none; leave one of the two out"
            )


def nearest(key: str, known: Sequence[str]) -> list[str]:
    """The names most like a misspelt one; a right name in the wrong place counts as near."""
    leaf = key.split(".")[-1]
    scores: dict[str, float] = {}
    for name in known:
        whole = SequenceMatcher(None, key, name).ratio()
        scores[name] = max(whole, 0.9 * SequenceMatcher(None, leaf, name.split(".")[-1]).ratio())
    best = max(scores.values(), default=0.0)
    return sorted(k for k, v in scores.items() if v == best >= LIKENESS)[:NEAREST]


# --- Hydra's and OmegaConf's several lines as one that names key, value and cure ---

# OmegaConf's reason -> ours, with the groups of the pattern put in.
REASONS = (
    (r"Invalid value '.*', expected one of \[(.*)\]", r"choose one of \1"),
    (r"could not be converted to Float", "give a number"),
    (r"could not be converted to Integer", "give a whole number"),
    (r"is not a valid bool", "give true or false"),
    (r"is not Optional|[Mm]issing mandatory value", "it needs a value"),
    (
        r"is not a subclass of|=\s*\[[\s\S]*Cannot merge DictConfig",
        "it is a group of settings; set one of those inside",
    ),
    (r"is not a ListConfig, list or tuple|Cannot merge DictConfig", "give a list, as in key=[a,b]"),
    (r"Cannot convert .* to string", "give one text, not a list"),
    (r"Cannot assign .* to Dict", "give pairs, as in key={a:1}"),
    (
        r"no viable alternative at input '\$\{'|mismatched input|token recognition error",
        r"its ${ opens no ${name}; write \${ for the characters themselves",
    ),
    (r"Unsupported interpolation type (\S+)", r"no resolver \1; write oc.env:NAME or a key"),
    (r"'NoneType' object has no attribute", "it is null here; only a file in conf/ can give it"),
)


# A pattern anywhere in a message -> the whole line, with the groups of the pattern put in.
SAYINGS = (
    (
        r"(?:Ambiguous value for argument|Sweep parameters) '(.*)'",
        r"\1: several values; add -m to try each, or write key=[a,b] for a list",
    ),
    (r"An item is already at '(.*)'", r"+\1: exists already; leave out the +"),
    (
        r"(?:Error merging override ~|Could not delete from config\. (?:The value of )?')([\w.]+)",
        r"~\1: a setting cannot be taken away; give it a value",
    ),
    (
        r"Interpolation key '(.*)' not found\s+full_key: (\S+)",
        r"\2=${\1}: there is no such setting to take a value from",
    ),
    (
        r"Error resolving interpolation '(.*?)', possible interpolation keys: (.*)",
        r"\1: a file is chosen before settings are there; give its name",
    ),
)


def one_line(error: Exception, *schemas: type) -> str:
    """A line that says what is wrong with an override, and what to write instead."""
    texts = []
    cause: BaseException | None = error
    while cause is not None:
        texts.append(str(cause))
        cause = cause.__cause__
    whole = "\n".join(texts)
    known = [key for schema in schemas for key, _ in settings_of(schema())]
    said = _option(whole, error) or _unknown(whole, known) or _saying(whole, error) or _value(whole)
    return said or " ".join(texts[0].split()) or type(error).__name__


def _option(text: str, error: Exception) -> str | None:
    """A file that a config group does not hold."""
    if "Config group override" in text or isinstance(error, TypeError):  # a list or dict for a name
        return "model=, data=, preset= and sweep= take the name of a file in conf/"
    missing = re.search(r"Could not find '(.*?)'", text)
    options = re.search(r"Available options in '(.*)':\n((?:\t.*\n?)+)", text)
    if not missing or not options:
        return None
    group, names = options[1], ", ".join(options[2].split())
    message = f"{group}={missing[1].removeprefix(f'{group}/')}: choose one of {names}"
    return message + ("; any other: model.name=<folder or hub id>" if group == "model" else "")


def _unknown(text: str, known: list[str]) -> str | None:
    """A key that does not exist."""
    key = re.search(r"Could not override '(.+?)'", text)
    if not key and re.search(r"Key '.*' (is )?not in ", text):
        key = re.search(r"full_key: (\S+)", text)
    if not key:
        return None
    near = nearest(key[1], known)
    hint = f"did you mean {' or '.join(near)}?" if near else "--cfg job lists what there is"
    return f"{key[1]}: no such setting; {hint}"


def _saying(text: str, error: Exception) -> str | None:
    """An override that cannot be read, or not in this place."""
    unread = getattr(error, "override", None)
    if unread is not None:
        return f"{unread}: cannot be read; settings are written key=value"
    matches = ((re.search(pattern, text), saying) for pattern, saying in SAYINGS)
    return next((match.expand(saying) for match, saying in matches if match), None)


def _value(text: str) -> str | None:
    """A value that its key does not take."""
    key = re.search(r"full_key: (\S*)", text)
    if not key:
        return None
    what = key[1]
    if written := re.search(r"Error merging override \+*(.*)", text):
        what = written[1]
    elif given := re.search(r"\b[Vv]alue '(.*?)'", text):
        what = f"{key[1]}={given[1]}"
    for pattern, cure in REASONS:
        if reason := re.search(pattern, text):
            return f"{what}: {reason.expand(cure)}"
    reason = next(line for line in text.splitlines() if not line.startswith("Error merging"))
    return f"{what}: {reason}"
