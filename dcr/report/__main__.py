"""The command line of a report."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from dcr.config import UserError
from dcr.report import FIGURES, OPERATING, TABLES, Wanted, build, claims, comparisons, paper
from dcr.report.figures import ENDINGS, file_name
from dcr.text import single_line

SETTINGS = ("out", "margin", "data")  # also as key=value


def main(arguments: Sequence[str]) -> int:
    """Print the table and the files' places; 2 and one line for a user's error."""
    try:
        given = parsed(arguments)
        names = tuple(dict.fromkeys(given.figure))
        out, files = _places(given, names)
        wanted = Wanted(names, given.margin, given.data)
        table = build(given.folders, out, given.table, wanted, given.claims)
    except UserError as error:
        print(f"error: {single_line(error)}", file=sys.stderr)
        return error.exit_code
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore
    print(f"{table}\n\npage: {out}")
    for name, (_, endings) in files.items():
        ending = f"{{{','.join(endings)}}}" if endings[1:] else endings[0]
        print(f"{name}: {out.parent / name}.{ending}")
    return 0


class _Parser(argparse.ArgumentParser):
    """Whose errors are the house's."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m dcr.report --help")


def parser() -> argparse.ArgumentParser:
    """Every option with its type, default and meaning."""
    made = _Parser(
        "python -m dcr.report",
        description="One table in the terminal and one HTML page from run folders, with the "
        "paper's tables and figures beside it. out, margin and data are also taken as key=value.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("folders", nargs="*", type=Path, metavar="<run folder>",
                      help="folders of train.py or eval.py that hold an evaluation")  # fmt: skip
    made.add_argument("--table", action="append", default=[], choices=TABLES,
                      help="one of the paper's tables, ours beside its numbers, or answers at "
                      f"equal safety (discernment), as {', '.join(paper.WRITERS)}")  # fmt: skip
    made.add_argument("--figure", action="append", default=[], choices=FIGURES,
                      help="one of the paper's figures, 6 being both of 6a and 6b, as "
                      f"{', '.join(ENDINGS)} and in the page; repeatable")  # fmt: skip
    made.add_argument(
        "--claims",
        action="store_true",
        help="measure the paper's claims: in the terminal, the page and claims.csv",
    )
    made.add_argument("--out", type=Path, metavar="<file.html>",
                      help="the page; None: report.html beside the folders")  # fmt: skip
    made.add_argument("--margin", type=float, default=comparisons.MARGIN, metavar="<points>",
                      help="float from 0 to 100: how much less safe than STL a point may be, of "
                      f"--figure {OPERATING}")  # fmt: skip
    made.add_argument(
        "--data",
        metavar="<label>",
        help=f"str: whose evaluations --figure {OPERATING} draws; None: all",
    )
    return made


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options. UserError for what they cannot be, with the choices there are."""
    words = []
    for argument in arguments:
        _check_path(argument)
        key, equals, _ = argument.partition("=")
        if equals and key in SETTINGS:
            argument = f"--{argument}"
        elif equals and not key.startswith("--") and not Path(argument).exists():
            # a sweep's folders may hold an equals sign
            raise UserError(f"{argument}: neither a folder nor a setting ({', '.join(SETTINGS)})")
        words.append(argument)
    given = parser().parse_intermixed_args(words)
    if not given.folders:
        raise UserError("no run folder given; see python -m dcr.report --help")
    for key in ("margin", "data"):
        if getattr(given, key) != parser().get_default(key) and OPERATING not in given.figure:
            value = getattr(given, key)
            value = f"{value:g}" if isinstance(value, float) else value
            raise UserError(f"{key}={value}: only --figure {OPERATING} takes it; add that")
    if not 0 <= given.margin <= 100:
        raise UserError(f"margin={given.margin:g}: give percentage points from 0 to 100")
    return given


def _check_path(argument: str) -> None:
    """Raises UserError for what no path can be."""
    try:
        for part in (argument, argument.partition("=")[2]):
            os.lstat(part or ".")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return
    except (OSError, ValueError) as error:
        told = getattr(error, "strerror", None) or error
        raise UserError(f"{argument[:60]}: cannot be a path ({told})") from error


def _places(
    given: argparse.Namespace, names: Sequence[str]
) -> tuple[Path, dict[str, tuple[str, tuple[str, ...]]]]:
    """The page, and what else is written beside it: by name the flag and the files' endings."""
    out = given.out
    if out is not None and (out.is_dir() or not out.name):
        raise UserError(f"out={out}: name a file, such as out=report.html")
    if out is None:
        parent = os.path.commonpath([folder.resolve().parent for folder in given.folders])
        out = Path(os.path.relpath(parent)) / "report.html"
    files: dict[str, tuple[str, tuple[str, ...]]] = {}
    if given.claims:
        files[Path(claims.FILE).stem] = "--claims", ("csv",)
    files |= {name: ("--table", tuple(paper.WRITERS)) for name in given.table}
    files |= {file_name(name): ("--figure", ENDINGS) for name in names}
    for name, (flag, endings) in files.items():
        if out in [out.parent / f"{name}.{ending}" for ending in endings]:
            raise UserError(f"out={out}: {flag} writes a file of this name; name another")
    return out, files


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
