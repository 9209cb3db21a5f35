"""From what Hydra composed to plain dataclasses, once."""

import re
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dcr.config.checks import check
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

Node = TypeVar("Node", TrainConfig, EvalConfig)
# Say which weights a name means, and so travel with it to another model.
WITH_ANY_NAME = ("name", "revision", "trust_remote_code")

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
    for name, (schema, keys) in READ_AGAIN.items():
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

    `keep` names the fields that the user set for this one. Changes `config`; once is enough.
    """
    model = config.model
    if not names_another_model(model):
        return
    kept: dict[str, Any] = {key: model[key] for key in (*WITH_ANY_NAME, *keep) if key in model}
    label = kept.get("label") or label_of(str(kept["name"]))
    config.model = OmegaConf.structured(ModelConfig(**{**kept, "label": label}))
