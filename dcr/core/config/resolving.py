"""From what Hydra composed to plain dataclasses, once; what it refuses in one line."""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from difflib import SequenceMatcher
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dcr.core.config.checks import ConfigError, DataError, check, settings_of
from dcr.core.config.schema import (
    ContrastiveConfig,
    DataConfig,
    Method,
    ModelConfig,
    Precision,
    Settings,
    SFTConfig,
    SourceConfig,
    TrainConfig,
)
from dcr.core.text import label_of

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[2]
# within an installed package; beside it in a checkout
CONF = next(p / "conf" for p in (PACKAGE, PACKAGE.parent) if (p / "conf" / "train.yaml").is_file())

Node = TypeVar("Node", bound=Settings)
# Say which weights a name means, and so travel with it to another model.
WITH_ANY_NAME = ("name", "revision", "trust_remote_code")
# What makes two models one architecture, as `config.json` spells it.
SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")

# What later commands read of a run's `config.yaml`, and of its nodes if not all.
READ_AGAIN: dict[str, tuple[type, tuple[str, ...]]] = {
    "model": (ModelConfig, ()),
    "data": (DataConfig, ()),
    "dcr": (ContrastiveConfig, ("layer", "depth", "precision")),
    "sft": (SFTConfig, ("precision",)),
}


def resolve(composed: DictConfig, schema: type[Node]) -> Node:
    """The composed configuration as dataclasses to read only, checked as far as it can be alone.

    Raises ConfigError for an unknown key, a wrong type, a value outside its range and settings
    that contradict each other.
    """
    node = OmegaConf.create(OmegaConf.to_container(composed, resolve=False))
    assert isinstance(node, DictConfig)
    if not issubclass(schema, TrainConfig):
        node.data = named(node.data)  # its leaves start as missing: see `cli.prepare`
    default = OmegaConf.to_container(OmegaConf.structured(schema), resolve=False)
    for key in _without_value(OmegaConf.to_container(node, resolve=False), default):
        # a merge would keep the default and say nothing
        raise ConfigError(f"{key}=???: it needs a value")
    try:
        leave_numbers_of_another_model(node)
        merged = OmegaConf.merge(OmegaConf.structured(schema), node)
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
    return config


def named(data: DictConfig) -> Any:
    """What a command or a data file sets of an evaluation's data; all else is left as missing."""

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


def model_of(made_with: Mapping[str, Any], trust_remote_code: bool) -> ModelConfig:
    """The model node of a run's own `config.yaml`, trusted as far as this command's user said."""
    named = literal(made_with["model"])
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), named))
    assert isinstance(model, ModelConfig)
    return replace(model, trust_remote_code=trust_remote_code)


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


def plain(config: Any) -> Any:
    """A dataclass tree as plain YAML values; text stays as it is, `${` refers to nothing there."""
    if isinstance(config, Enum):
        return config.name
    if is_dataclass(config):
        return {entry.name: plain(getattr(config, entry.name)) for entry in fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    return [plain(value) for value in config] if isinstance(config, list) else config


def check_made_with(made_with: Mapping[str, Any], before: str, after: str) -> None:
    """Raises DataError where what is read again of a run's `config.yaml` is none of our settings.

    `before` and `after` stand around what is wrong: the file, the cure.
    """
    own = str(made_with.get("precision", Precision.auto.value))
    if own not in Precision.__members__:
        raise DataError(
            f"{before}precision={own}: none of {', '.join(Precision.__members__)}{after}"
        )
    trained = made_with.get("method") in Method.__members__
    for name, (schema, keys) in READ_AGAIN.items():
        if trained and name not in made_with:
            raise DataError(f"{before}{name}: missing{after}")
        try:
            node = made_with.get(name, {})
            if keys:
                node = {key: node[key] for key in keys if key in node}
            merged: Any = OmegaConf.merge(OmegaConf.structured(schema), literal(node))
            for key in node:  # what our own defaults refer to is not there
                if OmegaConf.is_config(value := merged[key]):  # a leaf is resolved by now
                    OmegaConf.to_container(value, resolve=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise DataError(f"{before}{name}: {one_line(error)}{after}") from error


def source_names(value: object, key: str) -> list[str]:
    """`name` and `[name, name]` alike as a list of names; ConfigError for anything else."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, (list, ListConfig)) and names and all(isinstance(n, str) for n in names):
        return [str(name) for name in names]
    raise ConfigError(f"{key}={value}: give a source's name, a JSONL path, or a list of them")


def names_another_model(model: DictConfig) -> bool:
    """Whether `model.name` is another model's than the one the other numbers were set for."""
    return model.get("numbers_for") not in (None, model.get("name"))


def leave_numbers_of_another_model(config: DictConfig, keep: Collection[str] = ()) -> None:
    """Put defaults in `config.model` where a file set them for another model than the one named.

    A local folder of the same architecture keeps them all: it is a copy, or trained from one. What
    is left behind is logged in one line. `keep` names the fields that the user set for this model.
    Changes `config`; once is enough.
    """
    model = config.model
    if not names_another_model(model):
        return
    name = str(model.name)
    written: Any = OmegaConf.to_container(model, resolve=False)  # as text that is resolved once
    kept: dict[str, Any] = {key: written[key] for key in (*WITH_ANY_NAME, *keep) if key in model}
    label = kept.get("label") or label_of(name)
    unlike = _unlike(model, name)
    if unlike is None:
        model.numbers_for, model.label = name, label
        if "architecture" not in keep:
            model.architecture = None  # the folder's own says more, such as its context
        return
    plain = ModelConfig(name=name)
    left = [
        f"{key}={getattr(value, 'value', value)}"
        for key, value in model.items()
        if key not in {*kept, "label", "numbers_for", "architecture"}
        and value != getattr(plain, str(key))
    ]
    if left:
        log.warning(
            "model.name=%s: %s, so what was set for %s is left behind: %s (model.<key>= sets one)",
            name,
            unlike,
            model.numbers_for,
            " ".join(left),
        )
    config.model = OmegaConf.structured(ModelConfig(**{**kept, "label": label}))


def _unlike(model: DictConfig, name: str) -> str | None:
    """In what the folder `name` is another architecture than the model's; None if in nothing."""
    try:
        read = json.loads((Path(name) / "config.json").read_text(encoding="utf-8"))
        shape = {key: (read.get("text_config") or read).get(key) for key in SHAPE}
    except (OSError, ValueError, AttributeError, RecursionError):
        return "no folder with a config.json to compare"
    for key in SHAPE:
        wanted = (model.get("architecture") or {}).get(key)
        if wanted is None or shape[key] != wanted:
            return f"its {key} is {shape[key]}, not {wanted}"
    return None


# --- Hydra's and OmegaConf's several lines as one that names key, value and cure ---

LIKENESS = 0.6  # below it, the nearest name is no help
NEAREST = 3  # names to offer when they are equally near

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


# What stands anywhere in a message -> all there is to say.
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
    """What is wrong with an override, and what to write instead."""
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


def nearest(key: str, known: list[str]) -> list[str]:
    """The names most like a misspelt one; a right name in the wrong place counts as near."""
    leaf = key.split(".")[-1]
    scores: dict[str, float] = {}
    for name in known:
        whole = SequenceMatcher(None, key, name).ratio()
        scores[name] = max(whole, 0.9 * SequenceMatcher(None, leaf, name.split(".")[-1]).ratio())
    best = max(scores.values(), default=0.0)
    return sorted(k for k, v in scores.items() if v == best >= LIKENESS)[:NEAREST]
