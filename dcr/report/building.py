"""Makes all sections in their order: the page, the files beside it, and the terminal's text."""

import shlex
import shutil
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from dcr import entry
from dcr.core import storage
from dcr.core.config import ConfigError, DataError, UserError
from dcr.ending import printable
from dcr.report import comparisons, figures, page, writing
from dcr.report.figures import Drawing
from dcr.report.grids import INTERVALS, Block, Grid, footnotes, in_words, text_of
from dcr.report.page import Part
from dcr.report.records import read_run
from dcr.report.sections import MARGIN, OPERATING, SECTIONS, Section, Selection

WIDTH = 100  # columns without a terminal
LABEL_WIDTH, HEAD_WIDTH = 26, 16  # longer names are folded


def build(
    folders: Sequence[Path],
    out: Path,
    wanted: Collection[str] = (),
    *,
    margin: float = MARGIN,
    data: str | None = None,
    notes: Sequence[str] = (),
    own: Mapping[str, Section] | None = None,
) -> str:
    """Writes the page to `out` and the files of its sections beside it, each whole or not at all.

    `wanted` names the sections that only an option asks for: tables, figures, `claims`. `margin`
    (percentage points) and the label `data` belong to operating points. `notes` go to the page
    beside its own, which also name every figure without data. `own` are a user's sections. Returns
    the terminal's text. Raises UserError for a folder that is no run's, for a damaged file, and if
    a file cannot be written.
    """
    distinct = {folder.resolve(): folder for folder in folders}.values()
    chosen = Selection.of([read_run(folder) for folder in distinct], margin, data)
    chosen.notes[:0] = notes
    parts = []
    for name, section in {**SECTIONS, **(own or {})}.items():
        if section.option and name not in {*wanted, *(own or {})}:
            continue
        try:
            made = chosen.section(name, section)
        except (ConfigError, DataError):
            raise
        except UserError as error:
            chosen.notes.append(str(error))
        else:
            parts += [_part(name, section, made, chosen)] if made else []
    files = {out: page.render(chosen, parts).encode("utf-8", "replace")}
    places = [""]
    for part in parts:
        files |= {out.parent / f"{part.name}.{end}": content for end, content in part.files.items()}
        ends = ",".join(part.files)
        ends = f"{{{ends}}}" if len(part.files) > 1 else ends
        places += [f"{part.name}: {out.parent / part.name}.{ends}"] if ends else []
    for path, content in files.items():
        storage.write_bytes(path, content)
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    return "\n".join([plain_text(chosen, parts, width), *(places if places[1:] else [])])


def _part(name: str, section: Section, made: Any, chosen: Selection) -> Part:
    """A section's result with the content of its files and the command that asks for it."""
    if not isinstance(made, Drawing):
        writers = {ending: writing.WRITERS[ending] for ending in section.endings}
        files = {end: write(made).encode("utf-8", "replace") for end, write in writers.items()}
        return Part(name, section, made, files)
    asked = made.origin.partition(",")[0] or name  # a user's own by its path
    folders = shlex.join(str(run.folder) for run in chosen.records)
    command = f"python -m dcr.report {folders} --figure {asked}"
    if name == OPERATING:
        label = "" if chosen.data is None else f" data={shlex.quote(chosen.data)}"
        command += f" margin={chosen.margin:g}{label}"
    return Part(made.name, section, made, figures.files(made), printable(command))


def plain_text(chosen: Selection, parts: Sequence[Part], width: int) -> str:
    """The sections of the terminal as text of at most `width` columns, if the names allow it."""
    console, columns = entry.console(width), chosen.columns
    models, data = (
        ", ".join(dict.fromkeys(filter(None, (column.about(key) for column in columns))))
        for key in ("model", "data")
    )
    lack = f"{len(chosen.records)} runs without a final evaluation of answers: see the page"
    title = f"{models} on {data or 'unnamed'} data" if columns else lack
    console.print(title, *comparisons.headline(chosen), sep="\n")
    blocks, others = list[Block](), list[Part]()
    for part in parts:
        if part.section.in_terminal and isinstance(part.made, Grid) and part.made.heads is columns:
            blocks += part.made.blocks
        elif part.section.in_terminal:
            others.append(part)
    for chunk in _chunks(width, [column.label for column in columns], blocks):
        console.print(chunk)
    for part in others:
        console.print(f"\n{part.title}")
        if isinstance(part.made, Grid):
            labels = [head.label for head in part.made.heads]
            console.print(*_chunks(width, labels, part.made.blocks), sep="\n")
        else:
            console.print(part.about, writing.in_terminal(part.made), sep="\n")
    if columns:
        marks = footnotes(blocks, in_terminal=True)
        console.print("", *map(" ".join, marks.items()), INTERVALS, sep="\n")
    sentences = [s for p in parts if isinstance(p.made, Drawing) for s in p.made.sentences]
    for line in (*sentences, *(f"note: {note}" for note in chosen.notes)):
        console.print(line, soft_wrap=True)
    return entry.printed(console)


def _chunks(
    width: int, labels: Sequence[tuple[str, ...]], blocks: Sequence[Block]
) -> list[Table | Text]:
    """Splits columns over as few tables as the width allows, at least one column each."""
    shown = [(b.short, [row for row in b.rows if not row.page_only]) for b in blocks]
    rows = [row for _, part in shown for row in part]
    first = min(max((len(in_words(row.label)) + 2 for row in rows), default=0), LABEL_WIDTH)
    widths = [
        max([min(max(map(len, label)), HEAD_WIDTH), *(len(text_of(r.values[place])) for r in rows)])
        for place, label in enumerate(labels)
    ]
    chunks: list[Table | Text] = []
    start = 0
    while start < len(labels):
        fitting = [w for w in accumulate(w + 2 for w in widths[start:]) if w <= width - first]
        places = range(start, start + max(1, len(fitting)))
        drawn = writing.bare()
        drawn.add_column("", overflow="fold", width=first)
        for place in places:
            head = Text("\n".join(labels[place]))
            drawn.add_column(head, justify="right", overflow="fold", width=widths[place])
        for short, part in shown:
            if part:
                drawn.add_row(Text(short))
                for row in part:
                    cells = [Text(text_of(row.values[place])) for place in places]
                    drawn.add_row(Text(f"  {in_words(row.label)}"), *cells)
                drawn.add_section()
        chunks += [Text(), drawn] if start else [drawn]
        start = places.stop
    return chunks
