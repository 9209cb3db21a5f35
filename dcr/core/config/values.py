"""Errors that a user can mend, paths of a user's own parts, and settings as plain values."""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dcr.core.config.schema import (
    AUTO_LAYER,
    ContrastiveConfig,
    DataConfig,
    Method,
    ModelConfig,
    Precision,
    SFTConfig,
)

OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # a user's own, package.module:Class
FSDP = "fsdp"  # weights split over the devices
TAG = 64  # characters of a tag that W&B takes


class UserError(Exception):
    """An error that the user can mend: commands print it as one line and exit with its code."""

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


class OwnPath(str):
    """The path of a user's own part where the user's command or YAML names it.

    A run's `config.yaml` holds the same text as a plain str, which imports nothing. `settings` are
    the fields of the part's class that the user set.
    """

    settings: Mapping[str, Any]


def is_path(name: str) -> bool:
    """Whether a name is the path of a user's own part, `package.module:Class`."""
    return OWN.fullmatch(name) is not None


def class_of(name: str) -> str:
    """The class that a path names; any other name as it is."""
    return name.rpartition(":")[2] if is_path(name) else name


# Later commands read these nodes of a run's `config.yaml`: these keys of them, or all.
READ_AGAIN: dict[str, tuple[type, tuple[str, ...]]] = {
    "model": (ModelConfig, ()),
    "data": (DataConfig, ()),
    "dcr": (ContrastiveConfig, ("layer", "depth", "precision")),
    "sft": (SFTConfig, ("precision",)),
}


def plain(config: Any) -> Any:
    """A dataclass tree as plain YAML values; text stays as it is, `${` refers to nothing there."""
    if isinstance(config, Enum):
        return config.name
    if is_dataclass(config):
        return {entry.name: plain(getattr(config, entry.name)) for entry in fields(config)}
    if isinstance(config, Mapping):
        return {str(key): plain(value) for key, value in config.items()}
    if isinstance(config, list):
        return [plain(value) for value in config]
    return str(config) if isinstance(config, str) else config  # also an OwnPath


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


def check_made_with(made_with: Mapping[str, Any], before: str, after: str) -> None:
    """Raises DataError where a run's `config.yaml` has other nodes than ours for later commands.

    `before` and `after`, the file and the cure, stand around the fault.
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
            why = getattr(error, "msg", None) or str(error)
            key = getattr(error, "full_key", None) or name
            raise DataError(f"{before}{name}: {key}: {why.splitlines()[0]}{after}") from error
