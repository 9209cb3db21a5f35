"""Discernment in a report: rankings by the refusal mass of sets, of their pool, and of pairs."""

import math
from collections.abc import Mapping, Sequence

from dcr.core.config import Kind
from dcr.core.evaluation import discernment
from dcr.core.evaluation.sets import pairs_of
from dcr.core.results.frame import contaminated
from dcr.core.results.schema import Discernment, Estimate, RankedSet, Ranking, SetCounts, interval
from dcr.report import paper
from dcr.report.paper import PaperRow, PaperTable
from dcr.report.records import Column, Completions
from dcr.report.sections import Selection
from dcr.report.tables import (
    CONTAMINATED,
    IN_DISTRIBUTION,
    Block,
    Cell,
    Grid,
    Row,
    any_marked,
    in_words,
    keyword_blocks,
    marked_sets,
    together,
)

POOLED, UNMARKED = "pooled", f"pooled without {IN_DISTRIBUTION}"
EQUAL = "answered at equal safety, %"
TITLE = "Discernment, and answers at equal safety"
HEADS = {
    "auroc": "AUROC",
    **{f"answered/{share}": f"answered, safety {share}" for share in discernment.SAFETY},
    **{f"refused/{share}": f"refused, {share:.0%} over-refusal"
       for share in discernment.OVER_REFUSAL},
}  # fmt: skip
NOTES = (
    "Toxic prompts are ranked above seemingly toxic ones by the refusal mass of the first answer "
    "token; AUROC 0.5 is chance.",
    "answered, safety s: share of seemingly toxic prompts below the threshold at which a share s "
    "of the toxic ones is refused. refused, f over-refusal: share of toxic prompts at or above the "
    "threshold at which at most a share f of the seemingly toxic ones is.",
    "95% bootstrap intervals over prompts; means over seeds with their standard deviation.",
)

INTERVALS = (
    "Brackets: 95% intervals (Wilson; of means over sets by squaring and adding theirs; bootstrap "
    "for AUROC). Discernment AUROC: how well the first-token refusal mass ranks toxic above "
    "seemingly toxic prompts; 0.5 is chance. Answered at equal safety: the share of seemingly "
    "toxic prompts below the threshold of this mass at which such a share of the toxic ones is "
    "refused."
)

# by the label of a row of sets, every column's ranking and its marks
Rows = dict[str, tuple[tuple[Ranking, str] | None, ...]]


def rankings(columns: Sequence[Column], completions: Completions) -> Rows:
    """All sets pooled, those that no column was trained on, and the pairs; {} if nobody ranked.

    The second is computed from the masses of single prompts, since every column must leave out the
    same sets; it is absent if no column was trained on a set.
    """
    kept = [together(_sets(column)) for column in columns]
    rows: Rows = {
        POOLED: tuple(
            _marked(column, _of(column).pooled, names)
            for column, names in zip(columns, kept, strict=True)
        )
    }
    marked = {
        name
        for column, names in zip(columns, kept, strict=True)
        for name in names
        if _sets(column)[name].in_distribution
    }
    if marked:
        kept = [[name for name in names if name not in marked] for names in kept]
        rows[UNMARKED] = tuple(
            _marked(column, _ranked(column, names, completions), names)
            for column, names in zip(columns, kept, strict=True)
        )
    known = pairs_of(name for column in columns for name in _sets(column))
    for label in dict.fromkeys(n for e in columns for n in _of(e).pairs):
        names = [name for side in known.get(label, (label.split(" / "),)) for name in side]
        rows[label] = tuple(_marked(e, _of(e).pairs.get(label), names) for e in columns)
    return {label: values for label, values in rows.items() if any(values)}


def _of(column: Column) -> Discernment:
    return column.evaluation.discernment or Discernment()


def _sets(column: Column) -> Mapping[str, SetCounts | RankedSet]:
    """The sets that were ranked, with what is known of them where they were answered as well."""
    answered = column.evaluation.sets
    ranked = _of(column).sets
    return {name: answered.get(name, of) for name, of in ranked.items()} if ranked else answered


def _marked(
    column: Column, ranking: Ranking | None, names: Sequence[str]
) -> tuple[Ranking, str] | None:
    if ranking is None or ranking.auroc[0] is None or not math.isfinite(ranking.auroc[0]):
        return None
    sets = [of for name, of in _sets(column).items() if name in names]
    known = IN_DISTRIBUTION if any(of.in_distribution for of in sets) else ""
    seen = any(contaminated(column.evaluation, name) for name in names)
    return ranking, known + (CONTAMINATED if seen else "")


