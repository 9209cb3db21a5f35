"""The tables of a report: sets down the side, evaluations across, every cell with its interval."""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import pandas

from dcr import statistics
from dcr.config import Judge, Kind
from dcr.evaluation.sets import APART, PAPER_SAFETY
from dcr.report.columns import Answer, Entry, Group
from dcr.report.records import FAULTS, SetScore, seen
from dcr.results.schema import Ability, Agreement, Judged, Overlap, Quality, Usage
from dcr.statistics import Interval

IN_DISTRIBUTION, CONTAMINATED = "†", "‡"


@dataclass(frozen=True)
class Cell:
    """One cell. `spread` is a standard deviation over seeds, or the standard error of a win rate.

    `text` stands in place of the number where a cell is no rate; `aside` is for the page only.
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


@dataclass(frozen=True)
class Row:
    """A set of prompts, or a summary over sets, with one value a column."""

    label: str
    values: tuple[Cell | None, ...]
    summary: bool = False
    page_only: bool = False
    aside: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    short: str
    rows: list[Row]


def words(text: str, aside: str = "") -> Cell:
    """A cell that holds words."""
    return Cell(0.0, text=text, aside=aside)


def percents(interval: Interval) -> str:
    """`67.0% [57.3–75.4]`."""
    estimate, low, high = (100 * end for end in (interval.estimate, interval.low, interval.high))
    return f"{estimate:.1f}% [{low:.1f}–{high:.1f}]"


def text_of(value: Cell | None, digits: int = 0) -> str:
    """A cell in words: percents with a decimal, their intervals with `digits`, others with two."""
    if value is None:
        return "–"
    if value.text:
        return value.text + value.marks
    scale, places, ends = (100, 1, digits) if value.percent else (1, 2, 2)
    text = f"{scale * value.estimate:.{places}f}"
    if value.spread is not None:
        text += f" ± {scale * value.spread:.{places}f}"
    elif value.low is not None and value.high is not None:
        low, high = (f"{scale * end:.{ends}f}" for end in (value.low, value.high))
        if not value.percent:  # .61 for 0.61: one more column fits a terminal
            low, high = low.removeprefix("0"), high.removeprefix("0")
        text += f" [{low}–{high}]"
    return text + value.marks


def any_marked(table: Sequence[Section], mark: str, *, in_terminal: bool = False) -> bool:
    """Whether a cell of the table bears the mark, so that it needs its footnote."""
    return any(
        value is not None and mark in value.marks
        for section in table
        for row in section.rows
        if not (in_terminal and row.page_only)
        for value in row.values
    )


TITLES = {  # on the page, and in the narrow terminal
    Kind.seemingly_toxic: ("Compliance with seemingly toxic prompts, %", "compliance, %"),
    Kind.toxic: ("Keyword refusal of toxic prompts, %", "keyword refusal, %"),
}

WANTED = {Kind.seemingly_toxic: "complied", Kind.toxic: "refused"}

# What is wanted of a set, and of how many responses; None where nobody counted it.
Count = Callable[[SetScore], tuple[int, int] | None]
Answers = Callable[[Entry, str], list[Answer]]  # of a column to a set


def keyword(rules: str, outcome: str = "") -> Count:
    """Counts an outcome by keyword rules, or else the wanted one: complied if seemingly toxic.

    None where nobody counted it: older files know no partial refusals, and so no outcome of three.
    """

    def count(score: SetScore) -> tuple[int, int] | None:
        if score.n and rules not in (score.partial if outcome else score.refused):
            return None
        refused, partial = score.refused.get(rules, 0), score.partial.get(rules, 0)
        counts = {"refused": refused, "partial": partial, "complied": score.n - refused - partial}
        return counts[outcome or WANTED[score.kind]], score.n

    return count


def _unseen(score: SetScore) -> tuple[int, int] | None:
    if score.unseen is None:
        return None
    n, refused = score.unseen.n, score.unseen.refused.get("paper", 0)
    return (refused if score.kind is Kind.toxic else n - refused), n


def pooled(scores: Sequence[SetScore], count: Count) -> Interval | None:
    """The rate over all prompts of the sets, with its 95% Wilson interval.

    None of nothing, or if one of the sets was not counted.
    """
    counts = [found for score in scores if (found := count(score))]
    total = sum(n for _, n in counts)
    if not total or len(counts) < len(scores):
        return None
    return statistics.wilson(sum(wanted for wanted, _ in counts), total)


def macro(scores: Sequence[SetScore], count: Count) -> Interval | None:
    """The mean of the sets' rates; its 95% interval from theirs by squaring and adding.

    Zou and Donner (2008), Statistics in Medicine 27:1693, for a sum of independent estimates,
    whose Wilson intervals are not symmetric. None of nothing, or if a set was not counted.
    """
    rates = [rate for score in scores if (rate := pooled([score], count))]
    if not rates or len(rates) < len(scores):
        return None
    mean = sum(rate.estimate for rate in rates) / len(rates)
    below = math.hypot(*(rate.estimate - rate.low for rate in rates)) / len(rates)
    above = math.hypot(*(rate.high - rate.estimate for rate in rates)) / len(rates)
    return Interval(mean, max(0.0, mean - below), min(1.0, mean + above))


def set_names(columns: Sequence[Entry], kind: Kind) -> list[str]:
    """Every set of a kind that any column was evaluated on, in order of appearance."""
    return list(
        dict.fromkeys(
            name
            for entry in columns
            for name, score in entry.evaluation.sets.items()
            if score.kind is kind
        )
    )


def together(names: Sequence[str]) -> list[str]:
    """The sets that may be summed up: without those whose prompts another set holds too."""
    return [name for name in names if name not in APART]


def marked_sets(columns: Sequence[Entry]) -> set[str]:
    """The sets that are in-distribution for at least one column."""
    return {
        name
        for entry in columns
        for name, score in entry.evaluation.sets.items()
        if score.in_distribution
    }


def of_sets(entry: Entry, names: Sequence[str]) -> list[SetScore]:
    """An entry's scores of the named sets it was evaluated on."""
    return [entry.evaluation.sets[name] for name in names if name in entry.evaluation.sets]


