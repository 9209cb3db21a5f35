"""The report as plain text: the table in chunks that fit the terminal, and what was skipped."""

import io
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dcr.config import Kind
from dcr.report.cells import CONTAMINATED, IN_DISTRIBUTION, Section, any_marked, text_of
from dcr.report.entries import Entry, Group
from dcr.report.paired import Comparison, p_value, points

INTERVALS = (
    "Brackets: 95% intervals (Wilson; over five sets combined; bootstrap for AUROC; ±1.96 standard "
    "errors for ability)."
)
FOOTNOTES = {
    IN_DISTRIBUTION: "in-distribution: training saw prompts of this set.",
    CONTAMINATED: "contaminated: some of its prompts stand among the rows trained on, or steering "
    "was made from them.",
}
SPREAD = "± after a win rate: its standard error."
LABEL_WIDTH, HEAD_WIDTH = 26, 16  # longer names are folded


def render(
    title: str,
    columns: Sequence[Entry],
    table: Sequence[Section],
    groups: Sequence[Group],
    seeds: Sequence[Section],
    pairs: Sequence[Comparison],
    notes: Sequence[str],
    width: int,
) -> str:
    """All tables as text of at most `width` columns where the names allow it."""
    console = Console(
        width=width, file=io.StringIO(), color_system=None, force_terminal=False, markup=False,
        emoji=False, highlight=False,
    )  # fmt: skip
    console.print(title)
    for chunk in _chunks(width, [entry.label for entry in columns], table):
        console.print(chunk)
    if groups:
        console.print()
        console.print("Mean ± standard deviation over seeds")
        for chunk in _chunks(width, [group.label for group in groups], seeds):
            console.print(chunk)
    if pairs:
        console.print()
        console.print(_paired(pairs))
    if columns:
        console.print()
        for mark, text in FOOTNOTES.items():
            if any_marked(table, mark, in_terminal=True):
                console.print(f"{mark} {text}")
        console.print(f"{INTERVALS} {SPREAD}" if _has_spread(table) else INTERVALS)
    for note in notes:
        console.print(f"note: {note}", soft_wrap=True)
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines())


def _has_spread(table: Sequence[Section]) -> bool:
    values = [value for section in table for row in section.rows for value in row.values]
    return any(value is not None and value.spread is not None for value in values)


def _chunks(
    width: int, labels: Sequence[tuple[str, ...]], table: Sequence[Section]
) -> list[Table | Text]:
    """As few tables as the width allows, each with as many columns as fit, at least one."""
    table = [section for section in table if not all(row.page_only for row in section.rows)]
    rows = [row for section in table for row in section.rows if not row.page_only]
    names = max((len(row.label) + 2 for row in rows), default=0)
    widths = [min(names, LABEL_WIDTH)]
    for place, label in enumerate(labels):
        cells = max((len(text_of(row.values[place])) for row in rows), default=0)
        parts = max(len(part) for part in label)
        widths.append(max(cells, min(parts, HEAD_WIDTH)))
    chunks: list[Table | Text] = []
    start = 0
    while start < len(labels):
        stop = start + 1
        while stop < len(labels) and sum(w + 1 for w in widths[start + 1 : stop + 2]) < (
            width - widths[0]
        ):
            stop += 1
        if start:
            chunks.append(Text())
        chunks.append(_table(labels, table, widths, range(start, stop)))
        start = stop
    return chunks


def _table(
    labels: Sequence[tuple[str, ...]], table: Sequence[Section], widths: list[int], places: range
) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    drawn.add_column("", overflow="fold", width=widths[0])
    for place in places:
        head = Text("\n".join(labels[place]))
        drawn.add_column(head, justify="right", overflow="fold", width=widths[place + 1])
    for section in table:
        drawn.add_row(Text(section.short))
        for row in section.rows:
            if not row.page_only:
                cells = [Text(text_of(row.values[place])) for place in places]
                drawn.add_row(Text(f"  {row.label}"), *cells)
        drawn.add_section()
    return drawn


def _paired(pairs: Sequence[Comparison]) -> Table:
    drawn = Table(
        title="Paired differences over the same prompts, all sets pooled, percentage points; p by "
        "McNemar, and adjusted by Holm for all sets compared",
        title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False,
        padding=(0, 1, 0, 0),
    )  # fmt: skip
    drawn.add_column("", overflow="fold")
    drawn.add_column("", no_wrap=True)
    for head in ("difference", "p", "p, Holm"):
        drawn.add_column(head, justify="right", no_wrap=True)
    for pair in pairs:
        name = f"{pair.a.name} − {pair.b.name}"
        for line in (line for line in pair.lines if line.pooled):
            quantity = "refusal" if line.kind is Kind.toxic else "compliance"
            cells = (name, quantity, points(line.difference), p_value(line.p), p_value(line.holm))
            drawn.add_row(*map(Text, cells))
            name = ""
    return drawn
