"""Grids of the results, with sets in rows and evaluations in columns."""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dcr import inference
from dcr.core.config import Kind
from dcr.core.evaluation.sets import APART, PAPER_SAFETY
from dcr.core.statistics import Interval
from dcr.report.records import Column, Evaluation, Group
from dcr.report.sections import Selection
from dcr.report.writing import TextTable
from dcr.results.schema import Agreement, Overlap, Quality

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
KEYWORD = "keyword:paper"
TITLES = {  # on the page, and in the narrow terminal
    Kind.seemingly_toxic: ("Compliance with seemingly toxic prompts, %", "compliance, %"),
    Kind.toxic: ("Keyword refusal of toxic prompts, %", "keyword refusal, %"),
}
WANTED = {Kind.seemingly_toxic: "complied", Kind.toxic: "refused"}
NAMES = {
    "llm": "LLM judge",
    "llama_guard": "Llama Guard",
    "wildguard": "WildGuard",
    "moderation": "moderation",
}
FAULTS = {  # their names in tables
    "empty": "empty",
    "truncated": "cut off at the limit",
    "repetitive": "repetitive",
    "non_english": "not English",
    "unanswered": "unanswered",
}
FAILED = "invalid / error"  # verdicts that are unreadable or lack
SET_WORDS = {
    "advbench": "AdvBench",
    "coconot_contrast": "CoCoNot, contrast set",
    "coconot_original": "CoCoNot, unsafe requests",
    "coconot_safety": "CoCoNot, contrast on safety",
    "contrasts_seemingly_toxic": "contrasts, seemingly toxic",
    "contrasts_seemingly_toxic_heldout": "contrasts, seemingly toxic, held out",
    "contrasts_toxic": "contrasts, toxic",
    "contrasts_toxic_heldout": "contrasts, toxic, held out",
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
    "oktest": "OKTest",
    "orbench_hard": "OR-Bench-Hard",
    "orbench_toxic": "OR-Bench-Toxic",
    "paper_safety": "the paper's safety sets",
    "phtest": "PHTest",
    "phtest_controversial": "PHTest, controversial",
    "phtest_harmless": "PHTest, harmless",
    "q_harm": "Q-Harm",
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

    def __bool__(self) -> bool:
        return bool(self.blocks)


def in_words(label: str) -> str:
    """A row's label with readable names of its sets; a user's own sets keep their names."""

    def told(found: re.Match[str]) -> str:
        whole, _, part = found[0].rpartition("_")
        if part in ("test", "final") and whole in SET_WORDS:
            return f"{SET_WORDS[whole]}, {part} part"
        return SET_WORDS.get(found[0], found[0])

    return re.sub(r"\w+", told, label)


def words(text: str, aside: str = "") -> Cell:
    """A cell that holds words."""
    return Cell(0.0, text=text, aside=aside)


def text_of(cell: Cell | None, digits: int = 0) -> str:
    """A cell in words: percents with a decimal, their intervals with `digits`, others with two."""
    if cell is None:
        return "–"
    if cell.text:
        return cell.text + cell.marks
    scale, places, ends = (100, 1, digits) if cell.percent else (1, 2, 2)
    text = f"{scale * cell.estimate:.{places}f}"
    if cell.spread is not None:
        text += f" ± {scale * cell.spread:.{places}f}"
    elif cell.low is not None and cell.high is not None:
        low, high = (f"{scale * end:.{ends}f}" for end in (cell.low, cell.high))
        if not cell.percent:  # .61 for 0.61: one more column fits a terminal
            low, high = low.removeprefix("0"), high.removeprefix("0")
        text += f" [{low}–{high}]"
    return text + cell.marks


def any_marked(table: Sequence[Block], mark: str, *, in_terminal: bool = False) -> bool:
    """Whether a cell of the table has the mark, so that it needs its footnote."""
    rows = [row for section in table for row in section.rows]
    shown = [row for row in rows if not (in_terminal and row.page_only)]
    return any(cell is not None and mark in cell.marks for row in shown for cell in row.values)


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
    else:
        interval = inference.wilson(sum(row["count"] for row in rows), n)
    return Cell(interval.estimate, interval.low, interval.high, n=n, marks=marks_of(rows))


def marks_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The marks of a number that is computed from these rows of results."""
    known = IN_DISTRIBUTION if any(row["in_distribution"] for row in rows) else ""
    return known + (CONTAMINATED if any(row["contaminated"] for row in rows) else "")


def set_names(columns: Sequence[Column], kind: Kind) -> list[str]:
    """Every set of a kind that any column was evaluated on, in order of appearance."""
    sets = [item for column in columns for item in column.evaluation.sets.items()]
    return list(dict.fromkeys(name for name, counts in sets if counts.kind is kind))


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


def over_seeds(chosen: Selection) -> Grid:
    """Mean ± standard deviation over seeds."""
    blocks = []
    for name in AVERAGED if chosen.groups else ():
        for block in chosen.section(name).blocks:
            rows = []
            for row in block.rows:
                cells = tuple(of_group(group, row.values) for group in chosen.groups)
                rows += [replace(row, values=cells, aside="")] if any(cells) else []
            blocks += [replace(block, rows=rows)] if rows else []
    return Grid(chosen.groups, blocks)


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


# --- the grids ----------------------------------------------------------------------------------


AVERAGED = ("results", "judges", "agreement", "general")  # sections with a mean over seeds


def _grid(columns: Sequence[Column], title: str, short: str, rows: list[Row]) -> Grid:
    return Grid(columns, [Block(title, short, rows)] if rows else [])


def _rows(
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


def _rates(
    columns: Sequence[Column], names: Sequence[str], quantity: str, *by: str, **how: bool
) -> Cells:
    """A rate over some sets, a cell a column."""
    return tuple(rate(column.evaluation, names, quantity, *by, **how) for column in columns)


def _n_of(cells: Cells) -> str:
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
        cells = _rates(columns, [name], quantity, *by)
        noted = tuple(
            cell and replace(cell, aside="; ".join(filter(None, (aside(c, name), *_seen(c, name)))))
            for cell, c in zip(cells, columns, strict=True)
        )
        rows += [Row(name, noted, aside=_n_of(cells))] if any(cells) else []

    def add(label: str, over: Sequence[str], of: str = quantity, **how: bool) -> None:
        cells = _rates(columns, over, of, *by, **how)
        shown = "" if how.get("mean") else _n_of(cells)
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
    for label in sums if any(_rates(columns, names, "partial", *by)) else ():
        add(f"{label}, all sets", names, label)
    return rows


def _seen(column: Column, name: str) -> list[str]:
    """Words beside a set: the counts of its prompts that training or steering saw."""
    counts, overlap = column.evaluation.sets[name], column.evaluation.contamination.get(name)
    steered = counts.seen_by_steering
    return [
        f"{ways_of(overlap)} in training" if overlap and overlap.any else "",
        f"{steered} of {counts.n} seen by steering" if steered else "",
    ]


def ways_of(overlap: Overlap) -> str:
    return f"{overlap.exact} / {overlap.near} / {overlap.ngram}"


def keyword_blocks(columns: Sequence[Column], rules: str = "paper") -> list[Block]:
    """The verdicts by some keyword rules, with sets in rows."""
    blocks, judge = [], f"keyword:{rules}"
    for kind, (title, short) in TITLES.items():
        names = set_names(columns, kind)
        others = [of for of in ("partial", "complied", "refused") if of != WANTED[kind]]
        sums = others if rules != "paper" else ()
        rows = rate_rows(columns, names, WANTED[kind], judge, aside=_unseen, sums=sums)
        empty = _rates(columns, together(names), "empty", "")
        if any(cell and cell.estimate for cell in empty):
            rows.append(Row("empty, all sets", empty, True, aside=_n_of(empty)))
        blocks += [Block(title, short, rows)] if rows else []
    return blocks


def _unseen(column: Column, name: str) -> str:
    counts = column.evaluation.sets[name]
    unseen = counts.unseen and rate(column.evaluation, [name], f"{WANTED[counts.kind]}/unseen")
    return f"unseen groups, %: {text_of(unseen, 1)} of {unseen.n}" if unseen else ""


def recommended(chosen: Selection) -> Grid:
    """The same verdicts by the recommended rules.

    They are meant to agree better with people. An answer that refuses in part counts as neither
    compliance nor refusal here and stands apart, as XSTest counts it.
    """
    return Grid(chosen.columns, keyword_blocks(chosen.columns, "recommended"))


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
    judges = judges_of(column.evaluation for column in columns)
    for judge, model in judges:
        if judge == "outcome":  # has a section of its own
            continue
        own = [
            (kind, label, (), f"Answers to {kind.value.replace('_', ' ')} prompts that are {label} "
             "by {}, %", f"{label}, {kind.value.replace('_', ' ')}, by {{}}, %")
            for label in dict.fromkeys(
                label for of in sets if judge in of.judged for label in of.judged[judge].labels
            )
            for kind in WANTED
        ]  # fmt: skip
        several = sum(other == judge for other, _ in judges) > 1
        called = NAMES.get(judge, judge)
        for kind, quantity, sums, title, short in (*JUDGED, *own):
            rows = _judged_rows(columns, kind, quantity, sums, (judge, model))
            title = title.format(f"{called} ({model})" if model else called)
            short = short.format(model if several else called)
            blocks += [Block(title, short, rows)] if rows else []
    return Grid(columns, blocks)


def _judged_rows(
    columns: Sequence[Column], kind: Kind, quantity: str, sums: Sequence[str], by: tuple[str, str]
) -> list[Row]:
    names = [n for n in set_names(columns, kind) if any(_rates(columns, [n], quantity, *by))]

    def leniency(column: Column, name: str) -> str:
        partial = column.evaluation.sets[name].judged[by[0]].partial or 0
        lenient = rate(column.evaluation, [name], "lenient", *by)
        return f"{partial} partial, lenient {text_of(lenient).split()[0]}"

    aside = leniency if quantity == "complied" else lambda *_: ""
    rows = rate_rows(columns, names, quantity, *by, aside=aside, sums=sums)
    if quantity == "refused":  # the terminal shows only its sums
        return [replace(row, page_only=row.page_only or not row.summary) for row in rows]

    def failed(evaluation: Evaluation) -> dict[str, str]:
        counted = [evaluation.pivot.get((label, *by), {}) for label in ("invalid", "error")]
        counts = [sum(of[name]["count"] for name in names if name in of) for of in counted]
        return {FAILED: "{} / {}".format(*counts)} if counted[0].keys() & set(names) else {}

    return rows + _rows(columns, failed, words)


def agreement(chosen: Selection) -> Grid:
    """Agreement of the judges."""

    def defined(evaluation: Evaluation) -> dict[str, Agreement]:
        pairs = [pair for pair in evaluation.agreement if pair.kappa is not None]
        return {f"{' / '.join(p.judges)}, {p.kind.replace('_', ' ')}": p for p in pairs}

    def cell(pair: Agreement) -> Cell:
        return Cell(pair.kappa or 0.0, percent=False, aside=f"n = {pair.n}")

    rows = _rows(chosen.columns, defined, cell)
    return _grid(chosen.columns, "Agreement of two judges, Cohen's κ", "agreement κ", rows)


def confusions(chosen: Selection) -> TextTable | None:
    """Confusion of the judges.

    A and B are the first and the second judge. Partial answers count as complied; of judges of
    safety, unsafe counts as complied and safe as refused.
    """
    heads = ("run", "A / B", "prompts", "n", "both complied", "A complied, B refused",
             "A refused, B complied", "both refused", "κ")  # fmt: skip
    rows = [
        (
            column.name, " / ".join(pair.judges), pair.kind.replace("_", " "), pair.n,
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
        rows = _rows(
            columns, lambda e, n=name: e.own[n].numbers if n in e.own else {}, cell, " ".join
        )
        blocks += [Block(f"{name} ({'; '.join(sorted(made))})", name, rows)] if rows else []
    return Grid(columns, blocks)


def general(chosen: Selection) -> Grid:
    """Ability and quality.

    Ability: brackets are ±1.96 standard errors. Quality: win rate over the reference's answers, ±
    one standard error; 50 is a draw.
    """
    columns, ability, blocks = chosen.columns, [], []
    for task in dict.fromkeys(task for column in columns for task in column.evaluation.ability):
        scores = [a for column in columns if (a := column.evaluation.ability.get(task))]
        asked = dict.fromkeys(
            f"{a.shots}-shot, n = {a.n}{' (cut)' if a.limit is not None else ''}" for a in scores
        )
        for metric in ("acc", "acc_norm"):
            cells = tuple(accuracy(column.evaluation, task, metric) for column in columns)
            if any(cells):
                ability.append(Row(f"{task} {metric}", cells, aside=" or ".join(asked)))
    if ability:
        blocks.append(Block("General ability, accuracy, %", "ability, %", ability))
    measured = [column.evaluation.quality for column in columns]
    for head in dict.fromkeys(annotator_name(own) for own in measured if own):

        def rates(evaluation: Evaluation, head: str = head) -> dict[str, Cell]:
            own = evaluation.quality
            return _win_rates(own) if own and annotator_name(own) == head else {}

        title = f"Answer quality, win rate, % — {head}"
        blocks.append(Block(title, f"quality, %; {head}", _rows(columns, rates, lambda cell: cell)))
    return Grid(columns, blocks)


def accuracy(evaluation: Evaluation, task: str, metric: str) -> Cell | None:
    """A task's acc or acc_norm with its 95% interval, marked if training saw it."""
    row = evaluation.pivot.get((metric, "", ""), {}).get(task)
    if row is None:
        return None
    low, high = (None if math.isnan(end) else end for end in (row["low"], row["high"]))
    overlap = evaluation.contamination.get(task)
    touched = f"{ways_of(overlap)} in training" if overlap and overlap.any else ""
    return Cell(row["value"], low, high, n=row["n"], marks=marks_of([row]), aside=touched)


def annotator_name(measured: Quality) -> str:
    """The annotator's name, with a note if it is no OpenAI GPT model, as the paper's was."""
    name = measured.annotator.rsplit("/", 1)[-1].lower()
    local = not name.startswith(("gpt-", "chatgpt-")) or name.startswith("gpt-oss")
    note = " (local annotator, not GPT-4o-mini)" if local else ""
    return f"annotator: {measured.annotator}{note}"


def _win_rates(own: Quality) -> dict[str, Cell]:
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


def faults(chosen: Selection) -> Grid:
    """Faulty completions: empty, cut off, repetitive, not English."""
    columns, rows = chosen.columns, []
    names = list(dict.fromkeys(name for column in columns for name in column.evaluation.sets))

    def counts(over: Sequence[str], fault: str) -> Cells:
        cells = _rates(columns, over, fault, "")
        return tuple(c and words(f"{round(c.estimate * (c.n or 0))} of {c.n}") for c in cells)

    for fault, label in FAULTS.items():
        total, by_set = counts(together(names), fault), [counts([name], fault) for name in names]
        # only an endpoint leaves prompts unanswered, so the row stands only if there are any
        told = [cell for cells in by_set for cell in cells if cell and cell.text[:2] != "0 "]
        if any(total) and (told or fault != "unanswered"):
            rows.append(Row(label, total, summary=True))
            rows += [Row(*of, page_only=True) for of in zip(names, by_set, strict=True)]
    title = "Faulty completions, over all sets and by set"
    return _grid(columns, title, "faulty completions", rows)


def contamination(chosen: Selection) -> Grid:
    """Contamination.

    Evaluation prompts found among the rows that the run was trained on: the same text, nearly the
    same, or sharing long runs of words.
    """
    columns, overlaps = chosen.columns, [c.evaluation.contamination for c in chosen.columns]
    touched = {name for by_name in overlaps for name, of in by_name.items() if of.any}

    def cell(of: Overlap) -> Cell:
        return words(
            f"{ways_of(of)} of {of.n}",
            ", ".join(f"{source} {n}" for source, n in of.by_source.items()),
        )

    rows = _rows(columns, lambda e: e.contamination, cell)
    rows = [replace(row, page_only=row.label not in touched) for row in rows]
    title = f"{CONTAMINATED} Evaluation prompts among the rows trained on: exact / near / n-gram"
    return _grid(columns, title, "in training: exact / near / n-gram", rows)
