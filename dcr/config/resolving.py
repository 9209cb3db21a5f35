"""From what Hydra composed to plain dataclasses, once."""

import json
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dcr.config.checks import check
from dcr.config.enums import Method
from dcr.config.errors import ConfigError, DataError
from dcr.config.evaluation import EvalConfig
from dcr.config.tree import (
    ContrastiveConfig,
    DataConfig,
    ModelConfig,
    SFTConfig,
    SourceConfig,
    TrainConfig,
)
from dcr.config.wording import one_line
from dcr.text import label_of

log = logging.getLogger(__name__)

Node = TypeVar("Node", TrainConfig, EvalConfig)
# Say which weights a name means, and so travel with it to another model.
WITH_ANY_NAME = ("name", "revision", "trust_remote_code")
# What makes two models one architecture, as `config.json` spells it.
SHAPE = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")

# What later commands read of a run's `config.yaml`, and of its nodes if not all.
READ_AGAIN: dict[str, tuple[type, tuple[str, ...]]] = {
    "model": (ModelConfig, ()),
    "data": (DataConfig, ()),
    "dcr": (ContrastiveConfig, ("layer", "depth", "layer_base")),
    "sft": (SFTConfig, ("precision",)),
}


def resolve(composed: DictConfig, schema: type[Node]) -> Node:
    """The composed configuration as dataclasses to read only, checked as far as it can be alone.

    Raises ConfigError for an unknown key, a wrong type, a value outside its range and settings
    that contradict each other.
    """
    node = OmegaConf.create(OmegaConf.to_container(composed, resolve=False))
    assert isinstance(node, DictConfig)
    if schema is EvalConfig:
        node.data = named(node.data)
    default = OmegaConf.to_container(OmegaConf.structured(schema), resolve=False)
    for key in _without_value(OmegaConf.to_container(node, resolve=False), default):
        # a merge would keep the default and say nothing
        raise ConfigError(f"{key}=???: it needs a value")
    try:
        leave_numbers_of_another_model(node)
        merged = OmegaConf.merge(OmegaConf.structured(schema), node)
        OmegaConf.resolve(merged)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(one_line(error, schema)) from error
    assert isinstance(config, schema)
    for name, source in _sources(config.data):
        # only training needs every one of them
        if isinstance(config, TrainConfig) or source.source != MISSING:
            source.source = source_names(source.source, f"data.{name}.source")
    if isinstance(config, TrainConfig):
        config.dcr.layer = _layer(config.dcr.layer)
    check(config)
    return config


def named(data: DictConfig) -> Any:
    """What a command or a data file sets of an evaluation's data; all else is left as missing."""
    return _named(OmegaConf.to_container(data, resolve=False))


def _named(node: Any) -> Any:
    if not isinstance(node, dict):
        return node
    return {key: _named(value) for key, value in node.items() if value != MISSING}


def _without_value(given: Any, default: Any, prefix: str = "") -> Iterator[str]:
    """Settings that were given as missing although they have a default."""
    if given == MISSING and default != MISSING:
        yield prefix
    elif isinstance(given, dict) and isinstance(default, dict):
        for key, value in given.items():
            yield from _without_value(value, default.get(key), f"{prefix}.{key}".lstrip("."))


def _layer(value: object) -> object:
    """A block's number, which a node of no one type does not turn into a number by itself."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else value


def model_of(made_with: Mapping[str, Any]) -> ModelConfig:
    """The model node of a run's own `config.yaml`."""
    merged = OmegaConf.merge(OmegaConf.structured(ModelConfig), dict(made_with["model"]))
    model = OmegaConf.to_object(merged)
    assert isinstance(model, ModelConfig)
    return model


def check_made_with(made_with: Mapping[str, Any], before: str, after: str) -> None:
    """Raises DataError where what is read again of a run's `config.yaml` is none of our settings.

    `before` and `after` stand around what is wrong: the file, the cure.
    """
    trained = made_with.get("method") in Method.__members__
    for name, (schema, keys) in READ_AGAIN.items():
        if trained and name not in made_with:
            raise DataError(f"{before}{name}: missing{after}")
        try:
            node = made_with.get(name, {})
            if keys:  # a run of another version may have been trained with others, since gone
                node = {key: node[key] for key in keys if key in node}
            OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema), node))
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            raise DataError(f"{before}{name}: {one_line(error)}{after}") from error


def source_names(value: object, key: str) -> list[str]:
    """`name` and `[name, name]` alike as a list of names; ConfigError for anything else."""
    names = [value] if isinstance(value, str) else value
    if isinstance(names, (list, ListConfig)) and names and all(isinstance(n, str) for n in names):
        return [str(name) for name in names]
    raise ConfigError(f"{key}={value}: give a source's name, a JSONL path, or a list of them")


def _sources(data: DataConfig) -> list[tuple[str, SourceConfig]]:
    return [
        (kind, getattr(data, kind)) for kind in ("seemingly_toxic", "toxic", "safety", "normal")
    ]


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
    kept: dict[str, Any] = {key: model[key] for key in (*WITH_ANY_NAME, *keep) if key in model}
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
        found = {key: (read.get("text_config") or read).get(key) for key in SHAPE}
    except (OSError, ValueError, AttributeError, RecursionError):
        return "no folder with a config.json to compare"
    for key in SHAPE:
        wanted = (model.get("architecture") or {}).get(key)
        if wanted is None or found[key] != wanted:
            return f"its {key} is {found[key]}, not {wanted}"
    return None
