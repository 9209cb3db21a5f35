"""Verdicts on answers and what is counted from them."""

import functools
import itertools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcr import benchmarks, config, contamination, judges, steering, storage, subjects
from dcr.benchmarks import Benchmark, quality
from dcr.config import EvalConfig, Judge, SteeringConfig, UserError
from dcr.generation import Completion
from dcr.judges import Verdict
from dcr.models import Policy
from dcr.runs import Run
from dcr.subjects import Subject
from dcr.tasks import records

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


class Unanswered(UserError):
    """Not one prompt brought an answer."""

    exit_code = 1


def check_answered(asked: list[Benchmark], given: Answers) -> None:
    """Say which sets lack answers, as where a server failed; Unanswered where all of them do."""
    lacking = {b.name: (len(b.rows) - len(given[b.name]), len(b.rows)) for b in asked}
    missing, total = (sum(counts[i] for counts in lacking.values()) for i in (0, 1))
    if total and missing == total:
        raise Unanswered(
            f"none of {total} prompts was answered, so there is nothing to count; see to the "
            "reason above, and give the same command again"
        )
    for name, (without, of) in lacking.items():
        if without:
            log.warning("%s: %d of %d prompts without an answer", name, without, of)


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
    if steering.acts(settings.steering):
        for set_name, seen in _seen_by_steering(settings, sets).items():
            metrics["sets"][set_name]["seen_by_steering"] = seen
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


def _seen_by_steering(settings: EvalConfig, sets: list[Benchmark]) -> dict[str, int]:
    """How many prompts of each set vectors were computed from: of the released prompts alone."""
    if not settings.steering.released_data:
        return {b.name: 0 for b in sets}
    used = steering.extraction(settings.data, settings.steering, settings.seed).parts()
    known = {"steering": [row.prompt for rows in used.values() for row in rows]}
    near = settings.data.near_duplicate
    return {
        b.name: sum(
            overlap is not None
            for overlap in contamination.overlaps([r.prompt for r in b.rows], known, near=near)
        )
        for b in sets
    }


def win_rate(
    settings: EvalConfig, run: Run, asked: list[Benchmark], given: Answers, folder: Path
) -> dict[str, Any]:
    """Against the plain answers of the reference run, which are written there if missing.

    Plain: without the edits and the decoding that the subject is evaluated under.
    """
    name = benchmarks.set_name(settings.quality.source)
    reference = Run(Path(str(settings.quality.reference)))
    beside = replace(
        settings,
        model=config.model_of(reference.config()),
        run=str(reference.folder),
        steering=SteeringConfig(),
        gen=replace(settings.gen, self_cd=None),
    )
    subject = subjects.final(reference)
    place = subjects.answers_folder(beside, reference, subject)
    if place.resolve() == folder.resolve():
        others = given
    else:
        policy = functools.cache(functools.partial(subjects.opened, beside, subject))
        rows = [b for b in asked if b.name == name]
        mine = reference.folder.resolve() == run.folder.resolve()  # locked already
        with nullcontext() if mine else storage.locked(reference.folder):
            others = answers(beside, subject, rows, place, policy)
    labels = (_label(run), _label(reference))
    return quality.quality(
        given[name], others[name], settings, folder, labels, settings.trainer.progress
    )


def _contamination(run: Run, sets: list[Benchmark]) -> dict[str, Any]:
    """How many prompts of each set stand in what the run was trained on, exactly or nearly."""
    trained = records.trained_texts(run)
    if not trained:
        return {}
    asked = {b.name: [row.prompt for row in b.rows] for b in sets}
    return contamination.report(trained, asked, near=run.config()["data"]["near_duplicate"])


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
