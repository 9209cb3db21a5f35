"""Makes all sections in their order: the page, the files beside it, and the terminal's text."""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from dcr.core import storage
from dcr.core.config import ConfigError, DataError, UserError
from dcr.core.text import printable
from dcr.report import comparisons, figures, page, writing
from dcr.report.figures import Drawing
from dcr.report.page import Part
from dcr.report.records import Column, read_run
from dcr.report.sections import MARGIN, OPERATING, SECTIONS, Section, Selection
from dcr.report.tables import (
    CONTAMINATED,
    IN_DISTRIBUTION,
    Block,
    Grid,
    any_marked,
    in_words,
    text_of,
)

WIDTH = 100  # columns without a terminal
INTERVALS = (
    "Brackets: 95% intervals (Wilson; over five sets combined; bootstrap for AUROC; ±1.96 standard "
    "errors for ability). ± after a win rate: its standard error."
)
FOOTNOTES = {
    IN_DISTRIBUTION: "in-distribution: training saw prompts of this set.",
    CONTAMINATED: "contaminated: some of its prompts stand among the rows trained on, or steering "
    "was made from them.",
}
LABEL_WIDTH, HEAD_WIDTH = 26, 16  # longer names are folded


def build(
    folders: Sequence[Path],
    out: Path,
    wanted_tables: Sequence[str] = (),
    wanted_figures: Sequence[str] = (),
    with_claims: bool = False,
    *,
    margin: float = MARGIN,
    data: str | None = None,
    notes: Sequence[str] = (),
    own: Mapping[str, Section] | None = None,
) -> str:
    """Writes the page to `out` and the other wanted files beside it, each whole or not at all.

    `margin` (percentage points) and the label `data` belong to operating points. `notes` go to the
    page beside its own, which also name every figure without data. `own` are a user's sections.
    Returns the terminal's text. Raises UserError for a folder that is no run's, for a damaged file,
    and if a file cannot be written.
    """
    distinct = {folder.resolve(): folder for folder in folders}.values()
    chosen = Selection.of([read_run(folder) for folder in distinct], margin, data)
    chosen.notes[:0] = notes
    wanted = {*wanted_tables, *wanted_figures, *(own or {}), *(["claims"] if with_claims else [])}
    parts = []
    for name, section in {**SECTIONS, **(own or {})}.items():
        if not section.option or name in wanted:
            try:
                made = chosen.section(name, section)
            except (ConfigError, DataError):
                raise
            except UserError as error:
                chosen.notes.append(str(error))
                continue
            if made:
                parts.append(_part(name, section, made, chosen))
    for column in chosen.columns:  # read first, so that the page can name skipped files
        for name in column.evaluation.sets:
            chosen.completions(column, name)
    chosen.notes.extend(
        note for part in parts if isinstance(part.made, Drawing) for note in part.made.notes
    )
    files = {out: page.render(chosen, parts).encode("utf-8", "replace")}
    for part in parts:
        files |= {out.parent / f"{part.name}.{end}": content for end, content in part.files.items()}
    for path, content in files.items():
        storage.write_bytes(path, content)
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    places = []
    for part in parts:
        ends = ",".join(part.files)
        ends = f"{{{ends}}}" if len(part.files) > 1 else ends
        places += [f"{part.name}: {out.parent / part.name}.{ends}"] if ends else []
    return "\n".join([plain_text(chosen, parts, width), *([""] if places else []), *places])


def _part(name: str, section: Section, made: Any, chosen: Selection) -> Part:
    """A section's result with the content of its files and the command that asks for it."""
    if not section.endings:
        return Part(name, section, made, {})
    folders = [str(run.folder) for run in chosen.records]
    named = getattr(made, "origin", "").partition(",")[0] or name  # a user's own by its path
    command = f"python -m dcr.report {shlex.join(folders)} --{section.option} {named}"
    if name == OPERATING:
        label = "" if chosen.data is None else f" data={shlex.quote(chosen.data)}"
        command += f" margin={chosen.margin:g}{label}"
    if isinstance(made, Drawing):
        return Part(made.name, section, made, figures.files(made), printable(command))
    writers = {ending: writing.WRITERS[ending] for ending in section.endings}
    files = {end: write(made).encode("utf-8", "replace") for end, write in writers.items()}
    return Part(name, section, made, files)


