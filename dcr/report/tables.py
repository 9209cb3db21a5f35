"""Grids of the results, with sets in rows and evaluations in columns."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from dcr import inference
from dcr.core import statistics
from dcr.core.config import Kind
from dcr.core.evaluation.sets import APART, PAPER_SAFETY
from dcr.core.results.schema import Agreement, Quality, Usage
from dcr.core.statistics import Interval
from dcr.report.records import Column, Evaluation, Group, seen
from dcr.report.sections import Selection
from dcr.report.writing import TextTable

IN_DISTRIBUTION, CONTAMINATED = "†", "‡"
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
METRICS = ("acc", "acc_norm")
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
    "falsereject_test": "FalseReject",
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
    return re.sub(r"\w+", lambda name: SET_WORDS.get(name[0], name[0]), label)


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
        interval = statistics.wilson(sum(row["count"] for row in rows), n)
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
    """The same rows over groups: mean and standard deviation over seeds, or a difference."""
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
    """The mean over the seeds of a group with its spread, or a difference with its interval."""
    own = [cells[place] for place in group.places]
    if not group.less:
        return mean_of(own)
    both = [
        (one, other)
        for one, other in zip(own, (cells[place] for place in group.less), strict=True)
        if one and other and not (one.text or other.text)
    ]
    if len(both) < 2:
        return None
    paired = inference.paired_over_seeds(
        [one.estimate for one, _ in both], [other.estimate for _, other in both]
    )
    marks = "".join(dict.fromkeys(mark for pair in both for cell in pair for mark in cell.marks))
    few = f"of {len(both)} seeds only" if len(both) < len(own) else ""
    percent = both[0][0].percent
    return Cell(paired.estimate, paired.low, paired.high, percent=percent, marks=marks, aside=few)


def mean_of(cells: Sequence[Cell | None]) -> Cell | None:
    """The mean and standard deviation over seeds; None if no seed has a number."""
    known = [cell for cell in cells if cell and not cell.text]
    if not known:
        return None
    mean, spread = inference.mean_and_spread([cell.estimate for cell in known])
    return Cell(
        mean,
        spread=spread if len(known) > 1 else None,
        percent=known[0].percent,
        marks="".join(dict.fromkeys(mark for cell in known for mark in cell.marks)),
        aside=f"of {len(known)} seeds only" if len(known) < len(cells) else "",
    )


# --- the grids ----------------------------------------------------------------------------------


AVERAGED = ("results", "judges", "agreement", "general")  # sections with a mean over seeds


def recommended(chosen: Selection) -> Grid:
    return Grid(chosen.columns, keyword_blocks(chosen.columns, "recommended"))


def _rates(
    columns: Sequence[Column], names: Sequence[str], quantity: str, *by: str, **how: bool
) -> Cells:
    """A rate over some sets, a cell a column."""
    return tuple(rate(column.evaluation, names, quantity, *by, **how) for column in columns)


def _summary(
    label: str, cells: Cells, *, with_n: bool = True, page_only: bool = False
) -> list[Row]:
    """The row of a summary over sets, if any column has it."""
    n = _n_of(cells) if with_n else ""
    return [Row(label, cells, True, page_only, n)] if any(cells) else []


def rate_rows(
    columns: Sequence[Column],
    names: Sequence[str],
    quantity: str,
    *by: str,
    aside: Callable[[Column, str], str] = lambda *_: "",
) -> list[Row]:
    """A row a set, and the summaries over them; rows without a single cell are left out."""
    rows = []
    for name in names:
        cells = _rates(columns, [name], quantity, *by)
        noted = tuple(
            cell and replace(cell, aside="; ".join(filter(None, _asides(column, name, aside))))
            for cell, column in zip(cells, columns, strict=True)
        )
        rows += [Row(name, noted, aside=_n_of(cells))] if any(cells) else []
    names = together(names)
    several = len(names) > 1 and set(names) != set(PAPER_SAFETY)
    unmarked = [name for name in names if name not in marked_sets(columns)]
    if several:
        rows += _summary("pooled", _rates(columns, names, quantity, *by))
    if unmarked and len(unmarked) < len(names):
        without = _rates(columns, unmarked, quantity, *by)
        rows += _summary(f"pooled without {IN_DISTRIBUTION}", without)
    if set(PAPER_SAFETY) <= set(names):
        mean = _rates(columns, PAPER_SAFETY, quantity, *by, mean=True, whole=True)
        rows += _summary("mean of the paper's five", mean, with_n=False)
        pooled = _rates(columns, PAPER_SAFETY, quantity, *by, whole=True)
        rows += _summary("the paper's five pooled", pooled)
    if several:
        mean = _rates(columns, names, quantity, *by, mean=True)
        rows += _summary("mean of the sets", mean, with_n=False, page_only=True)
    return rows


def _failures(columns: Sequence[Column], names: Sequence[str], judge: str, model: str) -> list[Row]:
    """A row that counts the answers without a verdict, if there are any."""
    cells, any_failed = [], False
    for pivot in (column.evaluation.pivot for column in columns):
        judged = [pivot.get((label, judge, model), {}) for label in ("invalid", "error")]
        counts = [sum(own[name]["count"] for name in names if name in own) for own in judged]
        any_failed |= any(counts)
        of_these = judged[0].keys() & set(names)
        cells.append(words(f"{counts[0]} / {counts[1]}") if of_these else None)
    row = Row("invalid / error", tuple(cells), aside="unreadable / not answered")
    return [row] if any_failed else []


def _n_of(cells: Cells) -> str:
    known = sorted({cell.n for cell in cells if cell and cell.n})
    return f"n = {' or '.join(map(str, known))}" if known else ""


def _asides(column: Column, name: str, aside: Callable[[Column, str], str]) -> list[str]:
    """Words beside a set: its counts, and those of prompts that training or steering saw."""
    counts = column.evaluation.sets[name]
    steered = counts.seen_by_steering
    return [
        aside(column, name),
        seen(column.evaluation.contamination.get(name)),
        f"{steered} of {counts.n} seen by steering" if steered else "",
    ]


def keyword_blocks(columns: Sequence[Column], rules: str = "paper") -> list[Block]:
    """The verdicts by some keyword rules, with sets in rows."""
    blocks, judge = [], f"keyword:{rules}"
    for kind, (title, short) in TITLES.items():
        names = set_names(columns, kind)
        rows = rate_rows(columns, names, WANTED[kind], judge, aside=_unseen)
        # older files know no partial refusals, and so no outcome of three
        known = _rates(columns, together(names), "partial", judge)
        for outcome in () if rules == "paper" else ("partial", "complied", "refused"):
            if outcome != WANTED[kind]:
                cells = zip(_rates(columns, together(names), outcome, judge), known, strict=True)
                of_three = tuple(cell if part else None for cell, part in cells)
                rows += _summary(f"{outcome}, all sets", of_three)
        empty = _rates(columns, together(names), "empty", "")
        if any(cell and cell.estimate for cell in empty):
            rows += _summary("empty, all sets", empty)
        blocks += [Block(title, short, rows)] if rows else []
    return blocks


def _unseen(column: Column, name: str) -> str:
    counts = column.evaluation.sets[name]
    unseen = counts.unseen and rate(column.evaluation, [name], f"{WANTED[counts.kind]}/unseen")
    if not unseen:
        return ""
    estimate, low, high = (100 * end for end in vars(unseen.interval).values())
    return f"unseen groups: {estimate:.1f}% [{low:.1f}–{high:.1f}] of {unseen.n}"


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
    """Compliance, refusal and defence success rate by every judge, for the sets it judged."""
    columns = chosen.columns
    blocks, judges = [], judges_of(column.evaluation for column in columns)
    wanted = [(by, each) for by in judges for each in (*JUDGED, *_own_labels(columns, by[0]))]
    for by, (kind, quantity, sums, title, short) in wanted:
        judge, model = by
        sets = set_names(columns, kind)
        names = [name for name in sets if any(_rates(columns, [name], quantity, *by))]

        def leniency(column: Column, name: str, by: tuple[str, str] = by) -> str:
            partial = column.evaluation.sets[name].judged[by[0]].partial or 0
            lenient = rate(column.evaluation, [name], "lenient", *by)
            return f"{partial} partial, lenient {text_of(lenient).split()[0]}"

        aside = leniency if quantity == "complied" else lambda *_: ""
        rows = rate_rows(columns, names, quantity, *by, aside=aside)
        if any(_rates(columns, together(names), "partial", *by)):
            for label in sums:
                rows += _summary(f"{label}, all sets", _rates(columns, together(names), label, *by))
        if quantity == "refused":  # the terminal shows only its sums
            rows = [replace(row, page_only=row.page_only or not row.summary) for row in rows]
        else:
            rows += _failures(columns, names, *by)
        several = sum(other == judge for other, _ in judges) > 1
        called = NAMES.get(judge, judge)
        title = title.format(f"{called} ({model})" if model else called)
        blocks.append(Block(title, short.format(model if several else called), rows))
    return Grid(columns, [block for block in blocks if block.rows])


def _own_labels(
    columns: Sequence[Column], judge: str
) -> Iterator[tuple[Kind, str, tuple[str, ...], str, str]]:
    """The same of labels that a user's own judge alone gives."""
    sets = [of for column in columns for of in column.evaluation.sets.values()]
    labels = dict.fromkeys(
        label for of in sets if judge in of.judged for label in of.judged[judge].labels
    )
    for label, kind in itertools.product(labels, WANTED):
        told = kind.value.replace("_", " ")
        title = f"Answers to {told} prompts that are {label} by {{}}, %"
        yield kind, label, (), title, f"{label}, {told}, by {{}}, %"


