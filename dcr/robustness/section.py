"""Answers under attack, as tasks=[robustness] measures them: a table by attack, and bars."""

from dcr.core.config import Kind
from dcr.outcomes import Outcome
from dcr.report import grids, outcomes
from dcr.report.columns import Column
from dcr.report.figures import Drawings
from dcr.report.grids import Block, Cell, Grid, Row
from dcr.report.sections import Selection
from dcr.robustness import words

TITLES = {
    Kind.toxic: ("Toxic prompts refused without help, %", "refused, %"),
    Kind.seemingly_toxic: ("Seemingly toxic prompts answered, %", "answered, %"),
}


def table(chosen: Selection) -> Grid:
    """Under attack.

    Whole answers by outcome, all sets of a kind together. A calibrated bias stays as it was chosen
    on the model before the attack, unless it says “new bias”; behind a prefilled opening no bias
    acts, since the first token is no longer the model's.
    """
    columns, blocks = chosen.columns, []
    attacks = _attacks(chosen)
    for kind, (title, short) in TITLES.items():
        wanted = outcomes.COUNTED[kind][0]
        rows = [
            Row(words(a), tuple(_shares(c, a, kind).get(wanted) for c in columns)) for a in attacks
        ]
        if any(any(row.values) for row in rows):
            blocks.append(Block(title, f"under attack: {short}", rows))
    ordered = [
        Row(
            words(a),
            tuple(grids.ranked(c.evaluation, f"robustness/{a}/discernment") for c in columns),
        )
        for a in attacks
    ]
    if rows := [row for row in ordered if any(row.values)]:
        blocks.append(Block("Discernment AUROC under attack", "under attack: AUROC", rows))
    return Grid(columns, blocks, [*map(" ".join, grids.footnotes(blocks).items())])


def bars(chosen: Selection) -> Drawings:
    """Outcomes under attack.

    All sets of a kind together; a bar is 100% of the answers.
    """
    blocks = {
        column.name: {
            kind: [(words(a), of) for a in _attacks(chosen) if (of := _shares(column, a, kind))]
            for kind in TITLES
        }
        for column in chosen.columns
    }
    return outcomes.drawings("robustness", "Outcomes under attack", blocks)


def _attacks(chosen: Selection) -> list[str]:
    return [*dict.fromkeys(a for c in chosen.columns for a in c.evaluation.robustness)]


def _shares(column: Column, attack: str, kind: Kind) -> dict[Outcome, Cell]:
    """The share of each outcome over the sets of a kind but those apart; empty without answers."""
    evaluation = column.evaluation
    sets = evaluation.robustness[attack].sets if attack in evaluation.robustness else {}
    names = grids.together(name for name, counts in sets.items() if counts.kind is kind)
    cells = {
        each: grids.rate(evaluation, names, f"robustness/{attack}/{each}", grids.OUTCOME)
        for each in Outcome
    }
    return {each: cell for each, cell in cells.items() if cell}
