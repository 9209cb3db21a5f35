"""From run folders to one table in the terminal and one self-contained HTML page.

python -m dcr.report <run folders> [--table NAME ...] [--figure NAME ...] [--claims]
                     [out=<file.html>]

Each `--table` writes one of the paper's tables, ours beside the paper's numbers, as Markdown, CSV,
LaTeX and HTML into the page's folder; each `--figure` one of its figures as PNG, SVG and CSV, which
stands in the page as well. Figures: 1a, 1b, 3, 4, 5a, 5b, 6 (both of 6a and 6b), 7, 8, 9 and
operating_points, which takes margin=<points> and data=<label>. `--claims` measures the paper's
claims and tells each in a sentence, in the terminal, in the page and in claims.csv beside it.
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from dcr import storage
from dcr.config import UserError
from dcr.report import claims_shown, claims_told, markup, page, printed, terminal
from dcr.report.arguments import USAGE, parsed
from dcr.report.completions import Completions
from dcr.report.entries import Entry, about, entries, seed_groups
from dcr.report.finding import Finding
from dcr.report.measured import grids
from dcr.report.paired import comparisons
from dcr.report.paper import TABLES, PaperTable
from dcr.report.paper_figures import FIGURES, Wanted, figures_of
from dcr.report.printed import Printed
from dcr.report.printing import printable
from dcr.report.records import RunRecord, read_run
from dcr.report.tables import over_seeds
from dcr.text import single_line

WIDTH = 100  # where no terminal tells its own


def build(
    folders: list[Path],
    out: Path,
    wanted: Sequence[str] = (),
    drawn: Wanted | None = None,
    claims: bool = False,
) -> str:
    """Write the page to `out`, and what else is wanted beside it, each file whole or not.

    Returns the terminal's table. Raises UserError for a folder without a readable evaluation, or
    with figures or claims without logged values either, for a figure whose data are not there, or
    where a file cannot be written.
    """
    drawn = drawn or Wanted()
    records = [read_run(folder, claims or bool(drawn.names)) for folder in _distinct(folders)]
    if not records:
        raise UserError(USAGE)
    made = [(figure, printed.files(figure)) for figure in figures_of(records, drawn)]
    columns = entries(records)
    notes: list[str] = []
    completions = Completions(notes)
    measured, groups = grids(columns, completions), seed_groups(columns)
    seeds = over_seeds(measured.rates, groups)
    pairs = comparisons(columns, completions)
    papers = [TABLES[name](columns, groups) for name in dict.fromkeys(wanted)]
    shown = [
        page.Shown(figure, files["svg"], _command(folders, name, drawn))
        for name, (figure, files) in zip(drawn.names, made, strict=True)
    ]
    found = claims_told.findings(records, notes) if claims else []
    report = page.Report(
        records, columns, measured, groups, seeds, pairs, notes, completions, papers, shown, found
    )
    for entry in columns:  # read first, so that the page can tell what was skipped
        for name in entry.evaluation.sets:
            completions(entry, name)
    notes[:0] = [note for record in records for note in record.notes] + _uneven(columns)
    notes += [note for figure, _ in made for note in figure.notes]
    storage.write_text(out, page.render(report))
    _write_beside(out.parent, papers, made, found)
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    title = _title(records, columns)
    text = terminal.render(title, columns, measured.all, groups, seeds, pairs, notes, width)
    told = [line for figure, _ in made if figure.told for line in ("", *figure.told)]
    return "\n".join([text, *told, *(claims_shown.lines(found, width) if claims else ())])


def _write_beside(
    place: Path,
    papers: Sequence[PaperTable],
    made: Sequence[tuple[Printed, dict[str, bytes]]],
    found: Sequence[Finding],
) -> None:
    """Tables, figures and claims, into the page's folder."""
    for table in papers:
        for ending, text_of in markup.WRITERS.items():
            storage.write_text(place / f"{table.name}.{ending}", text_of(table))
    for figure, files in made:
        for ending, data in files.items():
            storage.write_bytes(place / f"{figure.name}.{ending}", data)
    if found:
        storage.write_text(place / claims_shown.FILE, claims_shown.csv_text(found))


def _command(folders: Sequence[Path], name: str, drawn: Wanted) -> str:
    """The command that draws one figure again."""
    told = shlex.join(map(str, folders))
    return printable(f"python -m dcr.report {told} --figure {name}{drawn.settings(name)}")


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
        return f"{len(records)} runs without a final evaluation of answers: see the page"
    told = [
        ", ".join(dict.fromkeys(filter(None, (about(e.run, e.evaluation, key) for e in columns))))
        for key in ("model", "data")
    ]
    return f"{told[0]} on {told[1] or 'unnamed'} data"


def main(arguments: Sequence[str]) -> int:
    """The command: print the table and the files' places; 2 and one line for a user's error."""
    try:
        if {"-h", "--help"} & set(arguments):
            print(f"{USAGE}\ntables: {', '.join(TABLES)}\nfigures: {', '.join(FIGURES)}")
            return 0
        command = parsed(arguments)
        table = build(command.folders, command.out, command.tables, command.figures, command.claims)
    except UserError as error:
        print(f"error: {single_line(error)}", file=sys.stderr)
        return error.exit_code
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # pyright: ignore
    print(f"{table}\n\npage: {command.out}")
    for name, files in command.files.items():
        endings = ",".join(file.suffix.removeprefix(".") for file in files)
        print(f"{name}: {command.out.parent / name}.{f'{{{endings}}}' if files[1:] else endings}")
    return 0
