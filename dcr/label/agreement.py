"""Agreement of annotators with each other, and with every judge whose verdicts a run holds."""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd

from dcr import inference, keywords, outcomes
from dcr.core import storage
from dcr.core.statistics import Interval
from dcr.ending import printable
from dcr.judges.verdicts import Verdict, answer_fingerprint, by_keywords
from dcr.label import LABELS, sheets
from dcr.report.columns import Column
from dcr.report.grids import OUTCOME
from dcr.report.sections import Selection
from dcr.report.writing import ABSENT, TextTable

HEADS = ("annotator", "with", "answers", "agree", "κ, answered or not", "κ, all labels")
ANSWERED = ("answered", "complied", "unsafe")  # what judges of each kind call an answer
SHARED = {"refused", "empty"}  # labels that judges of fewer outcomes give too
SEED = 0  # of the bootstrap

Said = Mapping[str, str]  # by an answer's id, the label or verdict that one rater gives


@dataclass(frozen=True)
class Agreement:
    """An annotator with another or with a judge, on the answers that both have judged."""

    first: str
    second: str
    n: int
    same: float  # the share on which they agree whether it is answered
    answered: Interval  # Cohen's kappa of answered against the rest
    classes: Interval | None  # of all labels; None for a judge that gives others


def judged(
    columns: Sequence[Column], labelled: Collection[str]
) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The verdicts of every judge on the labelled answers, and the prompt of each, both by id.

    Judges are the keyword rules and the outcomes as they are now, and others whose verdicts are
    stored; one asked in several ways has its folder's name. DataError for a damaged file.
    """
    by_folder: defaultdict[str, dict[str, str]] = defaultdict(dict)
    prompts: dict[str, str] = {}
    for column in columns:
        for name in column.evaluation.sets:
            every = column.evaluation.answers(name)
            rows = [row for row in every if answer_fingerprint(row) in labelled]
            prompts |= {answer_fingerprint(row): row.prompt for row in rows}
            said = by_folder[OUTCOME]
            for row in rows:
                found = outcomes.outcome(row.prompt, row.response, row.ended)
                said[answer_fingerprint(row)] = found.value
            for rules, outcome in keywords.RULES.items():
                by_folder[f"keyword:{rules}"].update(_said(by_keywords(rows, outcome)))
            for file in sorted(column.evaluation.folder.glob(f"verdicts/*/{name}.jsonl")):
                if (folder := file.parent.name).rpartition("-")[0] != OUTCOME:
                    by_folder[folder].update(_said(storage.read_lines(file, Verdict)))
    judges = {folder: folder.rpartition("-")[0] or folder for folder in by_folder}
    times = Counter(judges.values())
    named = {f: judge if times[judge] == 1 else f for f, judge in judges.items()}
    return {named[folder]: said for folder, said in by_folder.items()}, prompts


def _said(verdicts: Sequence[Verdict]) -> Iterator[tuple[str, str]]:
    for verdict in verdicts:
        word = verdict.raw if verdict.raw in LABELS else verdict.compliance or verdict.safety
        if verdict.status == "ok" and word:
            yield verdict.of, word


def agreements(
    people: Mapping[str, Said], judges: Mapping[str, Said], prompts: Mapping[str, str]
) -> list[Agreement]:
    """Every two annotators, then every judge with every annotator, where both said something.

    Answers to one prompt are drawn together for the intervals, since they are alike.
    """
    pairs = [
        *combinations(people.items(), 2),
        *((person, judge) for judge in judges.items() for person in people.items()),
    ]
    found = []
    for (first, one), (second, other) in pairs:
        both = [each for each in one if each in other]
        if not both:
            continue
        groups = [prompts.get(each, each) for each in both]
        a, b = ([said[each] for each in both] for said in (one, other))
        yes, also = ([word in ANSWERED for word in said] for said in (a, b))
        labels, same = set(other.values()), float(np.mean(np.equal(yes, also)))
        alike = labels <= LABELS.keys() and not labels <= SHARED
        answered = inference.kappa(yes, also, groups, seed=SEED)
        classes = inference.kappa(a, b, groups, seed=SEED) if alike else None
        found.append(Agreement(first, second, len(both), same, answered, classes))
    return found


def section(chosen: Selection) -> TextTable | None:
    """Labels by people.

    Cohen's κ with 95% bootstrap intervals over prompts. Answered, complied and unsafe count as
    answered, every other label and verdict, partial ones too, as not. All labels are compared with
    a judge that gives them. A sheet is drawn evenly over kinds of prompts, sets and columns, so κ
    is that of such a mixture.
    """
    people = sheets.labels_of(run.folder for run in chosen.records)
    if not people:
        return None
    labelled = {identity for labels in people.values() for identity in labels}
    judges, prompts = judged(chosen.columns, labelled)
    rows, notes = [], []
    for each in agreements(people, judges, prompts):
        raters, kappas = (each.first, each.second), (each.answered, each.classes)
        rows.append((*map(printable, raters), each.n, f"{each.same:.0%}", *map(_text, kappas)))
    for name, labels in people.items():
        times = Counter(labels.values())
        told = ", ".join(f"{times[label]} {label}" for label in LABELS if times[label])
        notes.append(f"{printable(name)}: {len(labels)} answers, {told}")
    return TextTable("", pd.DataFrame(rows, columns=list(HEADS)), notes)


def _text(kappa: Interval | None) -> str:
    if kappa is None or math.isnan(kappa.estimate):
        return ABSENT
    return f"{kappa.estimate:.2f} [{kappa.low:.2f}–{kappa.high:.2f}]"
