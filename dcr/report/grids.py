"""The grid of a table: cells in rows and blocks, and rates over sets of prompts as its rows."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dcr import inference
from dcr.core.config import Kind
from dcr.core.evaluation import APART
from dcr.core.statistics import Interval
from dcr.public import PAPER_SAFETY
from dcr.report.columns import Column, Group
from dcr.report.records import Evaluation
from dcr.results.schema import Overlap

IN_DISTRIBUTION, CONTAMINATED = "†", "‡"
FOOTNOTES = {
    IN_DISTRIBUTION: "in-distribution: training saw prompts of this set.",
    CONTAMINATED: "contaminated: some of its prompts stand among the rows trained on, or steering "
    "was made from them.",
}
INTERVALS = (
    "Brackets: 95% intervals (Wilson; of means over sets by squaring and adding theirs; bootstrap "
    "for AUROC; ±1.96 standard errors for ability). ± after a win rate: its standard error."
)
KEYWORD, OUTCOME = "keyword:paper", "outcome"  # judges
FAILED = "invalid / error"  # verdicts that are unreadable or lack
WANTED = {Kind.seemingly_toxic: "complied", Kind.toxic: "refused"}
NAMES = {
    "llm": "LLM judge",
    "llama_guard": "Llama Guard",
    "wildguard": "WildGuard",
    "moderation": "moderation",
}
PARTS = {"test": "test part", "final": "final part", "heldout": "held out"}  # of a set, by its end
SET_WORDS = {
    "advbench": "AdvBench",
    "coconot_contrast": "CoCoNot, contrast set",
    "coconot_original": "CoCoNot, unsafe requests",
    "coconot_safety": "CoCoNot, contrast on safety",
    "contrasts_seemingly_toxic": "contrasts, seemingly toxic",
    "contrasts_toxic": "contrasts, toxic",
    "demo_normal_heldout": "demo, normal",
    "demo_seemingly_toxic_heldout": "demo, seemingly toxic",
    "demo_toxic_heldout": "demo, toxic",
    "evorefuse_test": "EvoRefuse",
    "falsereject_test": "FalseReject",
    "falsereject_train": "FalseReject, train",
    "harmbench": "HarmBench",
    "harmfulq": "HarmfulQ",
    "harmfulqa": "HarmfulQA",
    "i_cona": "I-CoNa, hate speech",
    "i_controversial": "I-Controversial",
    "i_malicious_instructions": "I-MaliciousInstructions",
    "jailbreakbench": "JailbreakBench, harmful",
    "jailbreakbench_benign": "JailbreakBench, benign",
    "ms_xsb_safe": "MS-XSB, safe conversations",
    "ms_xsb_unsafe": "MS-XSB, unsafe conversations",
    "oktest": "OKTest",
    "orbench_hard": "OR-Bench-Hard",
    "orbench_toxic": "OR-Bench-Toxic",
    "paper_safety": "the paper's safety sets",
    "phtest": "PHTest",
    "phtest_controversial": "PHTest, controversial",
    "phtest_harmless": "PHTest, harmless",
    "q_harm": "Q-Harm",
    "registers_seemingly_toxic": "registers, seemingly toxic",
    "registers_toxic": "registers, toxic",
    "sorrybench": "SORRY-Bench",
    "strongreject": "StrongREJECT",
    "wildguardtest_harmful": "WildGuardTest, harmful",
    "wildguardtest_unharmful": "WildGuardTest, unharmful",
    "xsb_safe": "XSB, safe prompts",
    "xsb_unsafe": "XSB, unsafe prompts",
    "xstest_safe": "XSTest, safe prompts",
    "xstest_unsafe": "XSTest, unsafe prompts",
}


@dataclass(frozen=True)
class Cell:
    """One cell of any table. `spread` is a deviation over seeds, or a win rate's standard error.

    `text` replaces the number of a cell that is no rate; only the page shows `aside`.
    """

    estimate: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    spread: float | None = None
    percent: bool = True
    marks: str = ""
    aside: str = ""
    text: str = ""

    @property
    def interval(self) -> Interval:
        ends = (math.nan if end is None else end for end in (self.low, self.high))
        return Interval(self.estimate, *ends)


Cells = tuple[Cell | None, ...]  # one a column


@dataclass(frozen=True)
class Row:
    """A set of prompts, or a summary over sets, with one cell a column."""

    label: str
    values: Cells
    summary: bool = False
    page_only: bool = False
    aside: str = ""


@dataclass(frozen=True)
class Block:
    """Rows below a title of their own; the narrow terminal shows the `short` one."""

    title: str
    short: str
    rows: list[Row]


@dataclass(frozen=True)
class Grid:
    """Blocks of rows with a cell for each of some columns, or groups of columns."""

    macro: ClassVar[str] = "grid"
    heads: Sequence[Column] | Sequence[Group]
    blocks: Sequence[Block]
    notes: Sequence[str] = ()

    @classmethod
    def of(cls, columns: Sequence[Column], title: str, short: str, rows: list[Row]) -> "Grid":
        """A grid of one block; empty without rows."""
        return cls(columns, [Block(title, short, rows)] if rows else [])

    def __bool__(self) -> bool:
        return bool(self.blocks)


def in_words(label: str) -> str:
    """A row's label with readable names of its sets; a user's own sets keep their names."""

    def told(found: re.Match[str]) -> str:
        whole, _, part = found[0].rpartition("_")
        if part in PARTS and whole in SET_WORDS:
            return f"{SET_WORDS[whole]}, {PARTS[part]}"
        return SET_WORDS.get(found[0], found[0])

    return re.sub(r"\w+", told, label)


def plain(name: str) -> str:
    """The name of a kind, an outcome or a label in words."""
    return name.replace("_", " ")


def words(text: str, aside: str = "") -> Cell:
    """A cell that holds words."""
    return Cell(0.0, text=text, aside=aside)


def text_of(cell: Cell | None, digits: int = 0) -> str:
    """A cell in words: percents with a decimal, their intervals with `digits`, others with two."""
    if cell is None:
        return "–"
    if cell.text:
        return cell.text + cell.marks
    if cell.percent:
        return in_numbers(cell, 100, 1, digits) + cell.marks
    # .61 for 0.61: one more column fits a terminal
    return re.sub(r"(?<=[\[–])0", "", in_numbers(cell, 1, 2, 2)) + cell.marks


def in_numbers(cell: Cell, scale: int, places: int, ends: int) -> str:
    """A cell's number with so many decimals, and its spread or its interval with `ends`."""
    text = f"{scale * cell.estimate:.{places}f}"
    if cell.spread is not None:
        return f"{text} ± {scale * cell.spread:.{places}f}"
    if cell.low is None or cell.high is None:
        return text
    return f"{text} [{scale * cell.low:.{ends}f}–{scale * cell.high:.{ends}f}]"


