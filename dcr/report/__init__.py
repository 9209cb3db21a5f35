"""From run folders to one table in the terminal and one self-contained HTML page.

python -m dcr.report <run folders> [--table NAME ...] [out=<file.html>]

Each `--table` writes one of the paper's tables, ours beside the paper's numbers, as Markdown, CSV,
LaTeX and HTML into the page's folder.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dcr import runs
from dcr.config import UserError
from dcr.report import markup, page, terminal
from dcr.report.completions import Completions
from dcr.report.entries import Entry, about, entries, seed_groups
from dcr.report.measured import grids
from dcr.report.paired import comparisons
from dcr.report.paper import TABLES
from dcr.report.records import RunRecord, read_run
from dcr.report.tables import over_seeds

USAGE = "usage: python -m dcr.report <run folders> [--table NAME ...] [out=<file.html>]"
WIDTH = 100  # where no terminal tells its own


def build(folders: list[Path], out: Path, wanted: Sequence[str] = ()) -> str:
    """Write the page to `out` and the wanted tables beside it, each file whole or not at all.

    Returns the terminal's table. Raises UserError for a folder without a readable evaluation, or
    where a file cannot be written.
    """
    records = [read_run(folder) for folder in _distinct(folders)]
    if not records:
        raise UserError(USAGE)
    columns = entries(records)
    notes: list[str] = []
    completions = Completions(notes)
    measured, groups = grids(columns), seed_groups(columns)
    seeds = over_seeds(measured.rates, groups)
    pairs = comparisons(columns, completions)
    papers = [TABLES[name](columns, groups) for name in dict.fromkeys(wanted)]
    report = page.Report(
        records, columns, measured, groups, seeds, pairs, notes, completions, papers
    )
    for entry in columns:  # read first, so that the page can tell what was skipped
        for name in entry.evaluation.sets:
            completions(entry, name)
    notes[:0] = [note for record in records for note in record.notes] + _uneven(columns)
    _write(out, page.render(report))
    for table in papers:
        for ending, text_of in markup.WRITERS.items():
            _write(out.parent / f"{table.name}.{ending}", text_of(table))
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    title = _title(records, columns)
    return terminal.render(title, columns, measured.all, groups, seeds, pairs, notes, width)


def _write(path: Path, text: str) -> None:
    try:
        # folder names may hold bytes that are no text
        runs.write_text(path, text.encode("utf-8", "replace").decode())
    except OSError as error:
        raise UserError(f"out={path}: cannot be written ({error.strerror or error})") from error


def _distinct(folders: Sequence[Path]) -> list[Path]:
    return list({folder.resolve(): folder for folder in folders}.values())


def _uneven(columns: Sequence[Entry]) -> list[str]:
    """A note where columns were evaluated on different prompts, so that sums do not compare."""
    found = {
        tuple(sorted((name, score.n) for name, score in entry.evaluation.sets.items()))
        for entry in columns
    }
    if len(found) < 2:
        return []
    return [
        "not every column was evaluated on the same sets and counts: do not compare pooled values"
    ]


def _title(records: Sequence[RunRecord], columns: Sequence[Entry]) -> str:
    if not columns:
        return f"{len(records)} runs with snapshots only: see the page"
    told = [
        ", ".join(dict.fromkeys(filter(None, (about(e.run, e.evaluation, key) for e in columns))))
        for key in ("model", "data")
    ]
    return f"{told[0]} on {told[1] or 'unnamed'} data"


def main(arguments: Sequence[str]) -> int:
    """The command: print the table and the files' places; 2 and one line for a user's error."""
    try:
        if {"-h", "--help"} & set(arguments):
            print(f"{USAGE}\ntables: {', '.join(TABLES)}")
            return 0
        folders, out, wanted = _parsed(arguments)
        table = build(folders, out, wanted)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore
    print(f"{table}\n\npage: {out}")
    for name in wanted:
        print(f"{name}: {out.parent / name}.{{{','.join(markup.WRITERS)}}}")
    return 0


def _parsed(arguments: Sequence[str]) -> tuple[list[Path], Path, list[str]]:
    given, wanted = _tables(arguments)
    folders, out = [], None
    for argument in given:
        key, equals, value = argument.partition("=")
        if equals and key == "out":
            out = Path(value)
        elif equals and not Path(argument).exists():  # a sweep's folders may hold an equals sign
            raise UserError(f"{argument}: neither a folder nor a setting; {USAGE}")
        else:
            folders.append(Path(argument))
    if not folders:
        raise UserError(f"no run folder given; {USAGE}")
    if out is not None and (out.is_dir() or not out.name):
        raise UserError(f"out={out}: name a file, such as out=report.html")
    if out is not None and out.name in {
        f"{name}.{end}" for name in wanted for end in markup.WRITERS
    }:
        raise UserError(f"out={out}: --table writes a file of this name; name another")
    parent = os.path.commonpath([folder.resolve().parent for folder in folders])
    return folders, out or Path(os.path.relpath(parent)) / "report.html", wanted


def _tables(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Everything but the tables asked for, and their names, each once."""
    others, wanted = [], []
    left = iter(arguments)
    for argument in left:
        flag, equals, name = argument.partition("=")
        if flag != "--table":
            others.append(argument)
            continue
        name = name if equals else next(left, "")
        if name not in TABLES:
            raise UserError(f"--table {name}: no such table; choose from {', '.join(TABLES)}")
        wanted.append(name)
    return others, list(dict.fromkeys(wanted))