def _ranked(column: Column, names: Sequence[str], completions: Completions) -> Ranking | None:
    """The ranking over some sets, as the evaluation computes it over all; None where one lacks."""
    masses: dict[Kind, list[float]] = {Kind.toxic: [], Kind.seemingly_toxic: []}
    for name in names:
        of = _sets(column)[name]
        own = completions.masses(column, name, of.ids)
        if own is None or len(own) < of.n:
            return None
        masses[of.kind] += own
    seed = column.evaluation.settings.get("seed")
    ranked = discernment.ranking(
        masses[Kind.toxic], masses[Kind.seemingly_toxic], seed if isinstance(seed, int) else 0
    )
    return Ranking.model_validate(ranked) if ranked else None


def ranked_blocks(columns: Sequence[Column], completions: Completions) -> list[Block]:
    """AUROCs, and what is answered where shares of the toxic prompts are refused."""
    by_sets = rankings(columns, completions)
    aurocs = [
        Row(
            label,
            tuple(value and _cell(value[0].auroc, value[1]) for value in values),
            summary=label in (POOLED, UNMARKED),
            page_only=label not in (POOLED, UNMARKED),
        )
        for label, values in by_sets.items()
    ]
    fairest = by_sets.get(UNMARKED, by_sets.get(POOLED, ()))
    rows = [
        Row(
            f"safety {share}" + (f", without {IN_DISTRIBUTION}" if UNMARKED in by_sets else ""),
            tuple(
                _cell(value[0].answered[str(share)], value[1], percent=True)
                if value and str(share) in value[0].answered
                else None
                for value in fairest
            ),
            summary=True,
        )
        for share in discernment.SAFETY
    ]
    answered = [row for row in rows if any(row.values)]
    title = "Seemingly toxic prompts answered where so much of the toxic ones is refused, %"
    return [
        *([Block("Discernment AUROC", "discernment AUROC", aurocs)] if aurocs else []),
        *([Block(title, EQUAL, answered)] if answered else []),
    ]


def _cell(estimate: Estimate, marks: str, percent: bool = False) -> Cell:
    known = interval(estimate)
    return Cell(known.estimate, known.low, known.high, marks=marks, percent=percent)


def results(chosen: Selection) -> Grid:
    """Verdicts by the paper's keyword rules, and discernment."""
    columns = chosen.columns
    blocks = [*keyword_blocks(columns), *ranked_blocks(columns, chosen.completions)]
    notes = [INTERVALS]
    if marked := sorted(map(in_words, marked_sets(columns))):
        notes.append(
            f"{IN_DISTRIBUTION} in-distribution: training saw prompts of this set "
            f"({'; '.join(marked)}); “unseen groups” are its prompts whose template group training "
            "never saw."
        )
    if any_marked(blocks, CONTAMINATED):
        notes.append(
            f"{CONTAMINATED} contaminated: some prompts of this set stand among the rows trained "
            "on: the same, nearly the same, or sharing long runs of words (“exact / near / n-gram "
            "in training”), or steering was made from them (“seen by steering”)."
        )
    return Grid(columns, blocks, notes)


def table(chosen: Selection) -> PaperTable:
    """Every number of every ranking: sets down the side, below each the methods."""
    columns, rows = chosen.columns, list[PaperRow]()
    for label, values in rankings(columns, chosen.completions).items():
        ours = [
            paper.our_row(column, _cells(*value) if value else {}, label)
            for column, value in zip(columns, values, strict=True)
        ]
        ours += [paper.mean_row(group, ours) for group in chosen.groups]
        rows += [row for row in ours if row.cells]
    notes = [*paper.mark_notes(rows), *NOTES, *_unseen(columns)]
    return PaperTable(TITLE, HEADS, rows, notes, judge_head="sets")


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


def _cells(ranking: Ranking, marks: str) -> dict[str, Cell]:
    cells = {"auroc": _cell(ranking.auroc, marks)}
    for name in ("answered", "refused"):
        for share, of in getattr(ranking, name).items():
            if f"{name}/{share}" in HEADS:
                cells[f"{name}/{share}"] = _cell(of, marks)
    return cells
