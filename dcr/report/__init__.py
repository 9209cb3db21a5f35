"""From run folders to one table in the terminal and one self-contained HTML page.

`build` reads run folders and writes the page, with the paper's tables and figures and the claims
beside it where they are asked for; `python -m dcr.report --help` tells of the command.
"""

import shlex
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcr import storage
from dcr.report import (
    analyses,
    claims,
    comparisons,
    curves,
    discernment,
    figures,
    page,
    paper,
    tables,
)
from dcr.report.claims import ClaimRow
from dcr.report.columns import Completions, Entry, about, entries, seed_groups
from dcr.report.figures import Drawing
from dcr.report.paper import PaperTable
from dcr.report.records import RunRecord, read_run
from dcr.text import printable

WIDTH = 100  # where no terminal tells its own
DRAWN: dict[str, Callable[[Sequence[RunRecord]], Drawing]] = {
    **curves.CURVES,
    "4": curves.figure4,
    **analyses.KERNELS,
    **analyses.LAYERS,
}
OPERATING = "operating_points"
TABLES = (*paper.TABLES, discernment.NAME)
FIGURES = (*sorted(DRAWN), OPERATING)


@dataclass(frozen=True)
class Wanted:
    """The figures asked for; margin (percentage points) and data label are of operating points."""

    names: tuple[str, ...] = ()
    margin: float = comparisons.MARGIN
    data: str | None = None

    def settings(self, name: str) -> str:
        """What a command must say beside a figure's name."""
        if name != OPERATING:
            return ""
        label = "" if self.data is None else f" data={shlex.quote(self.data)}"
        return f" margin={self.margin:g}{label}"


def build(
    folders: list[Path],
    out: Path,
    wanted: Sequence[str] = (),
    drawn: Wanted | None = None,
    with_claims: bool = False,
) -> str:
    """Write the page to `out`, and what else is wanted beside it, each file whole or not.

    Returns the terminal's table. Raises UserError for a folder without an evaluation, or with
    figures or claims without logged values either, for a damaged file, for a figure whose data are
    not there, or where a file cannot be written.
    """
    drawn = drawn or Wanted()
    records = [read_run(folder, with_claims or bool(drawn.names)) for folder in _distinct(folders)]
    made = [(figure, figures.files(figure)) for figure in _figures(records, drawn)]
    columns = entries(records)
    notes: list[str] = []
    completions = Completions(notes)
    ranked = discernment.sections(columns, completions)
    grids, groups = tables.grids(columns, ranked), seed_groups(columns)
    seeds = tables.over_seeds(grids.rates, groups)
    pairs = comparisons.comparisons(columns, completions)
    papers = [
        discernment.table(columns, groups, completions)
        if name == discernment.NAME
        else paper.TABLES[name](columns, groups)
        for name in dict.fromkeys(wanted)
    ]
    shown = [
        page.Shown(figure, files["svg"], _command(folders, name, drawn))
        for name, (figure, files) in zip(drawn.names, made, strict=True)
    ]
    found = claims.claim_rows(records, notes) if with_claims else []
    report = page.Report(
        records, columns, grids, groups, seeds, pairs, notes, completions, papers, shown, found
    )
    for entry in columns:  # read first, so that the page can tell what was skipped
        for name in entry.evaluation.sets:
            completions(entry, name)
    notes[:0] = [note for record in records for note in record.notes] + _uneven(columns)
    notes += [note for figure, _ in made for note in figure.notes]
    storage.write_text(out, page.render(report))
    _write_beside(out.parent, papers, made, found)
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    text = page.plain_text(_title(records, columns), report, width)
    told = [line for figure, _ in made if figure.told for line in ("", *figure.told)]
    return "\n".join([text, *told, *(claims.lines(found, width) if with_claims else ())])


def _figures(records: Sequence[RunRecord], wanted: Wanted) -> list[Drawing]:
    """In the order asked. UserError, naming the command that makes them, where data are lacking."""
    return [
        comparisons.operating_points(records, wanted.margin, wanted.data)
        if name == OPERATING
        else DRAWN[name](records)
        for name in wanted.names
    ]


def _write_beside(
    place: Path,
    papers: Sequence[PaperTable],
    made: Sequence[tuple[Drawing, dict[str, bytes]]],
    found: Sequence[ClaimRow],
) -> None:
    """Tables, figures and claims, into the page's folder."""
    for table in papers:
        for ending, text_of in paper.WRITERS.items():
            storage.write_text(place / f"{table.name}.{ending}", text_of(table))
    for figure, files in made:
        for ending, data in files.items():
            storage.write_bytes(place / f"{figure.name}.{ending}", data)
    if found:
        storage.write_text(place / claims.FILE, claims.csv_text(found))


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
