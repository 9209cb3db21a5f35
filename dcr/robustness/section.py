"""Answers under attack, as tasks=[robustness] measures them: a table by attack, and bars."""

from functools import partial

from dcr import inference
from dcr.core.config import Kind
from dcr.core.evaluation.sets import APART
from dcr.outcomes import Outcome
from dcr.report import outcomes
from dcr.report.figures import Drawing, Drawings, Panel
from dcr.report.grids import Block, Cell, Grid, Row
from dcr.report.records import Evaluation
from dcr.report.sections import Selection
from dcr.results.schema import interval
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
            Row(words(a), tuple(_shares(c.evaluation, a, kind).get(wanted) for c in columns))
            for a in attacks
        ]
        if any(any(row.values) for row in rows):
            blocks.append(Block(title, f"under attack: {short}", rows))
    ranked = [Row(words(a), tuple(_auroc(c.evaluation, a) for c in columns)) for a in attacks]
    if rows := [row for row in ranked if any(row.values)]:
        blocks.append(Block("Discernment AUROC under attack", "under attack: AUROC", rows))
    return Grid(columns, blocks)


def bars(chosen: Selection) -> Drawings:
    """Outcomes under attack.

    All sets of a kind together; a bar is 100% of the answers.
    """
    drawings = []
    for column in chosen.columns:
        panels, height = [], 0.0
        for kind in TITLES:
            found = [(words(a), _shares(column.evaluation, a, kind)) for a in _attacks(chosen)]
            drawn = [(name, shares) for name, shares in found if shares]
            if drawn:
                axes = {"xlim": (0, 1), "xlabel": "share of answers"}
                paint = partial(outcomes.paint, drawn, not panels)
                panels.append(Panel(title=kind.value.replace("_", " "), axes=axes, paint=paint))
                height = max(height, 0.9 + 0.4 * len(drawn))
        if panels:
            name = f"robustness{len(drawings) + 1}"
            title, legend = f"Outcomes under attack: {column.name}", outcomes.legend()
            size = (4.4, height)
            drawings.append(Drawing(name, title, {"": panels}, legend=legend, size=size))
    return Drawings(drawings)


def _attacks(chosen: Selection) -> list[str]:
    return [*dict.fromkeys(a for c in chosen.columns for a in c.evaluation.robustness)]


def _shares(evaluation: Evaluation, attack: str, kind: Kind) -> dict[Outcome, Cell]:
    """The share of each outcome over the sets of a kind but those apart; empty without answers."""
    of = evaluation.robustness.get(attack)
    sets = of.sets.items() if of else ()
    asked = [counts for name, counts in sets if counts.kind is kind and name not in APART]
    total = sum(counts.n for counts in asked)
    if not total:
        return {}
    cells = {}
    for each in Outcome:
        count = sum(counts.outcomes.get(each.value, 0) for counts in asked)
        cells[each] = Cell(*vars(inference.wilson(count, total)).values(), n=total)
    return cells


def _auroc(evaluation: Evaluation, attack: str) -> Cell | None:
    of = evaluation.robustness.get(attack)
    if of is None or of.ranking is None:
        return None
    return Cell(*vars(interval(of.ranking.auroc)).values(), percent=False)
