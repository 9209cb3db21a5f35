"""The tables of what the core counts, of calibration, of a user's own tasks and over seeds."""

import math
from collections.abc import Sequence
from dataclasses import replace

from dcr.core import extending
from dcr.core.config import Kind
from dcr.core.evaluation import scoring
from dcr.report import discernment, grids
from dcr.report.columns import Column
from dcr.report.discernment import POOLED, UNMARKED
from dcr.report.grids import Block, Cell, Cells, Grid, Row
from dcr.report.sections import Selection
from dcr.report.writing import TextTable

TITLES = {  # on the page, and in the narrow terminal
    Kind.seemingly_toxic: ("Compliance with seemingly toxic prompts, %", "compliance, %"),
    Kind.toxic: ("Keyword refusal of toxic prompts, %", "keyword refusal, %"),
}
FAULTS = {  # their names in tables
    "empty": "empty",
    "truncated": "cut off at the limit",
    "repetitive": "repetitive",
    "non_english": "not English",
    "unanswered": "unanswered",
}
EQUAL = "answered at equal safety, %"
AVERAGED = ("results", "judges", "agreement", "general")  # sections with a mean over seeds


def results(chosen: Selection) -> Grid:
    """Results.

    A model that discerns answers prompts that only seem toxic and refuses those that are: high in
    both parts of the table. Verdicts in this table are by keywords (the paper's rules unless named
    otherwise), so “keyword refusal” says how an answer reads, not whether it is harmful.
    """
    columns = chosen.columns
    blocks = [*keyword_blocks(columns), *ranked_blocks(chosen)]
    notes = [grids.INTERVALS, *discernment.NOTES[:2]]
    if marked := sorted(map(grids.in_words, grids.marked_sets(columns))):
        notes.append(
            f"{grids.IN_DISTRIBUTION} in-distribution: training saw prompts of this set "
            f"({'; '.join(marked)}); “unseen groups” are its prompts whose template group training "
            "never saw."
        )
    if grids.CONTAMINATED in grids.footnotes(blocks):
        notes.append(
            f"{grids.CONTAMINATED} contaminated: some prompts of this set stand among the rows "
            "trained on: the same, nearly the same, or sharing long runs of words (“exact / near / "
            "n-gram in training”), or steering or a gate was made from them (“seen by steering or "
            "gate”)."
        )
    return Grid(columns, blocks, notes)


def keyword_blocks(columns: Sequence[Column], rules: str = "paper") -> list[Block]:
    """The verdicts by some keyword rules, with sets in rows."""
    blocks, judge = [], f"keyword:{rules}"
    for kind, (title, short) in TITLES.items():
        names = grids.set_names(columns, kind)
        others = [of for of in ("partial", "complied", "refused") if of != grids.WANTED[kind]]
        sums = others if rules != "paper" else ()
        rows = grids.rate_rows(columns, names, grids.WANTED[kind], judge, aside=_unseen, sums=sums)
        empty = grids.rates(columns, grids.together(names), "empty", "")
        if any(cell and cell.estimate for cell in empty):
            rows.append(Row("empty, all sets", empty, True, aside=grids.n_of(empty)))
        blocks += [Block(title, short, rows)] if rows else []
    return blocks


def _unseen(column: Column, name: str) -> str:
    counts = column.evaluation.sets[name]
    unseen = counts.unseen and grids.rate(
        column.evaluation, [name], f"{grids.WANTED[counts.kind]}/unseen"
    )
    return f"unseen groups, %: {grids.text_of(unseen, 1)} of {unseen.n}" if unseen else ""


def ranked_blocks(chosen: Selection) -> list[Block]:
    """AUROCs, and what is answered where shares of the toxic prompts are refused."""
    by_sets = discernment.rankings(chosen)
    aurocs = []
    for label, values in by_sets.items():
        cells, summed = tuple(of.get("auroc") for of in values), label in (POOLED, UNMARKED)
        aurocs.append(Row(label, cells, summed, page_only=not summed))
    fairest = by_sets.get(UNMARKED, by_sets.get(POOLED, ()))
    without = f", without {grids.IN_DISTRIBUTION}" if UNMARKED in by_sets else ""
    answered = [
        Row(f"safety {share}{without}", cells, summary=True)
        for share in scoring.SAFETY
        if any(cells := tuple(of.get(f"answered/{share}") for of in fairest))
    ]
    title = "Seemingly toxic prompts answered where so much of the toxic ones is refused, %"
    blocks = [
        Block("Discernment AUROC", "discernment AUROC", aurocs),
        Block(title, EQUAL, answered),
    ]
    return [block for block in blocks if block.rows]


