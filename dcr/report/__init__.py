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
from dcr.report.figures import Drawing
from dcr.report.records import (
    Column,
    Completions,
    RunRecord,
    columns_of,
    read_run,
    seed_groups,
)
from dcr.text import printable

WIDTH = 100  # where no terminal tells its own
DRAWN: dict[str, Callable[[Sequence[RunRecord]], Drawing]] = {
    **curves.CURVES,
    **analyses.ANALYSES,
}
OPERATING = "operating_points"
TABLES = (*paper.TABLES, discernment.NAME)
FIGURES = (*sorted(DRAWN), OPERATING)


@dataclass(frozen=True)
class Wanted:
    """The figures asked for; margin (percentage points) and data label are of operating points.

    `notes` are what the page says beside its own.
    """

    names: tuple[str, ...] = ()
    margin: float = comparisons.MARGIN
    data: str | None = None
    notes: tuple[str, ...] = ()

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
    distinct = {folder.resolve(): folder for folder in folders}.values()
    records = [read_run(folder, with_claims or bool(drawn.names)) for folder in distinct]
    shown = []
    for name in drawn.names:
        if name == OPERATING:
            figure = comparisons.operating_points(records, drawn.margin, drawn.data)
        else:
            figure = DRAWN[name](records)
        command = f"python -m dcr.report {shlex.join(map(str, folders))} --figure {name}"
        command = printable(f"{command}{drawn.settings(name)}")
        shown.append(page.Shown(figure, figures.files(figure), command))
    columns, notes = columns_of(records), list(drawn.notes)
    completions, groups = Completions(notes), seed_groups(columns)
    grids = tables.grids(columns, discernment.sections(columns, completions))
    report = page.Report(
        records,
        columns,
        grids,
        groups,
        tables.over_seeds([part for key in tables.OVER_SEEDS for part in grids[key]], groups),
        comparisons.comparisons(columns, completions),
        notes,
        completions,
        [
            discernment.table(columns, groups, completions)
            if name == discernment.NAME
            else paper.TABLES[name](columns, groups)
            for name in dict.fromkeys(wanted)
        ],
        shown,
        claims.claim_rows(records, notes) if with_claims else [],
    )
    for column in columns:  # read first, so that the page can tell what was skipped
        for name in column.evaluation.sets:
            completions(column, name)
    notes[:0] = [note for record in records for note in record.notes] + _uneven(columns)
    notes += [note for drawing in shown for note in drawing.figure.notes]
    texts, pictures = {out: page.render(report)}, {}
    for table in report.paper:
        for ending, text_of in paper.WRITERS.items():
            texts[out.parent / f"{table.name}.{ending}"] = text_of(table)
    for drawing in shown:
        for ending, data in drawing.files.items():
            pictures[out.parent / f"{drawing.figure.name}.{ending}"] = data
    if report.claims:
        texts[out.parent / claims.FILE] = claims.csv_text(report.claims)
    for path, text in texts.items():
        storage.write_text(path, text)
    for path, data in pictures.items():
        storage.write_bytes(path, data)
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    lines = [page.plain_text(_title(records, columns), report, width)]
    lines += [line for d in shown if d.figure.lines for line in ("", *d.figure.lines)]
    return "\n".join([*lines, *(claims.lines(report.claims, width) if with_claims else ())])


def _uneven(columns: Sequence[Column]) -> list[str]:
    """A note where columns were evaluated on different prompts, so that sums do not compare."""
    counts = {
        tuple(sorted((name, of.n) for name, of in column.evaluation.sets.items()))
        for column in columns
    }
    note = (
        "not every column was evaluated on the same sets and counts: do not compare pooled values"
    )
    return [note] if len(counts) > 1 else []


def _title(records: Sequence[RunRecord], columns: Sequence[Column]) -> str:
    if not columns:
        return f"{len(records)} runs without a final evaluation of answers: see the page"
    named = [
        ", ".join(dict.fromkeys(filter(None, (e.about(key) for e in columns))))
        for key in ("model", "data")
    ]
    return f"{named[0]} on {named[1] or 'unnamed'} data"
