"""Loads a user's own part by its dotted path, and makes it with the user's settings."""

import dataclasses
import functools
import importlib
import os
import sys
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from dcr.core import extending, sources
from dcr.core.config import ConfigError, DataError, Kind, UserError, class_of
from dcr.core.extending import sha256
from dcr.core.sources import Example

Part = TypeVar("Part")
CURES = {  # by the beginning of pydantic's name for a wrong type
    "int": "give a whole number",
    "float": "give a number",
    "bool": "give true or false",
    "string": "give one text",
    "list": "give a list, as in key=[a,b]",
    "dict": "give pairs, as in key={a:1}",
}


class Named(str):
    """A `config.OwnPath`. `settings` are the fields of the part's class that the user set."""

    settings: Mapping[str, Any]

    def made(self, base: type[Part], key: str) -> Part:
        return with_settings(load(self, base, key), self.settings)


@functools.cache  # what is hashed is what was imported, though the file may change meanwhile
def load(path: str, base: type[Part], key: str = "") -> type[Part]:
    """The class that `module:Class` names. ConfigError unless it is a dataclass below `base`."""
    module_name, _, name = path.partition(":")
    told, here = f"{key}={path}".lstrip("="), os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last: a file there stands in for no library's module
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        absent = getattr(error, "name", "") if isinstance(error, ModuleNotFoundError) else ""
        if absent and f"{module_name}.".startswith(f"{absent}."):
            raise ConfigError(f"{told}: no module {absent} in {here} or the environment") from error
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"{told}: {module_name} cannot be imported ({why})") from error
    own = getattr(module, name, None)
    needed = f"{base.__module__}.{base.__qualname__}"
    if own is None:
        known = [
            n for n, of in vars(module).items() if isinstance(of, type) and issubclass(of, base)
        ]
        offer = ", ".join(n for n in known if n != base.__name__) or f"no subclass of {needed}"
        raise ConfigError(f"{told}: {module_name} has no {name}; it has {offer}")
    if not (isinstance(own, type) and issubclass(own, base) and dataclasses.is_dataclass(own)):
        raise ConfigError(f"{told}: {name} must be a dataclass that subclasses {needed}")
    if lacking := sorted(getattr(own, "__abstractmethods__", ())):
        raise ConfigError(f"{told}: {name} must define {', '.join(lacking)}")
    sha256(own)
    return own


def with_settings(own: type[Part], given: Mapping[str, Any]) -> Part:
    """An instance. ConfigError for settings that the class does not have, take or lack."""
    known = [field.name for field in dataclasses.fields(own)]  # pyright: ignore[reportArgumentType]
    for field in given:
        if field not in known:
            near = get_close_matches(field, known, n=1)
            offer = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
            raise ConfigError(f"own.{own.__name__}.{field}: no such setting; {offer}")
    try:
        return TypeAdapter(own).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        named, *within = map(str, first["loc"] or ("",))  # none: the class refused them together
        key = f"own.{own.__name__}.{named}".rstrip(".")
        if first["type"] == "missing":
            raise ConfigError(f"{key}: it needs a value") from error
        value = f"={given[named]}" if named in given else ""
        place = "".join(f" ({each})" for each in within)
        cure = CURES.get(first["type"].split("_")[0]) or first["msg"].removeprefix("Value error, ")
        raise ConfigError(f"{key}{value}{place}: {cure}") from error
    except Exception as error:  # of a type that no setting has, or raised by the class
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise ConfigError(f"own.{own.__name__}: cannot be made ({why}); mend the class") from error


def own_rows(path: str, kind: Kind, pairs: bool) -> list[Example]:
    """The rows of a user's own class, checked as those of a file. Its faults are DataErrors."""
    source = extending.made(path, sources.Rows)
    try:
        given = list(enumerate(source.rows(kind), 1))
    except UserError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise DataError(f"{path}: {kind.value} rows cannot be read ({why})") from error
    for number, row in given:
        if not isinstance(row, Mapping):
            raise DataError(f"{path}:{number}: a {type(row).__name__}, not a row with a prompt")
    if not given:
        raise DataError(f"{path}: gives no {kind.value} rows")
    return sources.of_user(given, path, class_of(path), kind, pairs)