def rows_by_key(
    columns: Sequence[Column],
    found: Callable[[Evaluation], Mapping[Any, Any]],
    cell_of: Callable[[Any], Cell | None],
    label: Callable[[Any], str] = str,
) -> list[Row]:
    """A row for each key that `found` gives of any column, without rows that count nothing."""
    known = [found(column.evaluation) for column in columns]
    rows = [
        Row(label(key), tuple(cell_of(of[key]) if key in of else None for of in known))
        for key in dict.fromkeys(key for of in known for key in of)
    ]
    return [row for row in rows if any(cell and cell.text != "0 / 0" for cell in row.values)]


def footnotes(blocks: Sequence[Block], *, in_terminal: bool = False) -> dict[str, str]:
    """The footnotes of a table by those marks that its cells have."""
    rows = [row for block in blocks for row in block.rows if not (in_terminal and row.page_only)]
    marks = {mark for row in rows for cell in row.values if cell for mark in cell.marks}
    return {mark: text for mark, text in FOOTNOTES.items() if mark in marks}


# --- rates over sets ----------------------------------------------------------------------------


def rate(
    evaluation: Evaluation,
    names: Sequence[str],
    quantity: str,
    judge: str = KEYWORD,
    model: str = "",
    *,
    mean: bool = False,
    whole: bool = False,
) -> Cell | None:
    """The rate over the evaluated ones of some sets; None if one of these was not counted.

    With `whole` it is also None if a set was not evaluated. The rate is over all prompts with the
    Wilson interval of 95%, or, with `mean`, the mean of the sets' rates. Its interval combines
    theirs by squaring and adding (Zou and Donner 2008, Statistics in Medicine 27:1693), for a sum
    of independent estimates with asymmetric intervals.
    """
    sets, counted = evaluation.sets, evaluation.pivot.get((quantity, judge, model), {})
    rows = [counted[name] for name in names if name in counted and counted[name]["n"]]
    asked = names if whole else [name for name in names if name in sets and sets[name].n]
    if not rows or len(rows) < len(asked):
        return None
    n = sum(row["n"] for row in rows)
    if mean:
        middle = sum(row["value"] for row in rows) / len(rows)
        below = math.hypot(*(row["value"] - row["low"] for row in rows)) / len(rows)
        above = math.hypot(*(row["high"] - row["value"] for row in rows)) / len(rows)
        interval = Interval(middle, max(0.0, middle - below), min(1.0, middle + above))
        return Cell(*vars(interval).values(), n=n, marks=marks_of(rows))
    return share(sum(row["count"] for row in rows), n, marks_of(rows))


