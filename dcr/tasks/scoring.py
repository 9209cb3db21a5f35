"""Verdicts on answers and what is counted from them."""

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcr import benchmarks, config, contamination, data, judges, storage, subjects
from dcr.benchmarks import Benchmark, quality
from dcr.config import DataError, EvalConfig, Judge
from dcr.generation import Completion
from dcr.judges import Verdict
from dcr.models import Policy
from dcr.runs import Run
from dcr.subjects import Subject

log = logging.getLogger(__name__)

Answers = dict[str, list[Completion]]
Verdicts = dict[Judge, dict[str, list[Verdict]]]


def answers(
    settings: EvalConfig,
    subject: Subject,
    asked: list[Benchmark],
    folder: Path,
    policy: Callable[[], Policy],
) -> Answers:
    """The subject's completions of every set, kept in `folder`; only what is missing is asked."""
    ask = functools.partial(subjects.answer, settings, subject, policy)
    return benchmarks.complete(asked, ask, folder, settings.trainer.progress)


def scores(
    settings: EvalConfig, run: Run, sets: list[Benchmark], given: Answers, folder: Path
) -> dict[str, Any]:
    """Counts by keywords and by every judge asked, agreement, discernment, contamination."""
    verdicts = {
        name: judges.judge(
            name,
            settings,
            {b.name: given[b.name] for b in sets if b.kind in judges.KINDS[name]},
            folder,
            settings.trainer.progress,
        )
        for name in settings.judge
        if name is not Judge.keyword
    }
    record = run.record()
    metrics = benchmarks.score(
        sets,
        given,
        record.get("in_distribution", []),
        record.get("unseen_groups", []),
        settings.seed,
    )
    for name, by_set in verdicts.items():
        for set_name, rows in by_set.items():
            counted = judges.counts(rows, judges.model_of(name, settings), name)
            metrics["sets"][set_name].setdefault("judged", {})[name.value] = counted
    return metrics | {
        "agreement": _agreement(sets, given, verdicts),
        "usage": {
            name.value: judges.usage(
                itertools.chain(*by_set.values()), judges.server_of(name, settings)
            )
            for name, by_set in verdicts.items()
        },
        "contamination": _contamination(run, sets),
    }


def win_rate(
    settings: EvalConfig, run: Run, asked: list[Benchmark], given: Answers, folder: Path
) -> dict[str, Any]:
    """Against the answers of the reference run, which are written there if missing."""
    name = benchmarks.set_name(settings.quality.source)
    reference = Run(Path(str(settings.quality.reference)))
    beside = replace(settings, model=config.model_of(reference.config()), run=str(reference.folder))
    subject = subjects.final(reference)
    if subjects.answers_folder(beside, reference, subject).resolve() == folder.resolve():
        others = given
    else:
        policy = functools.cache(functools.partial(subjects.opened, beside, subject))
        rows = [b for b in asked if b.name == name]
        with storage.locked(reference.folder):
            place = subjects.answers_folder(beside, reference, subject)
            others = answers(beside, subject, rows, place, policy)
    labels = (_label(run), _label(reference))
    return quality.quality(
        given[name], others[name], settings, folder, labels, settings.trainer.progress
    )


def _contamination(run: Run, sets: list[Benchmark]) -> dict[str, Any]:
    """How many prompts of each set stand in what the run was trained on, exactly or nearly."""
    record, made_with = run.record(), run.config()
    try:
        trained = data.trained_texts(made_with["data"], record)
    except DataError as error:
        log.warning("contamination not checked: %s", error)
        return {}
    if not trained:
        return {}
    asked = {b.name: [row.prompt for row in b.rows] for b in sets}
    return contamination.report(trained, asked, near=made_with["data"]["near_duplicate"])


def _label(run: Run) -> str:
    made_with = run.config()
    return f"{made_with['model']['label']}-{made_with['method']}-seed{made_with['seed']}"


def _agreement(sets: list[Benchmark], given: Answers, verdicts: Verdicts) -> list[dict[str, Any]]:
    by_keywords = {
        f"keyword:{rules}": {b.name: judges.by_keywords(given[b.name], rules) for b in sets}
        for rules in benchmarks.RULES
    }
    asked = {name.value: by_set for name, by_set in verdicts.items()}
    return judges.agreements({b.name: b.kind for b in sets}, by_keywords | asked)
