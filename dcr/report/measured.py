"""What is measured beside refusals: ability, answer quality, faulty answers, contamination."""

from collections.abc import Sequence
from dataclasses import dataclass

from dcr.report import judged, tables
from dcr.report.cells import CONTAMINATED, Row, Section, Value, words
from dcr.report.entries import Entry
from dcr.report.scores import FAULTS, Overlap, Quality
from dcr.statistics import Interval

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


def grids(columns: Sequence[Entry], completions: tables.Answers) -> Grids:
    """All tables of these columns; what nobody measured is empty."""
    return Grids(
        keyword=tables.sections(columns) + tables.discernment(columns, completions),
        judged=judged.judge_sections(columns),
        general=ability(columns) + quality(columns),
        agreement=judged.agreement(columns),
        usage=judged.usage(columns),
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


def _accuracy(entry: Entry, task: str, metric: str) -> Value | None:
    found = entry.evaluation.ability.get(task)
    if found is None or metric not in found.accuracies:
        return None
    interval = normal(*found.accuracies[metric])
    overlap = entry.evaluation.contamination.get(task)
    return Value(
        interval.estimate,
        interval.low,
        interval.high,
        contaminated=bool(overlap),
        aside=overlap.aside if overlap else "",
    )


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


def _win_rate(found: Quality | None) -> Value | None:
    if found is None:
        return None
    lengths = (found.mean_length, found.reference_length)
    told = [f"against {found.reference}" if found.reference else "", f"n\u00a0=\u00a0{found.n}"]
    if None not in lengths:
        told.append("{:.0f} characters, theirs {:.0f}".format(*lengths))
    aside = "; ".join(filter(None, told))
    return Value(found.win_rate / 100, spread=found.standard_error / 100, aside=aside)


def _rate(percent: float | None) -> Value | None:
    return None if percent is None else Value(percent / 100)


def faults(columns: Sequence[Entry]) -> list[Section]:
    """Faulty completions, each kind counted apart: over all sets, and by set on the page."""
    names = list(dict.fromkeys(name for entry in columns for name in entry.evaluation.sets))
    rows = []
    for fault, label in FAULTS.items():
        total = tuple(_faulty(entry, tables.together(names), fault) for entry in columns)
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


def _faulty(entry: Entry, names: Sequence[str], fault: str) -> Value | None:
    scores = tables.of_sets(entry, names)
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
        rows.append(Row(name, cells, page_only=not any(found)))
    title = f"{CONTAMINATED} Evaluation prompts among the rows trained on: exact / near / n-gram"
    return [Section(title, "in training: exact / near / n-gram", rows)] if rows else []


def _overlap(found: Overlap | None) -> Value | None:
    if found is None:
        return None
    return words(found.text, ", ".join(f"{name} {n}" for name, n in found.by_source.items()))