def share(count: int, n: int, marks: str = "") -> Cell | None:
    """A share of `n` with its 95% Wilson interval; None of nothing."""
    return Cell(*vars(inference.wilson(count, n)).values(), n=n, marks=marks) if n else None


def marks_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The marks of a number that is computed from these rows of results."""
    known = IN_DISTRIBUTION if any(row["in_distribution"] for row in rows) else ""
    return known + (CONTAMINATED if any(row["contaminated"] for row in rows) else "")


def accuracy(evaluation: Evaluation, task: str, metric: str) -> Cell | None:
    """A task's acc or acc_norm with its 95% interval, marked if training saw it."""
    row = evaluation.pivot.get((metric, "", ""), {}).get(task)
    if row is None:
        return None
    low, high = (None if math.isnan(end) else end for end in (row["low"], row["high"]))
    seen = _in_training(evaluation, task)
    return Cell(row["value"], low, high, n=row["n"], marks=marks_of([row]), aside=seen)


def ranked(evaluation: Evaluation, quantity: str, percent: bool = False) -> Cell | None:
    """A number of the ranking of all sets pooled with its interval and marks."""
    row = evaluation.pivot.get((quantity, "", ""), {}).get("pooled")
    return of_row(row, percent) if row and math.isfinite(row["value"]) else None


def of_row(row: Mapping[str, Any], percent: bool) -> Cell:
    """The cell of a row of results with an interval."""
    return Cell(row["value"], row["low"], row["high"], marks=marks_of([row]), percent=percent)


def set_names(columns: Sequence[Column], kind: Kind) -> list[str]:
    """Every set of a kind that any column was evaluated on, in order of appearance."""
    sets = [item for column in columns for item in column.evaluation.sets.items()]
    return list(dict.fromkeys(name for name, counts in sets if counts.kind is kind))


def shared_by_kind(evaluations: Sequence[Evaluation]) -> dict[Kind, list[str]]:
    """The sets that all these evaluations share and that may be summed up, by kind."""
    first = evaluations[0].sets if evaluations else {}
    shared = {name: of for name, of in first.items() if all(name in e.sets for e in evaluations)}
    return {
        kind: together(name for name, counts in shared.items() if counts.kind is kind)
        for kind in WANTED
    }


def together(names: Iterable[str]) -> list[str]:
    """The sets that may be pooled: those whose prompts no other set holds."""
    return [name for name in names if name not in APART]


def marked_sets(columns: Sequence[Column]) -> set[str]:
    """The sets that are in-distribution for at least one column."""
    sets = [item for column in columns for item in column.evaluation.sets.items()]
    return {name for name, counts in sets if counts.in_distribution}


def judges_of(evaluations: Iterable[Evaluation]) -> list[tuple[str, str]]:
    """Every (judge, model) that judged a set of these evaluations, in the order of NAMES."""
    sets = [counts for evaluation in evaluations for counts in evaluation.sets.values()]
    judges = {(judge, judged.model) for counts in sets for judge, judged in counts.judged.items()}
    places = {judge: place for place, judge in enumerate(NAMES)}
    return sorted(judges, key=lambda pair: (places.get(pair[0], len(NAMES)), *pair))


