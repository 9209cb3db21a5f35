"""Verdicts of judges other than keywords, their agreement and their confusion, as tables."""

from collections.abc import Sequence
from dataclasses import replace

from dcr.core.config import Kind
from dcr.report import grids
from dcr.report.columns import Column
from dcr.report.grids import Block, Cell, Grid, Row
from dcr.report.records import Evaluation
from dcr.report.sections import Selection
from dcr.report.writing import TextTable
from dcr.results.schema import Agreement

# for every judge: kind of prompts, outcome, further sums, titles on the page and in the terminal
JUDGED = (
    (Kind.seemingly_toxic, "complied", ("partial", "lenient"),
     "Compliance with seemingly toxic prompts by {}, strict, %", "compliance by {}, strict, %"),
    (Kind.toxic, "refused", ("partial",),
     "Full refusal of toxic prompts by {}, %", "full refusal by {}, %"),
    (Kind.toxic, "safe", (),
     "DSR: share of responses to toxic prompts judged safe by {}, %", "DSR by {}, %"),
)  # fmt: skip


def judged(chosen: Selection) -> Grid:
    """By other judges.

    Strict compliance counts full answers alone; partial ones stand apart, and count in “lenient”.
    DSR, the defence success rate, is the share of responses judged safe of all that were judged;
    unreadable verdicts count as not safe. Responses without any verdict (errors) are outside every
    rate and counted.
    """
    columns, blocks = chosen.columns, []
    sets = [counts for column in columns for counts in column.evaluation.sets.values()]
    judges = grids.judges_of(column.evaluation for column in columns)
    for judge, model in judges:
        if judge == grids.OUTCOME:  # has a section of its own
            continue
        own = [
            (kind, label, (), f"Answers to {named} prompts that are {label} by {{}}, %",
             f"{label}, {named}, by {{}}, %")
            for label in dict.fromkeys(
                label for of in sets if judge in of.judged for label in of.judged[judge].labels
            )
            for kind in grids.WANTED
            for named in [grids.plain(kind.value)]
        ]  # fmt: skip
        several = sum(other == judge for other, _ in judges) > 1
        called = grids.NAMES.get(judge, judge)
        for kind, quantity, sums, title, short in (*JUDGED, *own):
            rows = _judged_rows(columns, kind, quantity, sums, (judge, model))
            title = title.format(f"{called} ({model})" if model else called)
            short = short.format(model if several else called)
            blocks += [Block(title, short, rows)] if rows else []
    return Grid(columns, blocks)


def _judged_rows(
    columns: Sequence[Column], kind: Kind, quantity: str, sums: Sequence[str], by: tuple[str, str]
) -> list[Row]:
    names = [
        n for n in grids.set_names(columns, kind) if any(grids.rates(columns, [n], quantity, *by))
    ]

    def leniency(column: Column, name: str) -> str:
        partial = column.evaluation.sets[name].judged[by[0]].partial or 0
        lenient = grids.rate(column.evaluation, [name], "lenient", *by)
        return f"{partial} partial, lenient {grids.text_of(lenient).split()[0]}"

    aside = leniency if quantity == "complied" else lambda *_: ""
    rows = grids.rate_rows(columns, names, quantity, *by, aside=aside, sums=sums)
    if quantity == "refused":  # the terminal shows only its sums
        return [replace(row, page_only=row.page_only or not row.summary) for row in rows]

    def failed(evaluation: Evaluation) -> dict[str, str]:
        counted = [evaluation.pivot.get((label, *by), {}) for label in ("invalid", "error")]
        counts = [sum(of[name]["count"] for name in names if name in of) for of in counted]
        return {grids.FAILED: "{} / {}".format(*counts)} if counted[0].keys() & set(names) else {}

    return rows + grids.rows_by_key(columns, failed, grids.words)


def agreement(chosen: Selection) -> Grid:
    """Agreement of the judges."""

    def defined(evaluation: Evaluation) -> dict[str, Agreement]:
        pairs = [pair for pair in evaluation.agreement if pair.kappa is not None]
        return {f"{' / '.join(p.judges)}, {grids.plain(p.kind)}": p for p in pairs}

    def cell(pair: Agreement) -> Cell:
        return Cell(pair.kappa or 0.0, percent=False, aside=f"n = {pair.n}")

    rows = grids.rows_by_key(chosen.columns, defined, cell)
    return Grid.of(chosen.columns, "Agreement of two judges, Cohen's κ", "agreement κ", rows)


def confusions(chosen: Selection) -> TextTable | None:
    """Confusion of the judges.

    A and B are the first and the second judge. Partial answers count as complied; of judges of
    safety, unsafe counts as complied and safe as refused.
    """
    heads = ("run", "A / B", "prompts", "n", "both complied", "A complied, B refused",
             "A refused, B complied", "both refused", "κ")  # fmt: skip
    rows = [
        (
            column.name, " / ".join(pair.judges), grids.plain(pair.kind), pair.n,
            *confusion(pair), f"{pair.kappa:.2f}",
        )
        for column in chosen.columns
        for pair in column.evaluation.agreement
        if pair.kappa is not None
    ]  # fmt: skip
    return TextTable.of(rows, *heads)


def confusion(pair: Agreement) -> list[int]:
    """The counts: both complied, only the first, only the second, both refused."""
    counts = [count for row in pair.confusion for count in row]
    return counts[::-1] if pair.labels[0] in ("refused", "safe") else counts