def paper_safety(entry: Entry) -> list[SetScore]:
    """The scores of the paper's five safety sets, where all five were evaluated; else none."""
    found = of_sets(entry, PAPER_SAFETY)
    return found if len(found) == len(PAPER_SAFETY) else []


def sections(columns: Sequence[Entry], rules: str = "paper") -> list[Section]:
    """The table of the verdicts by some keyword rules: sets down the side, columns across."""
    found = []
    for kind, (title, short) in TITLES.items():
        names = set_names(columns, kind)
        rows = rate_rows(columns, names, keyword(rules), _unseen_aside)
        for name in () if rules == "paper" else ("partial", "complied", "refused"):
            row = total_row(f"{name}, all sets", columns, names, keyword(rules, name))
            if any(row.values) and name != WANTED[kind]:
                rows.append(row)
        if rows:
            found.append(Section(title, short, rows))
    return found


def _unseen_aside(score: SetScore) -> str:
    rate, counted = pooled([score], _unseen), _unseen(score)
    return f"unseen groups: {percents(rate)} of {counted[1]}" if rate and counted else ""


def rate_rows(
    columns: Sequence[Entry], names: Sequence[str], count: Count, aside: Callable[[SetScore], str]
) -> list[Row]:
    """A row a set, and the summaries over them; rows without a single value are left out."""

    rows = [
        _row(name, columns, functools.partial(of_sets, names=[name]), count, aside=aside)
        for name in names
    ]
    names = together(names)
    if len(names) > 1 and set(names) != set(PAPER_SAFETY):
        rows.append(total_row("pooled", columns, names, count))
    unmarked = [name for name in names if name not in marked_sets(columns)]
    if unmarked and len(unmarked) < len(names):
        rows.append(total_row(f"pooled without {IN_DISTRIBUTION}", columns, unmarked, count))
    if set(PAPER_SAFETY) <= set(names):
        rows.append(_row("mean of the paper's five", columns, paper_safety, count, mean=True))
        rows.append(_row("the paper's five pooled", columns, paper_safety, count))
    if len(names) > 1 and set(names) != set(PAPER_SAFETY):
        of = functools.partial(of_sets, names=names)
        mean = _row("mean of the sets", columns, of, count, mean=True)
        rows.append(replace(mean, page_only=True))
    return [found for found in rows if any(found.values)]


