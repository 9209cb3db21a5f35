"""Evaluates what settings name: completions, verdicts, `metrics.json`; `dcr.commands` calls it.

What answers and counts is imported in functions: a user's error does not wait for torch.
"""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from dcr.core import config, extending, machine, runs, storage
from dcr.core.config import ConfigError, DataError, Kind, Method, Precision
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import DISCERNMENT, TASKS, PromptSet, of_tasks, protocols
from dcr.core.evaluation.protocols import VERSION, Answers, MetricsFile, Subject, Task, Work
from dcr.core.runs import Run

Settings = TypeVar("Settings", bound=EvalConfig)

log = logging.getLogger(__name__)

LAST = ("decoding", "seconds", "peak_memory_gib")  # of the command rather than of the answers
OWN = "own"  # what a user's own tasks measured


def evaluate(settings: EvalConfig, run: Run) -> None:
    """Answer what is unanswered, judge what is unjudged, count, and write `metrics.json`."""
    extending.part("check_extras")(settings)
    settings, arithmetic = settle_precision(settings, run.precisions() if settings.run else {})
    if settings.endpoint is None:
        arithmetic.say()
    found = checked(settings, run)
    asked = read(settings)
    found[0].check_prompts([*asked.sets, *asked.ranked])  # snapshots share one chat template
    place = run.folder / "eval"
    if place.exists() and not place.is_dir():
        raise DataError(f"{place}: a file or a device, not a folder; move it away")
    machine.use_threads(settings.trainer.threads)
    showing = extending.ours(settings.table.showing)
    with (
        storage.locked(run.folder),
        nullcontext() if settings.run else _claimed(settings, run),
        showing(settings, run) if showing else nullcontext() as show,
    ):
        for subject in found:
            measured, answers = measure(settings, run, subject, asked)
            if show:
                show(measured, answers)


@contextmanager
def _claimed(settings: EvalConfig, run: Run) -> Iterator[None]:
    """The folder of a model or an endpoint, with a `config.yaml` of what is evaluated.

    Where a command ends before it has kept anything, the folder is as it was before.
    """
    if run.config_file.exists() and run.config()["method"] in Method.__members__:
        raise ConfigError(
            f"output={run.folder}: is the folder of a trained run; evaluate it with run=, "
            "or name another"
        )
    method = "endpoint" if settings.endpoint else "base"
    made: dict[str, Any] = {"method": method, "seed": settings.seed, "preset_name": "-"}
    if settings.endpoint is None:
        made["precision"] = settings.precision.value
    made |= {"model": config.plain(settings.model), "data": config.plain(settings.data)}
    before = run.config_file.read_bytes() if run.config_file.is_file() else None
    kept = _kept(run)
    try:
        runs.write_config(run, made)
        yield
    except BaseException:
        if _kept(run) == kept:
            if before is None:
                run.config_file.unlink(missing_ok=True)
            else:
                storage.write_bytes(run.config_file, before)
        raise


def _kept(run: Run) -> set[Path]:
    """Answers, verdicts and vectors: what a later command need not make again."""
    return {file for name in ("eval", "steering") for file in (run.folder / name).rglob("*.*")}


# --- what is asked, and of whom -------------------------------------------------------------------


def settle_precision(
    settings: Settings, recorded: Mapping[str, Precision] | None = None
) -> tuple[Settings, machine.Settled]:
    """The settings with the precision that `auto` means for a model here and for guards."""
    accelerator, use = settings.trainer.accelerator, "evaluation"
    found = machine.settled({use: settings.precision}, accelerator, recorded)
    changed: dict[str, Any] = {}
    for name, node in vars(settings).items():
        if hasattr(node, "precision"):
            own = machine.settled({use: node.precision}, accelerator)
            changed[name] = replace(node, precision=own.precisions[use])
    if settings.endpoint is None:
        changed["precision"] = found.precisions[use]
    return replace(settings, **changed), found


def checked(settings: EvalConfig, run: Run) -> Sequence[Subject]:
    """Everything that is evaluated.

    Raises a UserError for all that can be known wrong before a model is loaded, but of its prompts.
    """
    from dcr.core.evaluation import scoring, subjects

    found = subjects.subjects(settings, run)
    extending.part("check_devices")(settings.trainer.accelerator, settings.trainer.devices)
    if others := scoring.others(settings):
        extending.ours(settings.table.judging)().check(others, settings)
    for subject in found:
        subject.check()
    for part in (*protocols.changes(settings), *protocols.tasks(settings).values()):
        part.check(settings, run)
    return found


@dataclass(frozen=True)
class Asked:
    """The tasks besides over-refusal and safety, the sets that a model answers, and those whose
    refusal mass alone is read.
    """

    tasks: Mapping[str, Task]
    sets: list[PromptSet]
    ranked: list[PromptSet]