def agreement(chosen: Selection) -> Grid:
    """Cohen's κ of every two judges by kind of prompt, if it is defined."""
    columns = chosen.columns
    measured = [
        {(*pair.judges, pair.kind): pair for pair in column.evaluation.agreement}
        for column in columns
    ]
    rows = []
    for key in dict.fromkeys(key for by_key in measured for key in by_key):
        a, b, kind = key
        pairs = [by_key.get(key) for by_key in measured]
        cells = tuple(
            Cell(pair.kappa, percent=False, aside=f"n = {pair.n}")
            if pair and pair.kappa is not None
            else None
            for pair in pairs
        )
        named = f"{a} / {b}, {kind.replace('_', ' ')}"
        rows += [Row(named, cells)] if any(cells) else []
    return Grid(
        columns, [Block("Agreement of two judges, Cohen's κ", "agreement κ", rows)] if rows else []
    )


def confusions(chosen: Selection) -> TextTable | None:
    """Counts the agreements and differences of two judges, a row for each pair of a column."""
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
    rows = pair.confusion
    last = pair.labels[0] in ("refused", "safe")
    ordered = [row[::-1] for row in rows[::-1]] if last else rows
    return [count for row in ordered for count in row]


def usage(chosen: Selection) -> Grid:
    """Requests and spend of every judge, and of the annotator of quality."""
    columns = chosen.columns
    spent = [
        column.evaluation.usage | ({"annotator": quality.usage} if quality else {})
        for column in columns
        for quality in [column.evaluation.quality]
    ]
    names = dict.fromkeys(name for by_name in spent for name in by_name)
    rows = [Row(name, tuple(_spent(by_name.get(name)) for by_name in spent)) for name in names]
    rows = [row for row in rows if any(row.values)]
    title = "Requests to servers, and estimated spend"
    return Grid(columns, [Block(title, "requests, spend", rows)] if rows else [])