def total_row(label: str, columns: Sequence[Entry], names: Sequence[str], count: Count) -> Row:
    """The pooled rate of the sets that may be summed up."""
    return _row(label, columns, lambda entry: of_sets(entry, together(names)), count)


def _row(
    label: str,
    columns: Sequence[Entry],
    of: Callable[[Entry], list[SetScore]],
    count: Count,
    mean: bool = False,
    aside: Callable[[SetScore], str] | None = None,
) -> Row:
    """The rate over some sets; with `aside` the row of one set, and what else is known of it."""
    cells: list[Cell | None] = []
    totals = set()
    for entry in columns:
        scores = of(entry)
        rate = (macro if mean else pooled)(scores, count)
        told = [aside(scores[0]), scores[0].aside] if aside and scores else []
        cells.append(_value(rate, scores, "; ".join(filter(None, told))) if rate else None)
        totals.add(sum(found[1] for score in scores if (found := count(score))))
    known = sorted(totals - {0})
    n = f"n = {' or '.join(map(str, known))}" if known and not mean else ""
    return Row(label, tuple(cells), aside is None, aside=n)


def _value(interval: Interval, scores: Sequence[SetScore], aside: str = "") -> Cell:
    return Cell(
        interval.estimate,
        interval.low,
        interval.high,
        marks=marks_of(scores),
        aside=aside,
    )


def marks_of(scores: Sequence[SetScore]) -> str:
    """What a number bears in which these sets have a part."""
    known = IN_DISTRIBUTION if any(score.in_distribution for score in scores) else ""
    return known + (CONTAMINATED if any(score.contaminated for score in scores) else "")


def over_seeds(table: Sequence[Section], groups: Sequence[Group]) -> list[Section]:
    """The same table with one column a group: mean and standard deviation over its seeds."""
    found = []
    for section in table:
        rows = [
            Row(
                row.label,
                tuple(mean_of([row.values[place] for place in group.places]) for group in groups),
                row.summary,
                row.page_only,
            )
            for row in section.rows
        ]
        found.append(Section(section.title, section.short, [r for r in rows if any(r.values)]))
    return [section for section in found if section.rows]


def mean_of(values: Sequence[Cell | None]) -> Cell | None:
    """Mean and standard deviation over seeds; None where no seed has a number."""
    known = [value for value in values if value and not value.text]
    if not known:
        return None
    mean, spread = statistics.mean_and_spread([value.estimate for value in known])
    return Cell(
        mean,
        spread=spread,
        percent=known[0].percent,
        marks="".join(dict.fromkeys(mark for value in known for mark in value.marks)),
        aside=f"of {len(known)} seeds only" if len(known) < len(values) else "",
    )


NAMES = {
    Judge.llm.value: "LLM judge",
    Judge.llama_guard.value: "Llama Guard",
    Judge.wildguard.value: "WildGuard",
    Judge.moderation.value: "moderation",
}
Verdicts = Callable[[SetScore], Judged | None]
COMPLIANCE = ("complied", "partial", "refused")


@dataclass(frozen=True)
class Confusion:
    """One agreement with the column it belongs to, for the page."""

    entry: Entry
    agreement: Agreement

    @property
    def cells(self) -> list[int]:
        """Both complied, only the first, only the second, both refused, in any order of labels."""
        rows = self.agreement.confusion
        last = self.agreement.labels[0] in ("refused", "safe")
        ordered = [row[::-1] for row in rows[::-1]] if last else rows
        return [count for row in ordered for count in row]


