"""Discernment in a report: rankings by the refusal mass of sets, of their pool, and of pairs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from dcr.core.config import Kind
from dcr.core.evaluation import APART, scoring
from dcr.report import paper
from dcr.report.columns import Column
from dcr.report.grids import IN_DISTRIBUTION, Cell, of_row
from dcr.report.paper import PaperRow
from dcr.report.records import Completions
from dcr.report.sections import Selection
from dcr.report.writing import TextTable
from dcr.results.frame import contaminated, of_ranking
from dcr.results.schema import Discernment, RankedSet, Ranking, SetCounts

POOLED, UNMARKED = "pooled", f"pooled without {IN_DISTRIBUTION}"
TITLE = "Discernment, and answers at equal safety"
HEADS = {
    "auroc": "AUROC",
    **{f"answered/{share}": f"answered, safety {share}" for share in scoring.SAFETY},
    **{f"refused/{share}": f"refused, {share:.0%} over-refusal"
       for share in scoring.OVER_REFUSAL},
}  # fmt: skip
NOTES = (
    "Toxic prompts are ranked above seemingly toxic ones by the refusal mass of the first answer "
    "token; AUROC 0.5 is chance.",
    "answered, safety s: share of seemingly toxic prompts below the threshold at which a share s "
    "of the toxic ones is refused. refused, f over-refusal: share of toxic prompts at or above the "
    "threshold at which at most a share f of the seemingly toxic ones is.",
    "95% bootstrap intervals over prompts; means over seeds with their standard deviation.",
)

AUROC = "discernment"  # as results call it
QUANTITIES = {  # of results, by HEADS
    "auroc": AUROC,
    **{f"answered/{share}": f"answered_at_safety/{share}" for share in scoring.SAFETY},
    **{f"refused/{share}": f"refused_at_over_refusal/{share}" for share in scoring.OVER_REFUSAL},
}
Cells = dict[str, Cell]  # by HEADS
Rows = Mapping[str, Mapping[str, Any]]  # of results, by quantity


def rankings(chosen: Selection) -> dict[str, tuple[Cells, ...]]:
    """All sets pooled, those that no column was trained on, and the pairs, a ranking a column.

    The second is computed from the masses of single prompts, since every column must leave out the
    same sets; it is absent if no column was trained on a set. A row that nobody ranked is absent.
    """
    columns = chosen.columns
    labels = [POOLED, *dict.fromkeys(name for column in columns for name in _of(column).pairs)]
    rows = {label: [_rows(column, label) for column in columns] for label in labels}
    pools = [
        {name: of for name, of in ranked_sets(column).items() if name not in APART}
        for column in columns
    ]
    if marked := {name for pool in pools for name, of in pool.items() if of.in_distribution}:
        unmarked = [[name for name in pool if name not in marked] for pool in pools]
        ranked = [
            _ranked(*each, chosen.completions) for each in zip(columns, unmarked, strict=True)
        ]
        rows = {POOLED: rows.pop(POOLED), UNMARKED: ranked, **rows}
    cells = {label: tuple(map(_cells, of)) for label, of in rows.items()}
    return {label: of for label, of in cells.items() if any(of)}


def _of(column: Column) -> Discernment:
    return column.evaluation.discernment or Discernment()


def ranked_sets(column: Column) -> Mapping[str, SetCounts | RankedSet]:
    """The sets that were ranked, with what is known of them where they were answered as well."""
    answered = column.evaluation.sets
    ranked = _of(column).sets
    return {name: answered.get(name, of) for name, of in ranked.items()} if ranked else answered


def _rows(column: Column, label: str) -> Rows:
    """A ranking's rows of results by quantity."""
    pivot = column.evaluation.pivot
    return {
        of: row for of in QUANTITIES.values() if (row := pivot.get((of, "", ""), {}).get(label))
    }


def _cells(rows: Rows) -> Cells:
    """The numbers of a ranking with their marks; {} without one."""
    if not math.isfinite(rows.get(AUROC, {}).get("value", math.nan)):
        return {}
    return {key: of_row(rows[of], key != "auroc") for key, of in QUANTITIES.items() if of in rows}


def _ranked(column: Column, names: Sequence[str], completions: Completions) -> Rows:
    """The ranking over some sets, as the evaluation computes it over all; {} where one lacks."""
    masses: dict[Kind, list[float]] = {Kind.toxic: [], Kind.seemingly_toxic: []}
    for name in names:
        of = ranked_sets(column)[name]
        own = completions.masses(column.evaluation, name, of.ids)
        if own is None or len(own) < of.n:
            return {}
        masses[of.kind] += own
    seed = column.evaluation.settings.get("seed")
    ranked = scoring.ranking(
        masses[Kind.toxic], masses[Kind.seemingly_toxic], seed if isinstance(seed, int) else 0
    )
    rows = of_ranking(UNMARKED, Ranking.model_validate(ranked)) if ranked else ()
    seen = any(contaminated(column.evaluation, name) for name in names)
    marks = {"in_distribution": False, "contaminated": seen}
    return {row["quantity"]: row | marks for row in rows}


def table(chosen: Selection) -> TextTable:
    """Every number of every ranking: sets down the side, below each the methods."""
    columns, rows = chosen.columns, list[PaperRow]()
    for label, values in rankings(chosen).items():
        of = zip(columns, values, strict=True)
        ours = [paper.our_row(column, cells, label) for column, cells in of]
        ours += [paper.mean_row(group, ours) for group in chosen.groups]
        rows += [row for row in ours if row.cells]
    notes = [*paper.mark_notes(rows), *NOTES, *_unseen(columns)]
    return paper.written(TITLE, HEADS, rows, notes, "sets")


def _unseen(columns: Sequence[Column]) -> list[str]:
    """Notes on the masses that a server showed only in part."""
    return [
        f"{column.name}: its server shows the likeliest tokens alone; of a prompt's mass "
        f"{mean:.2g} on average, {most:.2g} at most, may be unseen, so that the pooled AUROC of "
        f"the whole mass lies between {low:.3f} and {high:.3f}."
        for column in columns
        if (of := _of(column)).unseen and of.pooled and of.pooled.auroc_bounds
        for mean, most, low, high in [(of.unseen.mean, of.unseen.max, *of.pooled.auroc_bounds)]
        if None not in (mean, most, low, high)
    ]