def read(settings: EvalConfig) -> Asked:
    """Reads the prompts that the tasks need.

    Raises UserError for a fault of the data, and where all tasks need prompts and there are none.
    """
    tasks = protocols.tasks(settings)
    answered = [name for name in dict.fromkeys(settings.tasks) if name in TASKS]
    asked = _asked(settings, answered) if answered else []
    for task in tasks.values():
        asked = [*asked, *task.prompts(settings)]
    ranked = _asked(settings, list(TASKS)) if DISCERNMENT in settings.tasks else []
    if not (tasks or asked or ranked):
        both = DISCERNMENT in settings.tasks
        empty = [f"data.evaluation.{t}=[]" for t in TASKS if both or t in settings.tasks]
        raise ConfigError(
            f"tasks=[{','.join(settings.tasks)}] {' '.join(empty)}: no prompts to ask; name "
            "sources of them, or other tasks"
        )
    return Asked(tasks, asked, ranked)


def _asked(settings: EvalConfig, tasks: list[str]) -> list[PromptSet]:
    for change in protocols.changes(settings):
        if (others := change.prompts(settings)) is not None:
            return others
    return of_tasks(tasks, settings.data, settings.limit, settings.seed)


# --- one subject ----------------------------------------------------------------------------------


def measure(
    settings: EvalConfig, run: Run, subject: Subject, asked: Asked
) -> tuple[dict[str, Any], Answers]:
    """Measures one subject; returns its `metrics.json` and its answers to the sets of prompts.

    The file is written after each task: a fault in a later one costs no earlier one.
    """
    from dcr.core.evaluation import scoring

    began = time.perf_counter()
    blocks: dict[str, Any] = {}
    with subject:
        for change in protocols.changes(settings):
            blocks |= change.prepared(subject)
        folder = subject.folder
        written = extending.ours(settings.table.metrics) or MetricsFile
        file: MetricsFile = written(subject, folder, _origin(subject))
        if DISCERNMENT in settings.tasks:  # first: an endpoint may not be able to
            trained_on = run.record().get("in_distribution", [])
            masses, most = subject.masses(asked.ranked, folder)
            blocks[DISCERNMENT] = scoring.discernment(
                asked.ranked, masses, trained_on, settings.seed, most
            )
            _write(subject, file, blocks, began)
        given = subject.answers(asked.sets, folder)
        if settings.endpoint is not None:  # a server may leave prompts without an answer
            extending.part("check_answered")(asked.sets, given)
        work = Work(settings, run, subject, folder, asked.sets, given, file.kept())
        for name, task in asked.tasks.items():
            if not task.closed:
                _measure(name, task, work, blocks)
                _write(subject, file, blocks, began)
    for name, task in asked.tasks.items():
        if task.closed:
            _measure(name, task, work, blocks)
    judged = [b for b in asked.sets if b.kind is not Kind.normal]
    if judged:
        counted = scoring.scores(settings, run, judged, given, folder)
        for change in protocols.changes(settings):
            counted |= change.measured(subject, {b.name: given[b.name] for b in judged}, folder)
        blocks = file.joined(counted) | blocks
    metrics, warning = _write(subject, file, blocks, began)
    print(f"{subject.weights}: {folder}")
    if warning:
        log.warning("%s: %s", folder, warning)
    return metrics, given


def _measure(name: str, task: Task, work: Work, blocks: dict[str, Any]) -> None:
    """Adds the block of a task; those of a user's own tasks share one, with what made each."""
    if name in work.settings.table.tasks:
        blocks[name] = task.measure(work)
    else:
        own = extending.origin(task) | {"measured": task.measure(work)}
        blocks.setdefault(OWN, {})[name] = own


def _write(
    subject: Subject, file: MetricsFile, blocks: Mapping[str, Any], began: float
) -> tuple[dict[str, Any], str]:
    """Writes `metrics.json`, and returns its content and a warning or nothing."""
    metrics, folder = file.merged(blocks), file.folder
    for change in protocols.changes(subject.settings):
        metrics |= change.noted(subject, folder)
    metrics |= extending.part("made_with")(folder)
    metrics["seconds"] = round(time.perf_counter() - began, 1)
    metrics["peak_memory_gib"] = round(machine.peak_memory_gib(), 2)
    return metrics, file.write(metrics)


def _origin(subject: Subject) -> dict[str, Any]:
    settings, made_with = subject.settings, subject.run.config()
    changed = {
        key: value
        for change in protocols.changes(settings)
        for key, value in change.recorded(settings).items()
    }
    return {
        "version": VERSION,
        "weights": subject.weights,
        "step": subject.step,
        "method": made_with["method"],
        "model": made_with["model"]["label"],
        "preset": made_with["preset_name"],
        "seed": made_with["seed"],
        "data": settings.data.label,
        "settings": {
            "max_new_tokens": settings.gen.max_new_tokens,
            "limit": settings.limit,
            "seed": settings.seed,
            "precision": settings.precision.value,
            **changed,
        },
    }
