"""The options of every `python -m dcr.<command>`: a dataclass of `option`s, read by OmegaConf.

`command` makes a function of such options a command. Its errors end as those of `train.py` do: one
line on stderr and exit code 2. The same dataclass gives the text of `--help`.

OmegaConf's dotlist and Hydra's parser of overrides read `a: 1`, `{b}` or `[c` as YAML or grammar,
and know no words without a key; here a path and a setting for another script stay as written.
"""

import functools
import inspect
import io
import logging
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich import box
from rich.console import Console
from rich.table import Column, Table

from dcr import resolving
from dcr.core.config import ConfigError, UserError
from dcr.ending import faults_in_words, quieten, safe_output, single_line, stopped_by

COLUMNS = 100  # of commands' output
KINDS = {bool: "true/false", int: "integer", float: "number", str: "text", Path: "path"}
LOG_LINE = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"  # the format of Hydra's scripts
SPELLINGS = "Options are written key=value, --key=value or --key value."

Options = TypeVar("Options")


def option(
    meaning: str,
    default: Any = MISSING,
    *,
    choices: Sequence[str] = (),
    least: float | None = None,
    most: float | None = None,
    rest: bool = False,
    key: str = "",
) -> Any:
    """A field of a command's options, with its text for `--help` and errors.

    An option without a default must be given. A list is given by repeating the option; with `rest`
    it takes every word that is no option, such as settings of `train.py`. A `key` with dots, as
    `eval.py` spells the same setting, replaces the field's name.
    """
    metadata = {"meaning": meaning, "choices": choices, "least": least, "most": most, "rest": rest}
    metadata["key"] = key
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def settings_of(scripts: str) -> Any:
    """The option that takes every other word, as a setting of these scripts."""
    return option(f"any setting of {scripts}; python train.py --cfg job lists them", [], rest=True)


def command(
    schema: type[Options], goes_on: bool = False
) -> Callable[[Callable[[Options], None]], Callable[[Sequence[str]], int]]:
    """Makes a function of options a command: it takes the words behind its name to an exit code.

    `goes_on` says whether the command continues its work after it was stopped.
    """

    def decorate(main: Callable[[Options], None]) -> Callable[[Sequence[str]], int]:
        @functools.wraps(main)
        def call(arguments: Sequence[str]) -> int:
            if {"-h", "--help"} & set(arguments):
                with safe_output():
                    print(help_of(schema))
                return 0
            logging.basicConfig(format=LOG_LINE)
            quieten()
            try:
                with safe_output(), stopped_by(goes_on), faults_in_words():
                    main(parse(schema, arguments))
            except UserError as error:
                print(f"error: {single_line(error)}", file=sys.stderr)
                return error.exit_code
            return 0

        return call

    return decorate


def parse(schema: type[Options], arguments: Sequence[str]) -> Options:
    """The options from `key=value`, `--key=value`, `--key value`, or `--key` for a yes.

    Values stay as they are written, so that no path is read as YAML. Raises ConfigError for an
    unknown key, a wrong type, a value outside its range and a missing value.
    """
    known = _entries(schema)
    rest = next((name for name, entry in known.items() if entry.metadata["rest"]), None)
    node, words = OmegaConf.structured(schema), iter(arguments)
    many: dict[str, list[str]] = {entry.name: [] for entry in known.values() if _is_list(entry)}
    try:
        for word in words:
            key, equals, value = word.removeprefix("--").partition("=")
            if key in known and key != rest and (equals or word.startswith("--")):
                if not equals:
                    value = "true" if known[key].type is bool else next(words, "")
                _check_word(key, value, known[key].metadata["choices"])
            elif rest is None or word.startswith("-"):
                near, names = resolving.nearest(key, list(known)), [n for n in known if n != rest]
                offer = f"did you mean {' or '.join(near)}?" if near else f"give {', '.join(names)}"
                raise ConfigError(f"{word}: no such setting; {offer}")
            else:
                key, value = rest, word
            name, plain = known[key].name, value.replace("${", r"\${")  # no interpolation either
            if _kind(known[key]) is Path and not Path(plain).name:
                plain = str(Path(plain).absolute())  # "." has no name to put another beside
            if name in many:
                many[name].append(plain)
                node[name] = many[name]
            else:
                node[name] = plain
                _check_range(known[key], node[name])
        for key, entry in known.items():
            if OmegaConf.is_missing(node, entry.name):
                raise ConfigError(f"{key}: nothing given; it is {entry.metadata['meaning']}")
        return OmegaConf.to_object(node)  # pyright: ignore[reportReturnType]
    except OmegaConfBaseException as error:
        raise ConfigError(resolving.one_line(error, schema)) from error


def _entries(schema: type) -> dict[str, Field[Any]]:
    return {entry.metadata["key"] or entry.name: entry for entry in fields(schema)}


def _kind(entry: Field[Any]) -> Any:
    return (get_args(entry.type) or (entry.type,))[0]


def _is_list(entry: Field[Any]) -> bool:
    return get_origin(entry.type) is list


def _check_word(key: str, value: str, choices: Sequence[str]) -> None:
    if choices and value not in choices:
        raise ConfigError(f"{key}={value}: choose one of {', '.join(choices)}")
    if not value:
        raise ConfigError(f"{key}=: it needs a value, or leave it out")


def _check_range(entry: Field[Any], value: Any) -> None:
    least, most = entry.metadata["least"], entry.metadata["most"]
    if least is not None and not least <= value <= (math.inf if most is None else most):
        key = entry.metadata["key"] or entry.name
        raise ConfigError(f"{key}={value}: give {_range(least, most)}")


def _range(least: float, most: float | None) -> str:
    return f"{least:g} or more" if most is None else f"{least:g} to {most:g}"


def help_of(schema: type) -> str:
    """The command's purpose, and each option with type, default and meaning, 100 columns wide."""
    table = Table("option", "type", "default", Column("meaning", overflow="fold"), box=None)
    for name, entry in _entries(schema).items():
        metadata = entry.metadata
        kind = KINDS[_kind(entry)]
        if metadata["least"] is not None:
            kind += f", {_range(metadata['least'], metadata['most'])}"
        plain = "none" if _is_list(entry) else str(entry.default)
        default = {MISSING: "needed", "None": "none", "False": "false", "True": "true"}.get(
            plain, plain
        )
        choices = f"; one of {', '.join(metadata['choices'])}" if metadata["choices"] else ""
        shown = f"<{name}> ..." if metadata["rest"] else f"{name}="
        table.add_row(shown, kind, default, f"{metadata['meaning']}{choices}")
    return f"{inspect.getdoc(schema)}\n\n{plain_text(table)}\n\n{SPELLINGS}"


def console(width: int = COLUMNS) -> Console:
    """A console without colour that prints into a text, which `printed` gives."""
    return Console(
        width=width, file=io.StringIO(), color_system=None, force_terminal=False, markup=False,
        emoji=False, highlight=False,
    )  # fmt: skip


def printed(console: Console) -> str:
    """Its text without blanks at line ends."""
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines())


def plain_text(*parts: str | Table) -> str:
    """The parts as a command prints them, one below the other."""
    shown = console()
    for part in parts:
        shown.print(part)
    return printed(shown)


def table(title: str, heads: Sequence[str], names: int = 1) -> Table:
    """A table whose columns behind the first `names` hold numbers."""
    columns = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, head in enumerate(heads):
        columns.add_column(head, justify="left" if place < names else "right", overflow="fold")
    return columns