def judges(columns: Sequence[Entry]) -> list[tuple[str, str]]:
    """Every (judge, model) that judged a set of any column, in the order of NAMES."""
    return judges_of(score for entry in columns for score in entry.evaluation.sets.values())


def judges_of(scores: Iterable[SetScore]) -> list[tuple[str, str]]:
    """Every (judge, model) that judged one of these sets, in the order of NAMES."""
    found = {(judge, judged.model) for score in scores for judge, judged in score.judged.items()}
    places = {judge: place for place, judge in enumerate(NAMES)}
    return sorted(found, key=lambda pair: (places.get(pair[0], len(NAMES)), *pair))


def judge_sections(columns: Sequence[Entry]) -> list[Section]:
    """Compliance, refusal and defence success rate by every judge, each where it was judged."""
    found = []
    for judge, model in judges(columns):
        verdicts = verdicts_of(judge, model)
        name = NAMES.get(judge, judge)
        by = f"by {name} ({model})" if model else f"by {name}"
        several = sum(other == judge for other, _ in judges(columns)) > 1
        found += [
            _compliance(columns, verdicts, by, f"by {model if several else name}"),
            _refusal(columns, verdicts, by, f"by {model if several else name}"),
            _defence(columns, verdicts, by, f"by {model if several else name}"),
        ]
    return [section for section in found if section.rows]


def verdicts_of(judge: str, model: str) -> Verdicts:
    """A judge by one of its models."""

    def of(score: SetScore) -> Judged | None:
        judged = score.judged.get(judge)
        return judged if judged and judged.model == model else None

    return of


def complied(verdicts: Verdicts, labels: Sequence[str] = ("complied",)) -> Count:
    """Responses with one of these compliance labels, of those with any."""

    def count(score: SetScore) -> tuple[int, int] | None:
        judged = verdicts(score)
        labelled = sum(judged.counts.get(label, 0) for label in COMPLIANCE) if judged else 0
        if judged is None or not labelled:
            return None
        return sum(judged.counts.get(label, 0) for label in labels), labelled

    return count


def defended(verdicts: Verdicts) -> Count:
    """Responses judged safe, of all that were answered: an unreadable verdict is not safe."""

    def count(score: SetScore) -> tuple[int, int] | None:
        judged = verdicts(score)
        if judged is None or "safe" not in judged.counts:
            return None
        safe = judged.counts["safe"]
        return safe, safe + judged.counts.get("unsafe", 0) + judged.invalid

    return count


def _compliance(columns: Sequence[Entry], verdicts: Verdicts, by: str, short: str) -> Section:
    names = _judged_sets(columns, Kind.seemingly_toxic, complied(verdicts))
    rows = rate_rows(columns, names, complied(verdicts), _compliance_aside(verdicts))
    if rows and any("partial" in judged.counts for judged in _all(columns, names, verdicts)):
        for label, counted in (("partial", ["partial"]), ("lenient", ["complied", "partial"])):
            count = complied(verdicts, counted)
            rows.append(total_row(f"{label}, all sets", columns, names, count))
    rows += _failures(columns, names, verdicts)
    title = f"Compliance with seemingly toxic prompts {by}, strict, %"
    return Section(title, f"compliance {short}, strict, %", rows)


def _compliance_aside(verdicts: Verdicts) -> Callable[[SetScore], str]:
    def aside(score: SetScore) -> str:
        judged = verdicts(score)
        partial = judged.counts.get("partial", 0) if judged else 0
        lenient = pooled([score], complied(verdicts, ["complied", "partial"]))
        return f"{partial} partial, lenient {100 * lenient.estimate:.1f}" if lenient else ""

    return aside


def _refusal(columns: Sequence[Entry], verdicts: Verdicts, by: str, short: str) -> Section:
    count = complied(verdicts, ["refused"])
    names = _judged_sets(columns, Kind.toxic, count)
    rows = rate_rows(columns, names, count, lambda _: "")
    if rows and any("partial" in judged.counts for judged in _all(columns, names, verdicts)):
        partial = complied(verdicts, ["partial"])
        rows.append(total_row("partial, all sets", columns, names, partial))
    title = f"Full refusal of toxic prompts {by}, %"
    # the terminal has the sums alone
    rows = [replace(row, page_only=row.page_only or not row.summary) for row in rows]
    return Section(title, f"full refusal {short}, %", rows)


