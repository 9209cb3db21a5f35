"""Answer quality on the page: win rates by annotator."""

from dcr.report.grids import FAILED, Block, Cell, rows_by_key, words
from dcr.report.paper import annotator_name
from dcr.report.records import Evaluation
from dcr.report.sections import Selection
from dcr.results.schema import Quality


def win_rates(chosen: Selection) -> list[Block]:
    """A block for each annotator, with the rates against the reference's answers."""
    columns, blocks = chosen.columns, []
    measured = [column.evaluation.quality for column in columns]
    for head in dict.fromkeys(annotator_name(own) for own in measured if own):

        def rates(evaluation: Evaluation, head: str = head) -> dict[str, Cell]:
            own = evaluation.quality
            return _rates(own) if own and annotator_name(own) == head else {}

        rows = rows_by_key(columns, rates, lambda cell: cell)
        blocks.append(Block(f"Answer quality, win rate, % — {head}", f"quality, %; {head}", rows))
    return blocks


def _rates(own: Quality) -> dict[str, Cell]:
    """The win rates against the reference's answers, and the comparisons that failed."""
    asides = [f"against {own.reference}" if own.reference else "", f"n\u00a0=\u00a0{own.n}"]
    if own.mean_length is not None and own.reference_length is not None:
        asides.append(f"{own.mean_length:.0f} characters, theirs {own.reference_length:.0f}")
    cells = {}
    if own.win_rate is not None:
        spread, told = (own.standard_error or 0.0) / 100, "; ".join(filter(None, asides))
        cells["win rate"] = Cell(own.win_rate / 100, spread=spread, aside=told)
    others = {"length-controlled": own.length_controlled, "discrete": own.discrete}
    cells |= {label: Cell(rate / 100) for label, rate in others.items() if rate is not None}
    return cells | {FAILED: words(f"{own.invalid} / {own.error}")}
