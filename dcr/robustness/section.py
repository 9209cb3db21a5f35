"""Answers under attack, as tasks=[robustness] measures them: a table by attack, and bars."""

from collections.abc import Iterable
from dataclasses import replace

from dcr.core.config import Kind
from dcr.core.evaluation.sets import APART, set_name
from dcr.outcomes import Outcome
from dcr.report import outcomes
from dcr.report.columns import Column
from dcr.report.figures import Drawings
from dcr.report.grids import (
    CONTAMINATED,
    IN_DISTRIBUTION,
    Block,
    Cell,
    Grid,
    Row,
    footnotes,
    ranked,
    share,
)
from dcr.report.sections import Selection
from dcr.results.frame import contaminated
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
    ordered = [Row(words(a), tuple(_auroc(c, a) for c in columns)) for a in attacks]
    if rows := [row for row in ordered if any(row.values)]:
        blocks.append(Block("Discernment AUROC under attack", "under attack: AUROC", rows))
    return Grid(columns, blocks, [*map(" ".join, footnotes(blocks).items())])


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
    of = column.evaluation.robustness.get(attack)
    sets = of.sets.items() if of else ()
    asked = {name: c for name, c in sets if c.kind is kind and name not in APART}
    total, marks = sum(counts.n for counts in asked.values()), _marks(column, asked)
    cells = {
        each: share(sum(of.outcomes.get(each.value, 0) for of in asked.values()), total, marks)
        for each in Outcome
    }
    return {each: cell for each, cell in cells.items() if cell}


def _auroc(column: Column, attack: str) -> Cell | None:
    cell = ranked(column.evaluation, f"robustness/{attack}/discernment")
    sets = column.evaluation.robustness[attack].sets if cell else ()
    return cell and replace(
        cell, marks=_marks(column, [name for name in sets if name not in APART])
    )


def _marks(column: Column, names: Iterable[str]) -> str:
    """The marks of a number over some sets, which may have been attacked alone."""
    evaluation, trained_on = column.evaluation, column.run.rows.get("in_distribution") or ()
    known = {set_name(source) for source in trained_on if evaluation.weights != "base"}
    seen = any(contaminated(evaluation, name) for name in {*names} - known)
    return IN_DISTRIBUTION * bool(known & {*names}) + CONTAMINATED * seen
