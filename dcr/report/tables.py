"""The sections of a report that are grids: sets of prompts in rows, evaluations in columns."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dcr import inference
from dcr.core.config import Kind
from dcr.report.grids import (
    CONTAMINATED,
    NAMES,
    OUTCOME,
    WANTED,
    Block,
    Cell,
    Cells,
    Grid,
    Row,
    in_words,
    judges_of,
    marks_of,
    n_of,
    of_group,
    rate,
    rate_rows,
    rates,
    set_names,
    text_of,
    together,
    ways_of,
    words,
)
from dcr.report.records import Column, Evaluation
from dcr.report.sections import Selection
from dcr.report.writing import TextTable
from dcr.results.schema import Agreement, Overlap, Quality, Thoughts

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
AVERAGED = ("results", "judges", "agreement", "general")  # sections with a mean over seeds
FAILED = "invalid / error"  # verdicts that are unreadable or lack
THOUGHTS: dict[str, Callable[[Thoughts], int]] = {
    "refused in the thought and in the answer": lambda of: of.refused.both,
    "refused in the thought alone": lambda of: of.refused.thought_alone,
    "refused in the answer alone": lambda of: of.refused.answer_alone,
    "refused in neither": lambda of: of.refused.neither,
    "thought cut at the budget": lambda of: of.budget,
    "thought ended without an answer": lambda of: of.answerless,
}


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


def keyword_blocks(columns: Sequence[Column], rules: str = "paper") -> list[Block]:
    """The verdicts by some keyword rules, with sets in rows."""
    blocks, judge = [], f"keyword:{rules}"
    for kind, (title, short) in TITLES.items():
        names = set_names(columns, kind)
        others = [of for of in ("partial", "complied", "refused") if of != WANTED[kind]]
        sums = others if rules != "paper" else ()
        rows = rate_rows(columns, names, WANTED[kind], judge, aside=_unseen, sums=sums)
        empty = rates(columns, together(names), "empty", "")
        if any(cell and cell.estimate for cell in empty):
            rows.append(Row("empty, all sets", empty, True, aside=n_of(empty)))
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
        if judge == OUTCOME:  # has a section of its own
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
    names = [n for n in set_names(columns, kind) if any(rates(columns, [n], quantity, *by))]

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
            return _winrates(own) if own and annotator_name(own) == head else {}

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


def _winrates(own: Quality) -> dict[str, Cell]:
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
        cells = rates(columns, over, fault, "")
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
        if calibration is None or calibration.target is None:
            continue
        target = calibration.target
        for name, of in calibration.sets.items():
            if of.kind is not Kind.toxic or not of.n:
                continue
            cell = Cell(of.refused / of.n, n=of.n)
            about = f"{in_words(name)}, chosen on"
            rows.append((column.name, about, *_against(target, cell), "–"))
        names = set_names([column], Kind.toxic)
        for label, sets in [*((name, [name]) for name in names), ("all sets", names)]:
            pooled = together(sets) or sets
            refused = rate(evaluation, pooled, "refused")
            told = text_of(rate(evaluation, pooled, "refused", OUTCOME))
            rows.append((column.name, in_words(label), *_against(target, refused), told))
    heads = "run", "toxic prompts", "target, %", "refused, %", "off by", "refused by outcome, %"
    return TextTable.of(rows, *heads)


def _against(target: float, refused: Cell | None) -> tuple[str, str, str]:
    off = "–" if refused is None else f"{100 * (refused.estimate - target):+.1f}"
    return f"{100 * target:.0f}", text_of(refused), off


def thoughts(chosen: Selection) -> Grid:
    """Thoughts before answers.

    A thought refuses where it resolves to, by rules (`dcr.thinking`), an answer by XSTest's
    keywords. A thought that was cut, or that the model ended without an answer, was ended for it.
    """
    columns, blocks = chosen.columns, []
    for kind in (Kind.seemingly_toxic, Kind.toxic):
        names = together(set_names(columns, kind))
        known = [column.evaluation.thinking for column in columns]
        found = [[of[name] for name in names if name in of] for of in known]
        rows = [
            Row(label, tuple(_share([count(of) for of in sets], sets) for sets in found))
            for label, count in THOUGHTS.items()
        ]
        named = kind.value.replace("_", " ")
        if any(found):
            title = f"Thoughts on {named} prompts, all sets, %"
            blocks.append(Block(title, f"thoughts, {named}, %", rows))
    return Grid(columns, blocks)


def _share(counts: list[int], sets: list[Thoughts]) -> Cell | None:
    n = sum(of.n for of in sets)
    found = inference.wilson(sum(counts), n) if n else None
    return found and Cell(found.estimate, found.low, found.high, n=n)