def _spent(spent: Usage | None) -> Cell | None:
    if spent is None:
        return None
    text = f"{spent.requests:,}" + ("" if spent.usd is None else f", ${spent.usd:,.2f}")
    tokens = f"tokens: {spent.prompt_tokens:,} in, {spent.completion_tokens:,} out"
    return words(text, tokens if spent.usd is not None else f"{tokens}; no price given")


def general(chosen: Selection) -> Grid:
    columns = chosen.columns
    return Grid(columns, [*_ability(columns), *_quality(columns)])


def own_tasks(chosen: Selection) -> Grid:
    """Every number of a user's own tasks, a block a task."""
    columns = chosen.columns
    measured = [column.evaluation.own for column in columns]
    blocks = []
    for name in dict.fromkeys(name for by_name in measured for name in by_name):
        found = [by_name[name].numbers if name in by_name else {} for by_name in measured]
        rows = [
            Row(" ".join(keys), tuple(_number(of.get(keys)) for of in found))
            for keys in dict.fromkeys(keys for of in found for keys in of)
        ]
        made = {
            f"{of[name].path}, source sha256 {of[name].sha256}" for of in measured if name in of
        }
        blocks += [Block(f"{name} ({'; '.join(sorted(made))})", name, rows)] if rows else []
    return Grid(columns, blocks)


def _number(known: tuple[float, float, float] | None) -> Cell | None:
    if known is None or math.isnan(known[0]):
        return None
    low, high = (None if math.isnan(end) else end for end in known[1:])
    return Cell(known[0], low, high, percent=False)


def _ability(columns: Sequence[Column]) -> list[Block]:
    """The accuracies of the harness's tasks, one or two each."""
    rows = []
    for task in dict.fromkeys(task for column in columns for task in column.evaluation.ability):
        scores = [a for column in columns if (a := column.evaluation.ability.get(task))]
        asked = dict.fromkeys(
            f"{a.shots}-shot, n = {a.n}{' (cut)' if a.limit is not None else ''}" for a in scores
        )
        for metric in METRICS:
            cells = tuple(accuracy(column.evaluation, task, metric) for column in columns)
            rows += [Row(f"{task} {metric}", cells, aside=" or ".join(asked))] if any(cells) else []
    return [Block("General ability, accuracy, %", "ability, %", rows)] if rows else []


