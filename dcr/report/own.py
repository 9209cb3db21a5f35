"""A user's own figures and tables: `--figure my_lab.figures:Scatter own.Scatter.size=3`."""

import dataclasses
import functools
import inspect
from collections.abc import Sequence
from typing import Any

from dcr import own as loading
from dcr.core.config import ConfigError
from dcr.core.extending import sha256
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
    """The sections of those names that are paths, `module:Class`, by class name.

    `settings` are words `own.<Class>.<field>=value`. Raises ConfigError for a path that names no
    such class, and for settings that the class does not have or refuses.
    """
    given: dict[str, dict[str, str]] = {}
    for word in settings:
        key, _, value = word.removeprefix("own.").partition("=")
        name, _, field = key.partition(".")
        given.setdefault(name, {})[field] = value
    made = {}
    for option, base, names, endings in (
        ("table", Table, tables, TABLE_ENDINGS),
        ("figure", Figure, figures, FIGURE_ENDINGS),
    ):
        for path in (name for name in names if ":" in name):
            own: type = loading.load(path, base, option)
            if own.__name__ in {*SECTIONS, *made}:
                raise ConfigError(f"{option}={path}: a section {own.__name__} is there; rename it")
            instance = loading.with_settings(own, given.pop(own.__name__, {}))
            origin = f"{path}, source sha256 {sha256(own)}"
            make = functools.partial(_made, instance, origin)
            made[own.__name__] = Section(make, (), option, endings)
    for name in given:
        raise ConfigError(f"own.{name}: no class of this name is asked for by --figure or --table")
    return made


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
        title = drawing.title or name
        return dataclasses.replace(drawing, name=name, title=title, caption=caption, origin=origin)
    frame = instance.frame(chosen)
    if not isinstance(frame, pd.DataFrame):
        raise ConfigError(f"{name}.frame gives a {type(frame).__name__}, not a pandas.DataFrame")
    title = (inspect.getdoc(type(instance)) or name).splitlines()[0]
    return TextTable(title, frame, [f"Made by {origin}."])
