"""What the command line of a report asks for."""

import math
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcr.config import UserError
from dcr.report import claims_shown, markup
from dcr.report.paper import TABLES
from dcr.report.paper_figures import FIGURES, OPERATING, Wanted
from dcr.report.printed import ENDINGS, file_name
from dcr.report.printing import printable

USAGE = (
    "usage: python -m dcr.report <run folders> [--table NAME ...] [--figure NAME ...] "
    "[--claims] [out=<file.html>] [margin=<points>] [data=<label>]"
)
SETTINGS = ("out", "margin", "data")
CLAIMS = "--claims"


@dataclass(frozen=True)
class Command:
    """Folders to read, the page to write, and the tables, figures and claims beside it."""

    folders: list[Path]
    out: Path
    tables: tuple[str, ...]
    figures: Wanted
    claims: bool = False

    @property
    def files(self) -> dict[str, list[Path]]:
        """The files beside the page, by table or figure."""
        claims = {"claims": [self.out.parent / claims_shown.FILE]} if self.claims else {}
        return claims | {
            name: [self.out.parent / f"{name}.{ending}" for ending in endings]
            for names, endings in (
                (self.tables, markup.WRITERS),
                (map(file_name, self.figures.names), ENDINGS),
            )
            for name in names
        }


def parsed(arguments: Sequence[str]) -> Command:
    """The command. UserError for what it cannot be, with the choices there are."""
    for argument in arguments:
        _check_path(argument)
    left, tables = _named(arguments, "--table", TABLES)
    left, names = _named(left, "--figure", FIGURES)
    folders, settings = [], {}
    for argument in left:
        key, equals, value = argument.partition("=")
        if argument == CLAIMS:
            continue
        if equals and key in SETTINGS:
            settings[key] = value
        elif equals and not Path(argument).exists():  # a sweep's folders may hold an equals sign
            raise UserError(f"{argument}: neither a folder nor a setting; {USAGE}")
        else:
            folders.append(Path(argument))
    if not folders:
        raise UserError(f"no run folder given; {USAGE}")
    out = Path(settings["out"]) if "out" in settings else None
    if out is not None and (out.is_dir() or not out.name):
        raise UserError(f"out={out}: name a file, such as out=report.html")
    parent = os.path.commonpath([folder.resolve().parent for folder in folders])
    out = out or Path(os.path.relpath(parent)) / "report.html"
    command = Command(folders, out, tables, _wanted(names, settings), CLAIMS in left)
    flags = {**dict.fromkeys(tables, "--table"), **{file_name(n): "--figure" for n in names}}
    flags["claims"] = CLAIMS
    for name, files in command.files.items():
        if out in files:
            raise UserError(f"out={out}: {flags[name]} writes a file of this name; name another")
    return command


def _check_path(argument: str) -> None:
    """Raises UserError for what no path can be."""
    try:
        for part in (argument, argument.partition("=")[2]):
            os.lstat(part or ".")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except (OSError, ValueError) as error:
        named = printable(f"{argument[:60]}…" if len(argument) > 60 else argument)
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{named}: cannot be a path ({told})") from error


def _named(
    arguments: Sequence[str], flag: str, choices: Collection[str]
) -> tuple[list[str], tuple[str, ...]]:
    """Everything but the named tables or figures asked for, and their names, each once."""
    others, wanted = [], []
    left = iter(arguments)
    for argument in left:
        given, equals, name = argument.partition("=")
        if given != flag:
            others.append(argument)
            continue
        name = name if equals else next(left, "")
        if name not in choices:
            what = flag.removeprefix("--")
            raise UserError(f"{flag} {name}: no such {what}; choose from {', '.join(choices)}")
        wanted.append(name)
    return others, tuple(dict.fromkeys(wanted))


def _wanted(names: tuple[str, ...], settings: dict[str, str]) -> Wanted:
    for key in ("margin", "data"):
        if key in settings and OPERATING not in names:
            raise UserError(f"{key}={settings[key]}: only --figure {OPERATING} takes it; add that")
    wanted = Wanted(names, data=settings.get("data"))
    if "margin" not in settings:
        return wanted
    try:
        margin = float(settings["margin"])
    except ValueError:
        margin = math.nan
    if not 0 <= margin <= 100:
        raise UserError(f"margin={settings['margin']}: give percentage points from 0 to 100")
    return Wanted(names, margin, wanted.data)
