"""The rates of a report: keyword verdicts with intervals, discernment, means over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from dcr import statistics
from dcr.benchmarks import APART, PAPER_SAFETY, pairs_of
from dcr.config import Kind
from dcr.report.cells import IN_DISTRIBUTION, Row, Section, Value, percents
from dcr.report.completions import Completion
from dcr.report.entries import Entry, Group
from dcr.report.scores import SetScore
from dcr.statistics import Interval

TITLES = {  # on the page, and in the narrow terminal
    Kind.seemingly_toxic: ("Compliance with seemingly toxic prompts, %", "compliance, %"),
    Kind.toxic: ("Keyword refusal of toxic prompts, %", "keyword refusal, %"),
}

# What is wanted of a set, and of how many responses; None where nobody counted it.
Count = Callable[[SetScore], tuple[int, int] | None]
Answers = Callable[[Entry, str], list[Completion]]  # of a column to a set


def keyword(rules: str) -> Count:
    """Counts what is wanted by keyword rules: answers if seemingly toxic, refusals if toxic."""

    def count(score: SetScore) -> tuple[int, int] | None:
        if score.n and rules not in score.refused:
            return None
        refused = score.refused.get(rules, 0)
        answered = score.n - refused - score.partial.get(rules, 0)
        return (refused if score.kind is Kind.toxic else answered), score.n

    return count


def _outcome(name: str, rules: str) -> Count:
    """Counts one of XSTest's three outcomes; None in older files, which knew no partial refusal."""

    def count(score: SetScore) -> tuple[int, int] | None:
        if rules not in score.partial:
            return None
        refused, partial = score.refused[rules], score.partial[rules]
        counts = {"refused": refused, "partial": partial, "complied": score.n - refused - partial}
        return counts[name], score.n

    return count


def _unseen(score: SetScore) -> tuple[int, int]:
    refused = score.unseen_refused.get("paper", 0)
    return (refused if score.kind is Kind.toxic else score.unseen_n - refused), score.unseen_n


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
        if rules != "paper":  # whose rules know no partial refusal
            other = "complied" if kind is Kind.toxic else "refused"
            rows += [
                row
                for name in ("partial", other)
                if any(
                    (row := total_row(f"{name}, all sets", columns, names, _outcome(name, rules)))
                    .values
                )
            ]  # fmt: skip
        if rows:
            found.append(Section(title, short, rows))
    return found


def _unseen_aside(score: SetScore) -> str:
    interval = pooled([score], _unseen)
    return f"unseen groups: {percents(interval)} of {score.unseen_n}" if interval else ""


def rate_rows(
    columns: Sequence[Entry], names: Sequence[str], count: Count, aside: Callable[[SetScore], str]
) -> list[Row]:
    """A row a set, and the summaries over them; rows without a single value are left out."""

    def row(label: str, of: Callable[[Entry], list[SetScore]], mean: bool = False) -> Row:
        return _row(label, columns, of, count, mean)

    rows = [_set_row(name, columns, count, aside) for name in names]
    names = together(names)
    if len(names) > 1 and set(names) != set(PAPER_SAFETY):
        rows.append(total_row("pooled", columns, names, count))
    unmarked = [name for name in names if name not in marked_sets(columns)]
    if unmarked and len(unmarked) < len(names):
        rows.append(total_row(f"pooled without {IN_DISTRIBUTION}", columns, unmarked, count))
    if set(PAPER_SAFETY) <= set(names):
        rows.append(row("mean of the paper's five", paper_safety, mean=True))
        rows.append(row("the paper's five pooled", paper_safety))
    if len(names) > 1 and set(names) != set(PAPER_SAFETY):
        rows.append(row("mean of the sets", lambda entry: of_sets(entry, names), mean=True))
    return [found for found in rows if any(found.values)]


def total_row(label: str, columns: Sequence[Entry], names: Sequence[str], count: Count) -> Row:
    """The pooled rate of the sets that may be summed up."""
    return _row(label, columns, lambda entry: of_sets(entry, together(names)), count, mean=False)


def _set_row(
    name: str, columns: Sequence[Entry], count: Count, aside: Callable[[SetScore], str]
) -> Row:
    values = []
    for entry in columns:
        scores = of_sets(entry, [name])
        interval = pooled(scores, count)
        values.append(_value(interval, scores, _told(scores[0], aside)) if interval else None)
    return Row(name, tuple(values), aside=_totals(columns, lambda e: of_sets(e, [name]), count))


