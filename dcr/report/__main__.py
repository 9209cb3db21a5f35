"""The command line of a report."""

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcr import entry
from dcr.core.config import ConfigError, UserError
from dcr.report.sections import (
    FIGURE_ENDINGS,
    FIGURES,
    MARGIN,
    OPERATING,
    SECTIONS,
    TABLE_ENDINGS,
    TABLES,
    Section,
)


@dataclass
class Options:
    """python -m dcr.report <run folder> ... [--table table1] [--figure 6] [--claims] [out=<file>]

    One table in the terminal and one HTML page from run folders, with the paper's tables and
    figures beside it.
    """

    folders: list[Path] = entry.option(
        "folders of train.py or eval.py that hold an evaluation", [], rest=True
    )
    table: list[str] = entry.option(
        f"one of {', '.join(TABLES)} (the paper's numbers beside ours, or answers at equal safety),"
        f" or your own, module:Class; as {', '.join(TABLE_ENDINGS)}; repeatable",
        [],
    )
    figure: list[str] = entry.option(
        f"one of {', '.join(FIGURES)} (6 is 6a and 6b), or your own, module:Class; as "
        f"{', '.join(FIGURE_ENDINGS)} and in the page; repeatable",
        [],
    )
    claims: bool = entry.option(
        "measure the paper's claims: in the terminal, the page and claims.csv", False
    )
    out: Path | None = entry.option(
        "the page; not given: report.html beside the folders, or claims.html", None
    )
    margin: float = entry.option(
        "percentage points: how much less safe than STL a point of operating_points may be",
        MARGIN,
        least=0,
        most=100,
    )
    data: str | None = entry.option(
        "label of the data whose evaluations operating_points draws; not given: all", None
    )


@entry.command(Options)
def main(options: Options) -> None:
    """Prints the table and the files' places."""
    # a sweep's folders may hold a = themselves
    words = [str(word) for word in options.folders if "=" in str(word) and not word.exists()]
    options.folders = [folder for folder in options.folders if str(folder) not in words]
    _check(options, words)
    own, wanted = {}, [*options.table, *options.figure, *(["claims"] if options.claims else [])]
    if words or any(":" in name for name in wanted):
        from dcr.report.own import sections

        own = sections(options.table, options.figure, words)
    out = _page(options, {*wanted, *own}, own)
    from dcr.report import building  # help and a slip need no drawing library

    table = building.build(
        options.folders, out, wanted, margin=options.margin, data=options.data, own=own
    )
    print(f"{table}\n\npage: {out}")


def _check(options: Options, words: Sequence[str]) -> None:
    """Raises UserError, naming the choices, for a word that is neither a folder nor a setting."""
    for word in words:
        if not word.startswith("own."):
            raise UserError(f"{word}: neither a folder nor a setting (out, margin, data)")
    if not options.folders:
        raise UserError("no run folder given; see python -m dcr.report --help")
    for key, known in (("table", TABLES), ("figure", FIGURES)):
        for name in getattr(options, key):
            if name not in known and ":" not in name:
                raise ConfigError(
                    f"{key}={name}: choose one of {', '.join(known)}, or your own as module:Class"
                )
    if OPERATING not in options.figure:
        for key, value in (("margin", options.margin), ("data", options.data)):
            if value not in (None, MARGIN):
                value = f"{value:g}" if isinstance(value, float) else value
                raise UserError(f"{key}={value}: only --figure {OPERATING} takes it; add that")


def _page(options: Options, asked: Collection[str], own: Mapping[str, Section]) -> Path:
    """The page's path. Raises UserError if another file of this report would replace it."""
    out = options.out
    if out is not None and (out.is_dir() or not out.name):
        raise UserError(f"out={out}: name a file, such as out=report.html")
    if out is None:  # a page of claims is another one than that of the runs
        parent = os.path.commonpath([folder.resolve().parent for folder in options.folders])
        out = Path(os.path.relpath(parent)) / ("claims.html" if options.claims else "report.html")
    for name, section in {**SECTIONS, **own}.items():
        for ending in section.endings if name in asked else ():
            if out.name in (f"{name}.{ending}", f"figure{name}.{ending}"):
                raise UserError(
                    f"out={out}: --{section.option} writes a file of this name; name another"
                )
    return out


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