def recommended(chosen: Selection) -> Grid:
    """The same verdicts by the recommended rules.

    They are meant to agree better with people. An answer that refuses in part counts as neither
    compliance nor refusal here and stands apart, as XSTest counts it.
    """
    return Grid(chosen.columns, keyword_blocks(chosen.columns, "recommended"))


def own_tasks(chosen: Selection) -> Grid:
    """By tasks of one's own.

    Brackets are 95% intervals where the task gives them.
    """
    columns, blocks = chosen.columns, []
    found = [column.evaluation.own for column in columns]

    def cell(known: tuple[float, float, float]) -> Cell | None:
        value, low, high = (None if math.isnan(end) else end for end in known)
        return None if value is None else Cell(value, low, high, percent=False)

    for name in dict.fromkeys(name for by_name in found for name in by_name):
        made = {f"{of[name].path}, source sha256 {of[name].sha256}" for of in found if name in of}
        rows = grids.rows_by_key(
            columns, lambda e, n=name: e.own[n].numbers if n in e.own else {}, cell, " ".join
        )
        blocks += [Block(f"{name} ({'; '.join(sorted(made))})", name, rows)] if rows else []
    return Grid(columns, blocks)


def general(chosen: Selection, *parts: str) -> Grid:
    """Ability and quality.

    Ability: brackets are ±1.96 standard errors. Quality: win rate over the reference's answers, ±
    one standard error; 50 is a draw.
    """
    return Grid(chosen.columns, [block for part in parts for block in extending.ours(part)(chosen)])


def faults(chosen: Selection) -> Grid:
    """Faulty completions: empty, cut off, repetitive, not English."""
    columns, rows = chosen.columns, []
    names = list(dict.fromkeys(name for column in columns for name in column.evaluation.sets))

    def counts(over: Sequence[str], fault: str) -> Cells:
        cells = grids.rates(columns, over, fault, "")
        return tuple(c and grids.words(f"{round(c.estimate * (c.n or 0))} of {c.n}") for c in cells)

    for fault, label in FAULTS.items():
        total = counts(grids.together(names), fault)
        by_set = [counts([name], fault) for name in names]
        # only an endpoint leaves prompts unanswered, so the row stands only if there are any
        told = [cell for cells in by_set for cell in cells if cell and cell.text[:2] != "0 "]
        if any(total) and (told or fault != "unanswered"):
            rows.append(Row(label, total, summary=True))
            rows += [Row(*of, page_only=True) for of in zip(names, by_set, strict=True)]
    title = "Faulty completions, over all sets and by set"
    return Grid.of(columns, title, "faulty completions", rows)


def over_seeds(chosen: Selection) -> Grid:
    """Mean ± standard deviation over seeds."""
    blocks = []
    for name in AVERAGED if chosen.groups else ():
        for block in chosen.section(name).blocks:
            rows = []
            for row in block.rows:
                cells = tuple(grids.of_group(group, row.values) for group in chosen.groups)
                rows += [replace(row, values=cells, aside="")] if any(cells) else []
            blocks += [replace(block, rows=rows)] if rows else []
    return Grid(chosen.groups, blocks)


# Not in dcr/calibration: all files there count in the hash that says whether its records hold.
def calibrated(chosen: Selection) -> TextTable | None:
    """Calibration: achieved against target.

    A bias on the first token of refusals, or a gate's threshold, was chosen so that a share of the
    validation prompts is refused. What it brings on other toxic prompts is measured; it may miss,
    and by set it may miss either way. “Off by” are percentage points above or below the target, by
    keywords.
    """
    rows = list[tuple[str, ...]]()
    for column in chosen.columns:
        evaluation = column.evaluation
        calibration = evaluation.calibration
        if calibration is None or (target := calibration.target) is None:
            continue
        for name, of in calibration.sets.items():
            if of.kind is Kind.toxic and of.n:
                told = _against(target, Cell(of.refused / of.n, n=of.n))
                rows.append((column.name, f"{grids.in_words(name)}, chosen on", *told, "–"))
        names = grids.set_names([column], Kind.toxic)
        for label, sets in [*((name, [name]) for name in names), ("all sets", names)]:
            pooled = grids.together(sets) or sets
            if refused := grids.rate(evaluation, pooled, "refused"):
                judged = grids.text_of(grids.rate(evaluation, pooled, "refused", grids.OUTCOME))
                told = *_against(target, refused), judged
                rows.append((column.name, grids.in_words(label), *told))
    heads = "run", "toxic prompts", "target, %", "refused, %", "off by", "refused by outcome, %"
    return TextTable.of(rows, *heads)


def _against(target: float, refused: Cell) -> tuple[str, str, str]:
    off_by = f"{100 * (refused.estimate - target):+.1f}"
    return f"{100 * target:.0f}", grids.text_of(refused), off_by
