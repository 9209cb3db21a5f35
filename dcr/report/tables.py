"""The numbers of a report: rates with intervals, discernment, means over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dcr import statistics
from dcr.config import Kind
from dcr.report.entries import Entry, Group
from dcr.report.records import SetScore
from dcr.statistics import Interval

IN_DISTRIBUTION = "†"

TITLES = {  # on the page, and in the narrow terminal
    Kind.seemingly_toxic: ("Compliance with seemingly toxic prompts, %", "compliance, %"),
    Kind.toxic: ("Keyword refusal of toxic prompts, %", "keyword refusal, %"),
}


@dataclass(frozen=True)
class Value:
    """One cell. `spread` is the standard deviation over seeds; `aside` is for the page only."""

    estimate: float
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    percent: bool = True
    marked: bool = False
    aside: str = ""


@dataclass(frozen=True)
class Row:
    """A set of prompts, or a summary over sets, with one value a column."""

    label: str
    values: tuple[Value | None, ...]
    summary: bool = False
    page_only: bool = False
    aside: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    short: str
    rows: list[Row]


def rate(
    scores: Sequence[SetScore], rules: str = "paper", *, unseen: bool = False
) -> Interval | None:
    """The rate over all prompts of sets of one kind, with its 95% Wilson interval.

    Compliance (1 - refused) of seemingly toxic prompts, refusal of toxic ones; None of nothing.
    """
    counts = [
        (score.unseen_n, score.unseen_refused) if unseen else (score.n, score.refused)
        for score in scores
    ]
    n = sum(count for count, _ in counts)
    if not n or any(count and rules not in refused for count, refused in counts):
        return None
    refused = sum(refused.get(rules, 0) for _, refused in counts)
    return statistics.wilson(refused if scores[0].kind is Kind.toxic else n - refused, n)


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


def sections(columns: Sequence[Entry], rules: str = "paper") -> list[Section]:
    """The table of the verdicts by some keyword rules: sets down the side, columns across."""
    found = []
    for kind, (title, short) in TITLES.items():
        names = set_names(columns, kind)
        rows = [row for row in _rate_rows(columns, names, rules) if any(row.values)]
        if rows:
            found.append(Section(title, short, rows))
    return found


def discernment(columns: Sequence[Entry]) -> list[Section]:
    """AUROCs of the refusal mass, toxic above seemingly toxic; empty if nobody measured them."""
    values = tuple(_discernment(entry) for entry in columns)
    if not any(values):
        return []
    rows = [Row("pooled", values, summary=True)]
    for name in dict.fromkeys(n for e in columns for n in e.evaluation.discernment_pairs):
        pairs = tuple(_discernment(entry, name) for entry in columns)
        rows.append(Row(name, pairs, page_only=True))
    return [Section("Discernment AUROC", "discernment AUROC", rows)]


def _rate_rows(columns: Sequence[Entry], names: list[str], rules: str) -> list[Row]:
    rows = [_rate_row(name, columns, [name], rules) for name in names]
    if len(names) < 2:
        return rows
    rows.append(_rate_row("pooled", columns, names, rules, summary=True))
    unmarked = [name for name in names if name not in marked_sets(columns)]
    if unmarked and len(unmarked) < len(names):
        label = f"pooled without {IN_DISTRIBUTION}"
        rows.append(_rate_row(label, columns, unmarked, rules, summary=True))
    means = tuple(_macro(of_sets(entry, names), rules) for entry in columns)
    rows.append(Row("mean of the sets", means, summary=True, page_only=True))
    return rows


def _rate_row(
    label: str, columns: Sequence[Entry], names: list[str], rules: str, summary: bool = False
) -> Row:
    values = tuple(_pooled(of_sets(entry, names), rules) for entry in columns)
    counts = sorted({n for e in columns if (n := sum(score.n for score in of_sets(e, names)))})
    return Row(label, values, summary, aside=f"n = {' or '.join(map(str, counts))}")


def _pooled(scores: list[SetScore], rules: str) -> Value | None:
    interval = rate(scores, rules)
    if interval is None:
        return None
    unseen = rate(scores, rules, unseen=True) if len(scores) == 1 else None
    return Value(
        interval.estimate,
        interval.low,
        interval.high,
        marked=any(score.in_distribution for score in scores),
        aside=f"unseen groups: {percents(unseen)} of {scores[0].unseen_n}" if unseen else "",
    )


def _macro(scores: list[SetScore], rules: str) -> Value | None:
    rates = [interval.estimate for score in scores if (interval := rate([score], rules))]
    if not rates:
        return None
    mean, _ = statistics.mean_and_spread(rates)
    return Value(mean, marked=any(score.in_distribution for score in scores))


def _discernment(entry: Entry, pair: str | None = None) -> Value | None:
    evaluation = entry.evaluation
    found = evaluation.discernment_pairs.get(pair) if pair else evaluation.discernment
    if found is None or not math.isfinite(found.estimate):
        return None
    names = pair.split(" / ") if pair else evaluation.sets
    marked = any(s.in_distribution for s in of_sets(entry, list(names)))
    return Value(found.estimate, found.low, found.high, percent=False, marked=marked)


def over_seeds(table: Sequence[Section], groups: Sequence[Group]) -> list[Section]:
    """The same table with one column a group: mean and standard deviation over its seeds."""
    return [
        Section(
            section.title,
            section.short,
            [
                Row(
                    row.label,
                    tuple(_mean([row.values[place] for place in group.places]) for group in groups),
                    row.summary,
                    row.page_only,
                )
                for row in section.rows
            ],
        )
        for section in table
    ]


def _mean(values: Sequence[Value | None]) -> Value | None:
    known = [value for value in values if value]
    if not known:
        return None
    mean, spread = statistics.mean_and_spread([value.estimate for value in known])
    short = f"of {len(known)} seeds only" if len(known) < len(values) else ""
    marked = any(value.marked for value in known)
    return Value(mean, spread=spread, percent=known[0].percent, marked=marked, aside=short)


def percents(interval: Interval) -> str:
    """`67.0% [57.3–75.4]`."""
    estimate, low, high = (100 * end for end in (interval.estimate, interval.low, interval.high))
    return f"{estimate:.1f}% [{low:.1f}–{high:.1f}]"


def text_of(value: Value | None, digits: int = 0) -> str:
    """A cell in words: percents with a decimal, their intervals with `digits`, AUROCs with two."""
    if value is None:
        return "–"
    scale, places, ends = (100, 1, digits) if value.percent else (1, 2, 2)
    text = f"{scale * value.estimate:.{places}f}"
    if value.spread is not None:
        text += f" ± {scale * value.spread:.{places}f}"
    elif value.low is not None and value.high is not None:
        low, high = (f"{scale * end:.{ends}f}" for end in (value.low, value.high))
        if not value.percent:  # .61 for 0.61: one more column fits a terminal
            low, high = low.removeprefix("0"), high.removeprefix("0")
        text += f" [{low}–{high}]"
    return text + (IN_DISTRIBUTION if value.marked else "")
