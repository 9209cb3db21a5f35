"""The refusals that a calibration aimed at, and those that it brought, set by set."""

from collections.abc import Sequence

from dcr.core.config import Kind
from dcr.report import outcomes, tables
from dcr.report.records import Evaluation
from dcr.report.sections import Selection
from dcr.report.tables import Cell
from dcr.report.writing import TextTable


def table(chosen: Selection) -> TextTable | None:
    """Calibration: achieved against target.

    A bias on the first token of refusals was chosen so that a share of the validation prompts is
    refused. What it brings on other toxic prompts is measured; it may miss, and by set it may miss
    either way. “Off by” are percentage points above or below the target, by keywords.
    """
    rows = list[tuple[str, ...]]()
    for column in chosen.columns:
        evaluation = column.evaluation
        calibration = evaluation.calibration
        if calibration is None or calibration.target is None:
            continue
        target = calibration.target
        for name, of in calibration.sets.items():
            if of.kind is not Kind.toxic or not of.n:
                continue
            cell = Cell(of.refused / of.n, n=of.n)
            about = f"{tables.in_words(name)}, chosen on"
            rows.append((column.name, about, *_words(target, cell), "–"))
        names = tables.set_names([column], Kind.toxic)
        for label, sets in [*((name, [name]) for name in names), ("all sets", names)]:
            refused = tables.rate(evaluation, tables.together(sets) or sets, "refused")
            told = tables.text_of(_by_outcome(evaluation, sets))
            rows.append((column.name, tables.in_words(label), *_words(target, refused), told))
    heads = "run", "toxic prompts", "target, %", "refused, %", "off by", "refused by outcome, %"
    return TextTable.of(rows, *heads)


def _words(target: float, refused: Cell | None) -> tuple[str, str, str]:
    off = "–" if refused is None else f"{100 * (refused.estimate - target):+.1f}"
    return f"{100 * target:.0f}", tables.text_of(refused), off


def _by_outcome(evaluation: Evaluation, names: Sequence[str]) -> Cell | None:
    sets = tables.together(names) or names
    return tables.rate(evaluation, sets, "refused", outcomes.JUDGE)
