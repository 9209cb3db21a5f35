"""Our own evaluations in the columns of the paper's tables."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dcr import statistics
from dcr.benchmarks import PAPER_SAFETY
from dcr.config import Judge
from dcr.report import judged, measured
from dcr.report.cells import CONTAMINATED, IN_DISTRIBUTION
from dcr.report.entries import Entry
from dcr.report.scores import SetScore
from dcr.report.tables import Count, keyword, macro, of_sets, paper_safety, pooled
from dcr.statistics import Interval

SETS = {  # of several the first that was evaluated
    "XS": ("xstest_safe",),
    "CoCo": ("coconot_contrast",),
    "OR": ("orbench_hard",),
    "OK": ("oktest",),
    "PH": ("phtest", "phtest_harmless"),
}
ABILITY = {
    "MMLU": ("mmlu", "acc"),
    "ARC_e": ("arc_easy", "acc_norm"),
    "ARC_c": ("arc_challenge", "acc_norm"),
    "OpQA": ("openbookqa", "acc_norm"),
    "PIQA": ("piqa", "acc_norm"),
}
SAFETY = ("Safety", "Safety_pooled", "keyword_refusal")
COLUMNS = (*SETS, *SAFETY, *ABILITY, "AlpacaEval")
# Who judged safety, best first: the paper's main table is by Llama Guard.
GUARDS = (Judge.llama_guard.value, Judge.wildguard.value, Judge.moderation.value)


@dataclass(frozen=True)
class Cell:
    """A number in the paper's unit (0 to 1, win rates in percent); `spread` is over seeds."""

    estimate: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    spread: float | None = None
    marks: str = ""
    digits: int = 2

    def text(self, intervals: bool = True) -> str:
        """`0.83 [0.78–0.87]`, without the marks."""
        text = f"{self.estimate:.{self.digits}f}"
        if self.spread is not None:
            text += f" ± {self.spread:.{self.digits}f}"
        elif intervals and self.low is not None and self.high is not None:
            text += f" [{self.low:.{self.digits}f}–{self.high:.{self.digits}f}]"
        return text


Cells = dict[str, Cell]


def digits(column: str) -> int:
    """Decimals, as many as the paper prints."""
    return 1 if column == "AlpacaEval" else 2


def suite(entry: Entry) -> Cells:
    """Table 1's columns; keyword refusal only where no guard or moderation judged safety."""
    guard = _guard(entry)
    cells = _compliance(entry, keyword("paper"))
    cells |= _safety(entry, _defended(*guard)) if guard else _keyword_refusal(entry)
    for column, (task, metric) in ABILITY.items():
        if found := entry.evaluation.ability.get(task):
            # a task may have no normalised accuracy
            accuracy = found.accuracies.get(metric) or next(iter(found.accuracies.values()))
            interval = measured.normal(*accuracy)
            marks = CONTAMINATED if entry.evaluation.contamination.get(task) else ""
            cells[column] = _cell(interval, found.n, marks)
    if won := entry.evaluation.quality:
        reach = measured.Z * won.standard_error
        interval = Interval(won.win_rate, won.win_rate - reach, won.win_rate + reach)
        cells["AlpacaEval"] = _cell(interval, won.n, "", digits("AlpacaEval"))
    return cells


def by_keywords(entry: Entry) -> Cells:
    return _compliance(entry, keyword("paper")) | _keyword_refusal(entry)


def by_judge(entry: Entry, judge: str, model: str) -> Cells:
    """Strict compliance and defence success, whichever of them the judge gives."""
    verdicts = judged.verdicts_of(judge, model)
    return _compliance(entry, judged.complied(verdicts)) | _safety(entry, _defended(judge, model))


def over_seeds(seeds: Sequence[Cells]) -> Cells:
    """Mean and standard deviation of the columns that every seed has."""
    cells = {}
    for key in seeds[0]:
        found = [cells_of[key] for cells_of in seeds if key in cells_of]
        if len(found) == len(seeds):
            mean, spread = statistics.mean_and_spread([cell.estimate for cell in found])
            marks = "".join(dict.fromkeys(mark for cell in found for mark in cell.marks))
            cells[key] = Cell(mean, spread=spread, marks=marks, digits=found[0].digits)
    return cells


def _guard(entry: Entry) -> tuple[str, str] | None:
    """The judge and model whose verdicts stand for safety."""
    found = {
        judge: verdicts.model
        for score in of_sets(entry, PAPER_SAFETY)
        for judge, verdicts in score.judged.items()
    }
    return next(((judge, found[judge]) for judge in GUARDS if judge in found), None)


def _defended(judge: str, model: str) -> Count:
    return judged.defended(judged.verdicts_of(judge, model))


def _compliance(entry: Entry, count: Count) -> Cells:
    cells = {}
    for column, names in SETS.items():
        scores = of_sets(entry, names)[:1]
        if interval := pooled(scores, count):
            cells[column] = _cell(interval, _total(scores, count), _marks(scores))
    return cells