def _defence(columns: Sequence[Entry], verdicts: Verdicts, by: str, short: str) -> Section:
    names = _judged_sets(columns, Kind.toxic, defended(verdicts))
    rows = rate_rows(columns, names, defended(verdicts), lambda _: "")
    rows += _failures(columns, names, verdicts)
    title = f"DSR: share of responses to toxic prompts judged safe {by}, %"
    return Section(title, f"DSR {short}, %", rows)


def _judged_sets(columns: Sequence[Entry], kind: Kind, count: Count) -> list[str]:
    return [
        name
        for name in set_names(columns, kind)
        if any(count(score) for entry in columns for score in of_sets(entry, [name]))
    ]


def _all(columns: Sequence[Entry], names: Sequence[str], verdicts: Verdicts) -> list[Judged]:
    scores = [score for entry in columns for score in of_sets(entry, names)]
    return [judged for score in scores if (judged := verdicts(score))]


def _failures(columns: Sequence[Entry], names: Sequence[str], verdicts: Verdicts) -> list[Row]:
    """A row that counts what brought no verdict, where anything did not."""
    if not any(judged.invalid or judged.error for judged in _all(columns, names, verdicts)):
        return []
    cells = []
    for entry in columns:
        found = _all([entry], names, verdicts)
        invalid, error = sum(j.invalid for j in found), sum(j.error for j in found)
        cells.append(words(f"{invalid} / {error}") if found else None)
    return [Row("invalid / error", tuple(cells), aside="unreadable / not answered")]


def agreement(columns: Sequence[Entry]) -> list[Section]:
    """Cohen's κ of every two judges, apart by the kind of prompt."""
    found = [_agreements(entry) for entry in columns]
    keys = list(dict.fromkeys(key for by_key in found for key in by_key))
    rows = []
    for key in keys:
        a, b, kind = key
        cells = tuple(_kappa(by_key[key]) if key in by_key else None for by_key in found)
        rows.append(Row(f"{a} / {b}, {kind.replace('_', ' ')}", cells))
    return [Section("Agreement of two judges, Cohen's κ", "agreement κ", rows)] if rows else []


def _agreements(entry: Entry) -> dict[tuple[str, str, str], Agreement]:
    return {(*found.judges, found.kind): found for found in entry.evaluation.agreement}


def _kappa(found: Agreement) -> Cell:
    if found.kappa is None or not math.isfinite(found.kappa):
        return words("undefined", f"n = {found.n}")
    return Cell(found.kappa, percent=False, aside=f"n = {found.n}")


def confusions(columns: Sequence[Entry]) -> list[Confusion]:
    """Every agreement of every column."""
    return [Confusion(entry, found) for entry in columns for found in entry.evaluation.agreement]


def usage(columns: Sequence[Entry]) -> list[Section]:
    """Requests and spend of every judge, and of the annotator of quality."""
    spent = [_by_server(entry) for entry in columns]
    names = dict.fromkeys(name for by_name in spent for name in by_name)
    rows = [Row(name, tuple(_spent(by_name.get(name)) for by_name in spent)) for name in names]
    title = "Requests to servers, and estimated spend"
    return [Section(title, "requests, spend", rows)] if rows else []


def _by_server(entry: Entry) -> dict[str, Usage]:
    quality = entry.evaluation.quality
    annotator = {"annotator": quality.usage} if quality and quality.usage else {}
    return entry.evaluation.usage | annotator


def _spent(spent: Usage | None) -> Cell | None:
    if spent is None:
        return None
    told = f"{spent.requests:,}" + ("" if spent.usd is None else f", ${spent.usd:,.2f}")
    tokens = f"tokens: {spent.prompt_tokens:,} in, {spent.completion_tokens:,} out"
    return words(told, tokens if spent.usd is not None else f"{tokens}; no price given")


