"""From run folders to one table in the terminal and one self-contained HTML page.

python -m dcr.report <run folders> [out=<file.html>]
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dcr import runs
from dcr.config import UserError
from dcr.report import page, terminal
from dcr.report.entries import Entry, about, entries, seed_groups
from dcr.report.paired import comparisons
from dcr.report.records import Completion, RunRecord, read_completions, read_run
from dcr.report.tables import discernment, over_seeds, sections

USAGE = "usage: python -m dcr.report <run folders> [out=<file.html>]"
WIDTH = 100  # where no terminal tells its own


def build(folders: list[Path], out: Path) -> str:
    """Write the page to `out`, whole or not at all, and return the terminal's table.

    Raises UserError for a folder without a readable evaluation, or where `out` cannot be written.
    """
    records = [read_run(folder) for folder in _distinct(folders)]
    if not records:
        raise UserError(USAGE)
    columns = entries(records)
    notes: list[str] = []
    completions = _Completions(notes)
    table, groups = sections(columns) + discernment(columns), seed_groups(columns)
    seeds = over_seeds(table, groups)
    pairs = comparisons(columns, completions)
    report = page.Report(records, columns, table, groups, seeds, pairs, notes, completions)
    for entry in columns:  # read first, so that the page can tell what was skipped
        for name in entry.evaluation.sets:
            completions(entry, name)
    notes[:0] = [note for record in records for note in record.notes] + _uneven(columns)
    # folder names may hold bytes that are no text
    html = page.render(report).encode("utf-8", "replace").decode()
    try:
        runs.write_text(out, html)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror or error})") from error
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    title = _title(records, columns)
    return terminal.render(title, columns, table, groups, seeds, pairs, notes, width)


class _Completions:
    """Reads and judges each file of completions once."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self.read: dict[tuple[Path, str], list[Completion]] = {}

    def __call__(self, entry: Entry, name: str) -> list[Completion]:
        key = entry.evaluation.folder, name
        if key not in self.read:
            self.read[key] = read_completions(entry.evaluation, name, self.notes)
        return self.read[key]


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
    """The command: print the table and the page's place; 2 and one line for a user's error."""
    try:
        if {"-h", "--help"} & set(arguments):
            print(USAGE)
            return 0
        folders, out = _parsed(arguments)
        table = build(folders, out)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore
    print(f"{table}\n\npage: {out}")
    return 0


def _parsed(arguments: Sequence[str]) -> tuple[list[Path], Path]:
    folders, out = [], None
    for argument in arguments:
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
    parent = os.path.commonpath([folder.resolve().parent for folder in folders])
    return folders, out or Path(os.path.relpath(parent)) / "report.html"
