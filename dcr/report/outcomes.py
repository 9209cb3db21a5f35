"""The outcomes of answers, as `judge=outcome` tells them: a table, and a bar for each kind.

Not in dcr/outcomes: all files there count in the hash that says whether its records hold.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

from dcr.core.config import Kind
from dcr.outcomes import Outcome
from dcr.report import figures, grids
from dcr.report.figures import Drawing, Drawings, Panel
from dcr.report.grids import OUTCOME, Block, Cell, Grid, Row
from dcr.report.sections import Selection

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COUNTED = {  # the one outcome that is wanted, and the titles of its share
    Kind.seemingly_toxic: (Outcome.answered, "Compliance with seemingly toxic prompts", "compl."),
    Kind.toxic: (Outcome.refused, "Safety: toxic prompts refused without help", "safety"),
}
COLOURS = {  # from what is answered over what refuses to what is neither
    Outcome.answered: figures.PALETTE[1],
    Outcome.refused_but_helped: figures.PALETTE[6],
    Outcome.partly_refused: figures.PALETTE[5],
    Outcome.refused: figures.PALETTE[2],
    Outcome.circular: "#4d4d4d",
    Outcome.cut_off: figures.PALETTE[0],
    Outcome.other_language: "#b0b0b0",
    Outcome.empty: "#dedede",
}
NAME_WIDTH = 26  # characters of a line beside the bars
Shares = tuple[str, Mapping[Outcome, Cell]]  # of one bar, with its name


def table(chosen: Selection) -> Grid:
    """Outcomes of answers.

    Compliance counts answered prompts alone, safety those refused without help; each answer has one
    outcome, from all of its text. The share by XSTest's keywords stands beside them.
    """
    columns, blocks = chosen.columns, []
    for kind, (wanted, title, short) in COUNTED.items():
        names = grids.set_names(columns, kind)
        rows = grids.rate_rows(columns, names, wanted.value, OUTCOME, "")
        if not rows:
            continue
        named, found = grids.plain(kind.value), _shares(chosen, kind)
        sets = grids.together(names)
        keyword = tuple(
            grids.rate(column.evaluation, sets, grids.WANTED[kind]) if cells else None
            for column, cells in zip(columns, found, strict=True)
        )
        rows.append(Row("pooled, by XSTest's keywords", keyword))
        blocks.append(Block(f"{title} by outcome, %", f"{short} by outcome, %", rows))
        shares = [
            Row(grids.plain(each), tuple(cells.get(each) for cells in found), summary=True)
            for each in Outcome
        ]
        heading = f"Outcomes of answers to {named} prompts, all sets, %"
        blocks.append(Block(heading, f"outcomes, {named}, %", shares))
    return Grid(columns, blocks)


def bars(chosen: Selection) -> Drawings:
    """Outcomes by kind of prompt.

    All sets of a kind together; a bar is 100% of the answers.
    """
    found = {
        kind: [
            (column.name, cells)
            for column, cells in zip(chosen.columns, _shares(chosen, kind), strict=True)
            if cells
        ]
        for kind in COUNTED
    }
    return drawings("outcomes", "Outcomes by kind of prompt", {"": found})


def drawings(
    name: str, title: str, blocks: Mapping[str, Mapping[Kind, Sequence[Shares]]]
) -> Drawings:
    """One drawing of blocks under their titles: a panel a kind, with a bar for each named share."""
    drawn, height = dict[str, list[Panel]](), 0.0
    for block, found in blocks.items():
        named = list[str]()
        for kind, shares in found.items():
            # once for both, unless a bar has answers to one kind alone
            before, named = named, [figures.folded(of, NAME_WIDTH, lines=4) for of, _ in shares]
            lines = max((of.count("\n") + 1 for of in named), default=1)
            height = max(height, 0.9 + max(0.4, 0.17 * lines) * len(shares))
            if shares:
                axes = {"xlim": (0, 1), "xlabel": "share of answers"}
                shown = named if named != before else [""] * len(named)
                stacked = partial(_paint, [cells for _, cells in shares], shown)
                panel = Panel(title=grids.plain(kind.value), axes=axes, paint=stacked)
                drawn.setdefault(block, []).append(panel)
    legend = [(grids.plain(k), {"color": c, "marker": "s", "ls": ""}) for k, c in COLOURS.items()]
    drawing = Drawing(name, title, drawn, legend=legend, size=(4.4, height))
    return Drawings([drawing] if drawn else [])


def _paint(shares: Sequence[Mapping[Outcome, Cell]], named: Sequence[str], axes: "Axes") -> None:
    for place, cells in enumerate(shares):
        left = 0.0
        for kind, colour in COLOURS.items():
            if cell := cells.get(kind):
                axes.barh(place, cell.estimate, left=left, color=colour, height=0.7)
                left += cell.estimate
    axes.set_yticks(range(len(named)), named)
    axes.invert_yaxis()
    axes.grid(False)


def _shares(chosen: Selection, kind: Kind) -> list[dict[Outcome, Cell]]:
    """The share of each outcome over a column's sets of a kind; empty where it was not judged."""
    names = grids.together(grids.set_names(chosen.columns, kind))
    found = []
    for column in chosen.columns:
        cells = {each: grids.rate(column.evaluation, names, each, OUTCOME) for each in Outcome}
        known = {each: cell for each, cell in cells.items() if cell}
        found.append(known if len(known) == len(Outcome) else {})
    return found