Z = 1.959964  # of a two-sided 95% interval
# Faults that are told even where there are none; an endpoint alone leaves prompts unanswered.
ALWAYS_TOLD = tuple(fault for fault in FAULTS if fault != "unanswered")
METRICS = ("acc", "acc_norm")


@dataclass(frozen=True)
class Grids:
    """Every table with the evaluations as columns, by subject."""

    keyword: list[Section]
    judged: list[Section]
    general: list[Section]
    agreement: list[Section]
    usage: list[Section]
    faults: list[Section]
    contamination: list[Section]

    @property
    def rates(self) -> list[Section]:
        """Those whose cells have a mean over seeds."""
        return [*self.keyword, *self.judged, *self.general, *self.agreement]

    @property
    def all(self) -> list[Section]:
        """In the order of the terminal."""
        counted = [*self.contamination, *self.faults, *self.agreement, *self.usage]
        return [*self.keyword, *self.judged, *self.general, *counted]


def grids(columns: Sequence[Entry], ranked: Sequence[Section]) -> Grids:
    """All tables of these columns, with those of discernment; what nobody measured is empty."""
    return Grids(
        keyword=[*sections(columns), *ranked],
        judged=judge_sections(columns),
        general=ability(columns) + quality(columns),
        agreement=agreement(columns),
        usage=usage(columns),
        faults=faults(columns),
        contamination=contamination(columns),
    )


def normal(estimate: float, error: float) -> Interval:
    """A share with the 95% interval of its standard error, within [0, 1]."""
    return Interval(estimate, max(0.0, estimate - Z * error), min(1.0, estimate + Z * error))


def ability(columns: Sequence[Entry]) -> list[Section]:
    """Accuracies of the harness's tasks; both of them where a task has two."""
    rows = []
    for task in dict.fromkeys(task for entry in columns for task in entry.evaluation.ability):
        for metric in METRICS:
            values = tuple(_accuracy(entry, task, metric) for entry in columns)
            if any(values):
                rows.append(Row(f"{task} {metric}", values, aside=_asked(columns, task)))
    return [Section("General ability, accuracy, %", "ability, %", rows)] if rows else []


def _accuracy(entry: Entry, task: str, metric: str) -> Cell | None:
    found = entry.evaluation.ability.get(task)
    rate = accuracy(found, metric) if found else None
    if rate is None:
        return None
    touched = seen(entry.evaluation.contamination.get(task))
    return Cell(
        rate.estimate, rate.low, rate.high, marks=CONTAMINATED if touched else "", aside=touched
    )


def accuracy(found: Ability, metric: str) -> Interval | None:
    """Of acc or acc_norm, with 95% of its standard error."""
    value, error = getattr(found, metric), getattr(found, f"{metric}_stderr")
    return None if value is None else normal(value, error or 0.0)


def _asked(columns: Sequence[Entry], task: str) -> str:
    found = [a for entry in columns if (a := entry.evaluation.ability.get(task))]
    told = dict.fromkeys(
        f"{a.shots}-shot, n = {a.n}{' (cut)' if a.limit is not None else ''}" for a in found
    )
    return " or ".join(told)


def is_local(annotator: str) -> bool:
    """Whether the annotator is none of OpenAI's GPT models, of which the paper used one."""
    name = annotator.rsplit("/", 1)[-1].lower()
    return not name.startswith(("gpt-", "chatgpt-")) or name.startswith("gpt-oss")


def annotator_name(found: Quality) -> str:
    local = " (local annotator, not GPT-4o-mini)" if is_local(found.annotator) else ""
    return f"annotator: {found.annotator}{local}"