# --- the terminal -------------------------------------------------------------------------------


def plain_text(chosen: Selection, parts: Sequence[Part], width: int) -> str:
    """The sections of the terminal as text of at most `width` columns, if the names allow it."""
    console, shown = writing.console(width), [p for p in parts if p.section.in_terminal]
    console.print(_title(chosen), *comparisons.headline(chosen), sep="\n")
    grids = [part.made for part in shown if isinstance(part.made, Grid)]
    blocks = [block for grid in grids if grid.heads is chosen.columns for block in grid.blocks]
    for chunk in _chunks(width, [column.label for column in chosen.columns], blocks):
        console.print(chunk)
    for part in shown:
        if isinstance(part.made, Grid) and part.made.heads is chosen.columns:
            continue
        console.print(f"\n{part.title}")
        if isinstance(part.made, Grid):
            labels = [group.label for group in chosen.groups]
            console.print(*_chunks(width, labels, part.made.blocks), sep="\n")
        else:
            console.print(part.section.about, writing.in_terminal(part.made), sep="\n")
    if chosen.columns:
        console.print()
        for mark, text in FOOTNOTES.items():
            if any_marked(blocks, mark, in_terminal=True):
                console.print(f"{mark} {text}")
        console.print(INTERVALS)
    for part in parts:
        for sentence in part.made.sentences if isinstance(part.made, Drawing) else ():
            console.print(sentence, soft_wrap=True)
    for note in chosen.notes:
        console.print(f"note: {note}", soft_wrap=True)
    return writing.printed(console)


def _title(chosen: Selection) -> str:
    columns: Sequence[Column] = chosen.columns
    if not columns:
        return f"{len(chosen.records)} runs without a final evaluation of answers: see the page"
    models, data = (
        ", ".join(dict.fromkeys(filter(None, (column.about(key) for column in columns))))
        for key in ("model", "data")
    )
    return f"{models} on {data or 'unnamed'} data"


def _chunks(
    width: int, labels: Sequence[tuple[str, ...]], blocks: Sequence[Block]
) -> list[Table | Text]:
    """Splits columns over as few tables as the width allows, at least one column each."""
    blocks = [block for block in blocks if not all(row.page_only for row in block.rows)]
    rows = [row for block in blocks for row in block.rows if not row.page_only]
    names = max((len(in_words(row.label)) + 2 for row in rows), default=0)
    widths = [min(names, LABEL_WIDTH)]
    for place, label in enumerate(labels):
        cells = max((len(text_of(row.values[place])) for row in rows), default=0)
        parts = max(len(part) for part in label)
        widths.append(max(cells, min(parts, HEAD_WIDTH)))
    chunks: list[Table | Text] = []
    start = 0
    while start < len(labels):
        stop = start + 1
        while stop < len(labels) and sum(w + 2 for w in widths[start + 1 : stop + 2]) <= (
            width - widths[0]
        ):
            stop += 1
        chunks += [Text()] if start else []
        drawn = writing.bare()
        drawn.add_column("", overflow="fold", width=widths[0])
        for place in range(start, stop):
            head = Text("\n".join(labels[place]))
            drawn.add_column(head, justify="right", overflow="fold", width=widths[place + 1])
        for block in blocks:
            drawn.add_row(Text(block.short))
            for row in block.rows:
                if not row.page_only:
                    cells = [Text(text_of(value)) for value in row.values[start:stop]]
                    drawn.add_row(Text(f"  {in_words(row.label)}"), *cells)
            drawn.add_section()
        chunks.append(drawn)
        start = stop
    return chunks