def _row(
    label: str,
    columns: Sequence[Entry],
    of: Callable[[Entry], list[SetScore]],
    count: Count,
    mean: bool,
) -> Row:
    values = []
    for entry in columns:
        interval = (macro if mean else pooled)(scores := of(entry), count)
        values.append(_value(interval, scores) if interval else None)
    only_on_page = label == "mean of the sets"
    totals = "" if mean else _totals(columns, of, count)
    return Row(label, tuple(values), True, only_on_page, totals)


def _totals(columns: Sequence[Entry], of: Callable[[Entry], list[SetScore]], count: Count) -> str:
    totals = {sum(found[1] for score in of(e) if (found := count(score))) for e in columns}
    return f"n = {' or '.join(map(str, sorted(totals - {0})))}" if totals - {0} else ""


def _told(score: SetScore, aside: Callable[[SetScore], str]) -> str:
    return "; ".join(filter(None, (aside(score), score.aside)))


def _value(interval: Interval, scores: Sequence[SetScore], aside: str = "") -> Value:
    return Value(
        interval.estimate,
        interval.low,
        interval.high,
        marked=any(score.in_distribution for score in scores),
        contaminated=any(score.contaminated for score in scores),
        aside=aside,
    )


def discernment(columns: Sequence[Entry], completions: Answers) -> list[Section]:
    """AUROCs of the refusal mass, toxic above seemingly toxic; empty if nobody measured them.

    Where a set is in-distribution for a column, also over all others, from the stored completions.
    """
    kept = [together(list(entry.evaluation.sets)) for entry in columns]
    values = tuple(
        _auroc(entry, entry.evaluation.discernment, names)
        for entry, names in zip(columns, kept, strict=True)
    )
    if not any(values):
        return []
    rows = [Row("pooled", values, summary=True)]
    if marked := marked_sets(columns) & {name for names in kept for name in names}:
        kept = [[name for name in names if name not in marked] for names in kept]
        unmarked = tuple(
            _auroc(entry, _ranked(entry, names, completions), names)
            for entry, names in zip(columns, kept, strict=True)
        )
        rows += [Row(f"pooled without {IN_DISTRIBUTION}", unmarked, True)] if any(unmarked) else []
    known = pairs_of(name for entry in columns for name in entry.evaluation.sets)
    for label in dict.fromkeys(n for e in columns for n in e.evaluation.discernment_pairs):
        names = [name for side in known.get(label, (label.split(" / "),)) for name in side]
        pairs = tuple(_auroc(e, e.evaluation.discernment_pairs.get(label), names) for e in columns)
        rows.append(Row(label, pairs, page_only=True))
    return [Section("Discernment AUROC", "discernment AUROC", rows)]


def _auroc(entry: Entry, found: Interval | None, names: Sequence[str]) -> Value | None:
    if found is None or not math.isfinite(found.estimate):
        return None
    return replace(_value(found, of_sets(entry, names)), percent=False)


def _ranked(entry: Entry, names: Sequence[str], completions: Answers) -> Interval | None:
    """The AUROC over some sets, as the evaluation computes it over all; None where one lacks."""
    masses: dict[Kind, list[float]] = {kind: [] for kind in Kind}
    for score in of_sets(entry, names):
        found = [answer.refusal_mass for answer in completions(entry, score.name)]
        if len(found) < score.n or None in found:
            return None
        masses[score.kind] += [mass for mass in found if mass is not None]
    if not masses[Kind.toxic] or not masses[Kind.seemingly_toxic]:
        return None
    seed = entry.evaluation.settings.get("seed")
    return statistics.auroc_interval(
        masses[Kind.toxic], masses[Kind.seemingly_toxic], seed=seed if isinstance(seed, int) else 0
    )


def over_seeds(table: Sequence[Section], groups: Sequence[Group]) -> list[Section]:
    """The same table with one column a group: mean and standard deviation over its seeds."""
    found = []
    for section in table:
        rows = [
            Row(
                row.label,
                tuple(_mean([row.values[place] for place in group.places]) for group in groups),
                row.summary,
                row.page_only,
            )
            for row in section.rows
        ]
        found.append(Section(section.title, section.short, [r for r in rows if any(r.values)]))
    return [section for section in found if section.rows]


def _mean(values: Sequence[Value | None]) -> Value | None:
    known = [value for value in values if value and not value.text]
    if not known:
        return None
    mean, spread = statistics.mean_and_spread([value.estimate for value in known])
    return Value(
        mean,
        spread=spread,
        percent=known[0].percent,
        marked=any(value.marked for value in known),
        contaminated=any(value.contaminated for value in known),
        aside=f"of {len(known)} seeds only" if len(known) < len(values) else "",
    )