def quality(columns: Sequence[Entry]) -> list[Section]:
    """Win rates against the reference's answers, a section an annotator."""
    found = [entry.evaluation.quality for entry in columns]
    sections = []
    for head in dict.fromkeys(annotator_name(q) for q in found if q):
        chosen = [q if q and annotator_name(q) == head else None for q in found]
        rows = [
            Row("win rate", tuple(_win_rate(q) for q in chosen)),
            Row("length-controlled", tuple(_rate(q and q.length_controlled) for q in chosen)),
            Row("discrete", tuple(_rate(q and q.discrete) for q in chosen)),
        ]
        if any(q and (q.invalid or q.error) for q in chosen):
            cells = tuple(words(f"{q.invalid} / {q.error}") if q else None for q in chosen)
            rows.append(Row("invalid / error", cells, aside="unreadable / not answered"))
        title = f"Answer quality, win rate, % — {head}"
        kept = [row for row in rows if any(row.values)]
        sections.append(Section(title, f"quality, %; {head}", kept))
    return sections


def _win_rate(found: Quality | None) -> Cell | None:
    if found is None or found.win_rate is None:
        return None
    lengths = (found.mean_length, found.reference_length)
    told = [f"against {found.reference}" if found.reference else "", f"n\u00a0=\u00a0{found.n}"]
    if None not in lengths:
        told.append("{:.0f} characters, theirs {:.0f}".format(*lengths))
    aside = "; ".join(filter(None, told))
    return Cell(found.win_rate / 100, spread=(found.standard_error or 0.0) / 100, aside=aside)


def _rate(percent: float | None) -> Cell | None:
    return None if percent is None else Cell(percent / 100)


def faults(columns: Sequence[Entry]) -> list[Section]:
    """Faulty completions, each kind counted apart: over all sets, and by set on the page."""
    names = list(dict.fromkeys(name for entry in columns for name in entry.evaluation.sets))
    rows = []
    for fault, label in FAULTS.items():
        total = tuple(_faulty(entry, together(names), fault) for entry in columns)
        if any(total) and (fault in ALWAYS_TOLD or _occurs(columns, fault)):
            rows.append(Row(label, total, summary=True))
            rows += [
                Row(name, tuple(_faulty(entry, [name], fault) for entry in columns), page_only=True)
                for name in names
            ]
    title = "Faulty completions, over all sets and by set"
    return [Section(title, "faulty completions", rows)] if rows else []


def _occurs(columns: Sequence[Entry], fault: str) -> bool:
    return any(s.faults.get(fault) for e in columns for s in e.evaluation.sets.values())


def _faulty(entry: Entry, names: Sequence[str], fault: str) -> Cell | None:
    scores = of_sets(entry, names)
    if not scores or any(fault not in score.faults for score in scores):
        return None
    count = sum(score.faults[fault] for score in scores)
    asked = sum(score.n for score in scores) + (count if fault == "unanswered" else 0)
    return words(f"{count} of {asked}")


def contamination(columns: Sequence[Entry]) -> list[Section]:
    """Evaluation prompts that stand among the rows trained on, by how they were found."""
    rows = []
    for name in dict.fromkeys(name for e in columns for name in e.evaluation.contamination):
        found = [entry.evaluation.contamination.get(name) for entry in columns]
        cells = tuple(_overlap(overlap) for overlap in found)
        rows.append(Row(name, cells, page_only=not any(map(seen, found))))
    title = f"{CONTAMINATED} Evaluation prompts among the rows trained on: exact / near / n-gram"
    return [Section(title, "in training: exact / near / n-gram", rows)] if rows else []


def _overlap(found: Overlap | None) -> Cell | None:
    if found is None:
        return None
    counts = f"{found.exact} / {found.near} / {found.ngram} of {found.n}"
    return words(counts, ", ".join(f"{name} {n}" for name, n in found.by_source.items()))


def csv_text(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Numbers in full precision, and no text that a spreadsheet takes for a formula."""
    plain = [[_plain(value) for value in row] for row in rows]
    frame = pandas.DataFrame(plain, columns=list(header), dtype=object)
    return frame.to_csv(index=False, lineterminator="\n")


def _plain(value: object) -> object:
    if isinstance(value, str):
        return f"'{value}" if value[:1] in ("=", "+", "-", "@", "\t") else value
    return value