def of_group(group: Group, cells: Sequence[Cell | None]) -> Cell | None:
    """The mean over the seeds of a group with its spread, or a difference with its interval.

    None if no seed has a number, or fewer than two seeds both numbers of a difference.
    """
    sides = [[cells[place] for place in places] for places in (group.places, group.less) if places]
    by_seed = [
        [cell for cell in pair if cell and not cell.text] for pair in zip(*sides, strict=True)
    ]
    known = [pair for pair in by_seed if len(pair) == len(sides)]
    if len(known) < len(sides):
        return None
    told: dict[str, Any] = {
        "percent": known[0][0].percent,
        "marks": "".join(dict.fromkeys(m for pair in known for cell in pair for m in cell.marks)),
        "aside": f"of {len(known)} seeds only" if len(known) < len(by_seed) else "",
    }
    estimates = [[cell.estimate for cell in side] for side in zip(*known, strict=True)]
    if group.less:
        paired = inference.paired_over_seeds(estimates[0], estimates[1])
        return Cell(paired.estimate, paired.low, paired.high, **told)
    mean, spread = inference.mean_and_spread(estimates[0])
    return Cell(mean, spread=spread if len(known) > 1 else None, **told)


def rates(
    columns: Sequence[Column], names: Sequence[str], quantity: str, *by: str, **how: bool
) -> Cells:
    """A rate over some sets, a cell a column."""
    return tuple(rate(column.evaluation, names, quantity, *by, **how) for column in columns)


def n_of(cells: Cells) -> str:
    known = sorted({cell.n for cell in cells if cell and cell.n})
    return f"n = {' or '.join(map(str, known))}" if known else ""


def rate_rows(
    columns: Sequence[Column],
    names: Sequence[str],
    quantity: str,
    *by: str,
    aside: Callable[[Column, str], str] = lambda *_: "",
    sums: Sequence[str] = (),
) -> list[Row]:
    """A row a set and the summaries over them, each if it has a cell.

    `sums` are other quantities over all sets, told where the verdicts know partial answers.
    """
    rows = []
    for name in names:
        cells = rates(columns, [name], quantity, *by)
        noted = tuple(
            cell and replace(cell, aside="; ".join(filter(None, (aside(c, name), *_seen(c, name)))))
            for cell, c in zip(cells, columns, strict=True)
        )
        rows += [Row(name, noted, aside=n_of(cells))] if any(cells) else []

    def add(label: str, over: Sequence[str], of: str = quantity, **how: bool) -> None:
        cells = rates(columns, over, of, *by, **how)
        shown = "" if how.get("mean") else n_of(cells)
        if any(cells):
            rows.append(Row(label, cells, True, aside=shown))

    names = together(names)
    unmarked = [name for name in names if name not in marked_sets(columns)]
    if len(names) > 1 and set(names) != set(PAPER_SAFETY):
        add("pooled", names)
    if unmarked and len(unmarked) < len(names):
        add(f"pooled without {IN_DISTRIBUTION}", unmarked)
    if set(PAPER_SAFETY) <= set(names):
        add("mean of the paper's five", PAPER_SAFETY, mean=True, whole=True)
        add("the paper's five pooled", PAPER_SAFETY, whole=True)
    for label in sums if any(rates(columns, names, "partial", *by)) else ():
        add(f"{label}, all sets", names, label)
    return rows


def _seen(column: Column, name: str) -> list[str]:
    """Words beside a set: the counts of its prompts that training, steering or gate saw."""
    counts, seen = column.evaluation.sets[name], _in_training(column.evaluation, name)
    steered = counts.seen_by_steering
    return [seen, f"{steered} of {counts.n} seen by steering or gate" if steered else ""]


def _in_training(evaluation: Evaluation, name: str) -> str:
    overlap = evaluation.contamination.get(name)
    return f"{ways_of(overlap)} in training" if overlap and overlap.any else ""


def ways_of(overlap: Overlap) -> str:
    return f"{overlap.exact} / {overlap.near} / {overlap.ngram}"
