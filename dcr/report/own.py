"""A user's own figures and tables: `--figure my_lab.figures:Scatter own.Scatter.size=3`."""

import dataclasses
import functools
import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dcr.core.config import ConfigError
from dcr.core.text import single_line
from dcr.report.sections import (
    FIGURE_ENDINGS,
    SECTIONS,
    TABLE_ENDINGS,
    Figure,
    Section,
    Selection,
    Table,
)


def sections(
    tables: Sequence[str], figures: Sequence[str], settings: Sequence[str]
) -> dict[str, Section]:
    """The sections of these paths, `module:Class`, by class name.

    `settings` are words `own.<Class>.<field>=value`. Raises ConfigError for a path that names no
    such class, and for settings that the class does not have or take.
    """
    given: dict[str, dict[str, str]] = {}
    for word in settings:
        key, _, value = word.removeprefix("own.").partition("=")
        name, _, field = key.partition(".")
        given.setdefault(name, {})[field] = value
    made = {}
    for option, base, paths, endings in (
        ("table", Table, tables, TABLE_ENDINGS),
        ("figure", Figure, figures, FIGURE_ENDINGS),
    ):
        for path in paths:
            own = load(path, base, option)
            if own.__name__ in {*SECTIONS, *made}:
                raise ConfigError(f"{option}={path}: a section {own.__name__} is there; rename it")
            instance = _with_settings(own, given.pop(own.__name__, {}))
            file = Path(inspect.getsourcefile(own) or "")
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            make = functools.partial(_made, instance, f"{path}, source sha256 {digest}")
            made[own.__name__] = Section("", make, "", (), option, endings)
    for name in given:
        raise ConfigError(f"own.{name}: no class of this name is asked for by --figure or --table")
    return made


def load(path: str, base: type, key: str) -> type:
    """The class that `module:Class` names. ConfigError unless it is a dataclass below `base`."""
    module_name, _, name = path.partition(":")
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        where = f"{os.getcwd()} or the environment"
        raise ConfigError(f"{key}={path}: no module {error.name} in {where}") from error
    except Exception as error:
        why = f"{type(error).__name__}: {single_line(error)}"
        raise ConfigError(f"{key}={path}: {module_name} cannot be imported ({why})") from error
    own = getattr(module, name, None)
    needed = f"{base.__module__}.{base.__qualname__}"
    if own is None:
        known = [
            n for n, of in vars(module).items() if isinstance(of, type) and issubclass(of, base)
        ]
        offer = ", ".join(n for n in known if n != base.__name__) or f"no subclass of {needed}"
        raise ConfigError(f"{key}={path}: {module_name} has no {name}; it has {offer}")
    if not (isinstance(own, type) and issubclass(own, base) and dataclasses.is_dataclass(own)):
        raise ConfigError(f"{key}={path}: {name} must be a dataclass that subclasses {needed}")
    return own


def _with_settings(own: type, given: Mapping[str, str]) -> Any:
    known = [field.name for field in dataclasses.fields(own)]
    for field in given:
        if field not in known:
            offer = ", ".join(known) or "none"
            raise ConfigError(f"own.{own.__name__}.{field}: no such setting; it has {offer}")
    try:
        return TypeAdapter(own).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        value = "" if first["type"] == "missing" else f"={given.get(place, '')}"
        raise ConfigError(f"own.{own.__name__}.{place}{value}: {first['msg']}") from error


def _made(instance: Any, origin: str, chosen: Selection) -> Any:
    """The figure or table that an instance makes, with its origin on the page and in its files."""
    import pandas as pd

    from dcr.report.figures import Drawing
    from dcr.report.writing import TextTable

    name = type(instance).__name__
    if isinstance(instance, Figure):
        drawing = instance.draw(chosen)
        if not isinstance(drawing, Drawing):
            raise ConfigError(f"{name}.draw gives a {type(drawing).__name__}, not a Drawing")
        caption = " ".join(filter(None, (drawing.caption, f"({origin})")))
        return dataclasses.replace(drawing, name=name, caption=caption, origin=origin)
    frame = instance.frame(chosen)
    if not isinstance(frame, pd.DataFrame):
        raise ConfigError(f"{name}.frame gives a {type(frame).__name__}, not a pandas.DataFrame")
    title = (inspect.getdoc(type(instance)) or name).splitlines()[0]
    return TextTable(title, frame, [f"Made by {origin}."])