def accuracy(evaluation: Evaluation, task: str, metric: str) -> Cell | None:
    """A task's acc or acc_norm with its 95% interval, marked if training saw it."""
    row = evaluation.pivot.get((metric, "", ""), {}).get(task)
    if row is None:
        return None
    low, high = (None if math.isnan(end) else end for end in (row["low"], row["high"]))
    touched = seen(evaluation.contamination.get(task))
    return Cell(row["value"], low, high, n=row["n"], marks=marks_of([row]), aside=touched)


def annotator_name(measured: Quality) -> str:
    """The annotator's name, with a note if it is no OpenAI GPT model, as the paper's was."""
    name = measured.annotator.rsplit("/", 1)[-1].lower()
    local = not name.startswith(("gpt-", "chatgpt-")) or name.startswith("gpt-oss")
    note = " (local annotator, not GPT-4o-mini)" if local else ""
    return f"annotator: {measured.annotator}{note}"


def _quality(columns: Sequence[Column]) -> list[Block]:
    """The win rates against the reference's answers, a block an annotator."""
    measured = [column.evaluation.quality for column in columns]
    sections = []
    for head in dict.fromkeys(annotator_name(own) for own in measured if own):
        chosen = [q if q and annotator_name(q) == head else None for q in measured]
        rows = [
            Row("win rate", tuple(q and _win_rate(q) for q in chosen)),
            Row("length-controlled", tuple(q and _share(q.length_controlled) for q in chosen)),
            Row("discrete", tuple(q and _share(q.discrete) for q in chosen)),
        ]
        if any(q and (q.invalid or q.error) for q in chosen):
            cells = tuple(words(f"{q.invalid} / {q.error}") if q else None for q in chosen)
            rows.append(Row("invalid / error", cells, aside="unreadable / not answered"))
        title = f"Answer quality, win rate, % — {head}"
        kept = [row for row in rows if any(row.values)]
        sections.append(Block(title, f"quality, %; {head}", kept))
    return sections


def _win_rate(own: Quality) -> Cell | None:
    asides = [f"against {own.reference}" if own.reference else "", f"n\u00a0=\u00a0{own.n}"]
    lengths = (own.mean_length, own.reference_length)
    if None not in lengths:
        asides.append("{:.0f} characters, theirs {:.0f}".format(*lengths))
    cell = _share(own.win_rate)
    spread = (own.standard_error or 0.0) / 100
    return cell and replace(cell, spread=spread, aside="; ".join(filter(None, asides)))


def _share(percent: float | None) -> Cell | None:
    return None if percent is None else Cell(percent / 100)


def faults(chosen: Selection) -> Grid:
    """Counts each kind of faulty completion over all sets, and on the page by set."""
    columns = chosen.columns
    names = list(dict.fromkeys(name for column in columns for name in column.evaluation.sets))
    rows = []
    for fault, label in FAULTS.items():
        total = _counts(_rates(columns, together(names), fault, ""))
        # only an endpoint leaves prompts unanswered, so the row stands only if there are any
        occurs = fault != "unanswered" or any(_counted(_rates(columns, names, fault, "")))
        if any(total) and occurs:
            rows.append(Row(label, total, summary=True))
            rows += [
                Row(name, _counts(_rates(columns, [name], fault, "")), page_only=True)
                for name in names
            ]
    title = "Faulty completions, over all sets and by set"
    return Grid(columns, [Block(title, "faulty completions", rows)] if rows else [])


def _counted(cells: Cells) -> list[int]:
    return [round(cell.estimate * (cell.n or 0)) if cell else 0 for cell in cells]


def _counts(cells: Cells) -> Cells:
    counted = zip(cells, _counted(cells), strict=True)
    return tuple(words(f"{count} of {cell.n}") if cell else None for cell, count in counted)


def contamination(chosen: Selection) -> Grid:
    """Evaluation prompts among the rows trained on, by the way they were found."""
    columns = chosen.columns
    rows = []
    for name in dict.fromkeys(name for c in columns for name in c.evaluation.contamination):
        overlaps = [column.evaluation.contamination.get(name) for column in columns]
        cells = tuple(
            overlap
            and words(
                f"{overlap.exact} / {overlap.near} / {overlap.ngram} of {overlap.n}",
                ", ".join(f"{source} {n}" for source, n in overlap.by_source.items()),
            )
            for overlap in overlaps
        )
        rows.append(Row(name, cells, page_only=not any(map(seen, overlaps))))
    title = f"{CONTAMINATED} Evaluation prompts among the rows trained on: exact / near / n-gram"
    return Grid(columns, [Block(title, "in training: exact / near / n-gram", rows)] if rows else [])