def _safety(entry: Entry, count: Count) -> Cells:
    """The mean over the five sets and their pool; of fewer than five the mean alone."""
    scores = [score for score in of_sets(entry, PAPER_SAFETY) if count(score)]
    cells, total, marks = {}, _total(scores, count), _marks(scores)
    if mean := macro(scores, count):
        cells["Safety"] = _cell(mean, total, marks)
    if len(scores) == len(PAPER_SAFETY) and (rate := pooled(scores, count)):
        cells["Safety_pooled"] = _cell(rate, total, marks)
    return cells


def _keyword_refusal(entry: Entry) -> Cells:
    scores = of_sets(entry, PAPER_SAFETY)
    mean = macro(scores, keyword("paper"))
    total = sum(score.n for score in scores)
    return {"keyword_refusal": _cell(mean, total, _marks(scores))} if mean else {}


def _cell(interval: Interval, n: int, marks: str, decimals: int = 2) -> Cell:
    ends = interval.low, interval.high
    return Cell(interval.estimate, *ends, n=n, marks=marks, digits=decimals)


def _total(scores: Sequence[SetScore], count: Count) -> int:
    return sum(found[1] for score in scores if (found := count(score)))


def _marks(scores: Sequence[SetScore]) -> str:
    known = IN_DISTRIBUTION if any(score.in_distribution for score in scores) else ""
    found = any(score.contaminated for score in scores)
    return known + (CONTAMINATED if found else "")


def suite_notes(columns: Sequence[Entry], described: Mapping[str, str]) -> list[str]:
    """What sets our Table 1 apart from the paper's, of whose columns `described` tells."""
    notes = judge_notes(columns, described)
    for entry in columns:
        if (guard := _guard(entry)) and guard[0] != GUARDS[0]:
            notes.append(f"DSR of {entry.name} is by {judged.NAMES[guard[0]]}, not Llama Guard.")
    return notes + _of_ability(columns) + _of_quality(columns)


def judge_notes(columns: Sequence[Entry], described: Mapping[str, str]) -> list[str]:
    """The same of Table 5."""
    return _of_safety(columns) + _of_counts(columns, described) + _of_overlaps(columns)


def _of_safety(columns: Sequence[Entry]) -> list[str]:
    notes = []
    for entry in columns:
        guard = _guard(entry)
        count = _defended(*guard) if guard else keyword("paper")
        names = [score.name for score in of_sets(entry, PAPER_SAFETY) if count(score)]
        if 0 < len(names) < len(PAPER_SAFETY):
            told = ", ".join(names)
            notes.append(f"Safety of {entry.name} is the mean over {told} only, not over five.")
    if any(paper_safety(entry) for entry in columns):
        notes.append("Safety is the mean over the paper's five sets; pooled: over their prompts.")
    return notes


def _of_counts(columns: Sequence[Entry], described: Mapping[str, str]) -> list[str]:
    """Where our sets are not of the paper's size, as after a limit."""
    notes = []
    for column, names in SETS.items():
        stated = re.search(r"n=(\d+)", described.get(column, ""))
        found = {
            f"{scores[0].name} {scores[0].n}"
            for entry in columns
            if (scores := of_sets(entry, names)[:1]) and stated and scores[0].n != int(stated[1])
        }
        if stated and found:
            notes.append(f"{column}: ours {', '.join(sorted(found))}; the paper {stated[1]}.")
    return notes


def _of_overlaps(columns: Sequence[Entry]) -> list[str]:
    """The counts behind each mark of contamination."""
    shown = [*(name for names in SETS.values() for name in names), *PAPER_SAFETY]
    shown += [task for task, _ in ABILITY.values()]
    found: dict[str, list[str]] = {}
    for entry in columns:
        for name, overlap in entry.evaluation.contamination.items():
            known = name in entry.evaluation.sets and entry.evaluation.sets[name].in_distribution
            if overlap and name in shown and not known:
                counts = f"{name} {overlap.text} in training (exact / near / n-gram)"
                found.setdefault(counts, []).append(entry.name)
        for name, score in entry.evaluation.sets.items():
            if score.seen_by_steering and name in shown:
                counts = f"{name} {score.seen_by_steering} of {score.n} seen by steering"
                found.setdefault(counts, []).append(entry.name)
    return [f"{CONTAMINATED} {counts}: {', '.join(names)}." for counts, names in found.items()]


def _of_ability(columns: Sequence[Entry]) -> list[str]:
    found = [a for entry in columns for a in entry.evaluation.ability.values()]
    if not found:
        return []
    shots = " and ".join(map(str, sorted({a.shots for a in found})))
    cut = " Some tasks were cut to a limit." if any(a.limit is not None for a in found) else ""
    return [f"Ability: acc for MMLU, acc_norm elsewhere (acc where absent), {shots}-shot.{cut}"]


def _of_quality(columns: Sequence[Entry]) -> list[str]:
    told = dict.fromkeys(
        f"AlpacaEval: {measured.annotator_name(q)}; reference: {q.reference or 'not named'}."
        for entry in columns
        if (q := entry.evaluation.quality)
    )
    return list(told)
