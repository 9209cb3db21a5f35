"""Measures one subject with every task, and keeps the results in `metrics.json`."""

import json
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from dcr.core import extending, generation, machine, storage
from dcr.core.config import ConfigError, Kind
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import protocols, scoring, sets, subjects
from dcr.core.evaluation.protocols import CURE, VERSION, Answers, Subject, Task, Work
from dcr.core.evaluation.sets import PromptSet
from dcr.core.runs import Run

log = logging.getLogger(__name__)

LAST = ("decoding", "seconds", "peak_memory_gib")  # of the command rather than of the answers
OWN = "own"  # what a user's own tasks measured


def check(settings: EvalConfig, run: Run) -> None:
    """Raises a UserError for all that can be known wrong before a model is loaded."""
    machine.check_devices(settings.trainer.accelerator, settings.trainer.devices)
    if others := scoring.others(settings):
        extending.ours(settings.table.judging)().check(others, settings)
    for subject in subjects.subjects(settings, run):
        subject.check()
    for part in (*protocols.changes(settings), *protocols.tasks(settings).values()):
        part.check(settings, run)


def check_prompts(settings: EvalConfig, run: Run, asked: "Asked") -> None:
    """Raises a UserError for prompts that a model cannot be asked, before it is loaded."""
    first, *_ = subjects.subjects(settings, run)  # snapshots share one chat template
    first.check_prompts([*asked.sets, *asked.ranked])


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
    answered = [name for name in dict.fromkeys(settings.tasks) if name in sets.TASKS]
    asked = _asked(settings, answered) if answered else []
    for task in tasks.values():
        asked = [*asked, *task.prompts(settings)]
    ranked = _asked(settings, list(sets.TASKS)) if sets.DISCERNMENT in settings.tasks else []
    if not (tasks or asked or ranked):
        both = sets.DISCERNMENT in settings.tasks
        empty = [f"data.evaluation.{t}=[]" for t in sets.TASKS if both or t in settings.tasks]
        raise ConfigError(
            f"tasks=[{','.join(settings.tasks)}] {' '.join(empty)}: no prompts to ask; name "
            "sources of them, or other tasks"
        )
    return Asked(tasks, asked, ranked)


def _asked(settings: EvalConfig, tasks: list[str]) -> list[PromptSet]:
    for change in protocols.changes(settings):
        if (others := change.prompts(settings)) is not None:
            return others
    return sets.of_tasks(tasks, settings.data, settings.limit, settings.seed)


def measure(
    settings: EvalConfig, run: Run, subject: Subject, asked: Asked
) -> tuple[dict[str, Any], Answers]:
    """Measures one subject; returns its `metrics.json` and its answers to the sets of prompts.

    The file is written after each task: a fault in a later one costs no earlier one.
    """
    began = time.perf_counter()
    blocks: dict[str, Any] = {}
    with subject:
        for change in protocols.changes(settings):
            blocks |= change.prepared(subject)
        folder = subject.folder
        earlier = _before(subject, folder)  # now, since tasks write this command's data there
        if sets.DISCERNMENT in settings.tasks:  # first: an endpoint may not be able to
            trained_on = run.record().get("in_distribution", [])
            masses, most = subject.masses(asked.ranked, folder)
            blocks[sets.DISCERNMENT] = scoring.discernment(
                asked.ranked, masses, trained_on, settings.seed, most
            )
            _write(subject, folder, blocks, began)
        given = subject.answers(asked.sets, folder)
        sets.check_answered(asked.sets, given)
        before = _kept(subject, folder, _origin(subject))
        work = Work(settings, run, subject, folder, asked.sets, given, before)
        for name, task in asked.tasks.items():
            if not task.closed:
                _measure(name, task, work, blocks)
                _write(subject, folder, blocks, began)
    for name, task in asked.tasks.items():
        if task.closed:
            _measure(name, task, work, blocks)
    judged = [b for b in asked.sets if b.kind is not Kind.normal]
    if judged:
        counted = scoring.scores(settings, run, judged, given, folder)
        for change in protocols.changes(settings):
            counted |= change.measured(subject, {b.name: given[b.name] for b in judged}, folder)
        blocks = _joined(subject, folder, counted, earlier) | blocks
    metrics = _write(subject, folder, blocks, began)
    print(f"{subject.weights}: {folder}")
    if silence := _record(settings).model_validate(metrics).silence:
        log.warning("%s: %s", folder, silence)
    return metrics, given


def _measure(name: str, task: Task, work: Work, blocks: dict[str, Any]) -> None:
    """Adds the block of a task; those of a user's own tasks share one, with what made each."""
    if name in work.settings.table.tasks:
        blocks[name] = task.measure(work)
    else:
        own = extending.origin(task) | {"measured": task.measure(work)}
        blocks.setdefault(OWN, {})[name] = own


class Unchecked(BaseModel):
    """`metrics.json` with any blocks; the table's record checks each."""

    model_config = ConfigDict(extra="allow")

    silence: ClassVar[str] = ""  # a warning where many answers are empty


def _record(settings: EvalConfig) -> Any:
    return extending.ours(settings.table.record) or Unchecked


def _write(
    subject: Subject, folder: Path, blocks: Mapping[str, Any], began: float
) -> dict[str, Any]:
    """`metrics.json`, of what was measured so far and of what earlier commands measured."""
    origin = _origin(subject)
    kept = _kept(subject, folder, origin)
    metrics = {"version": VERSION, **origin}
    told_anew = (*metrics, *LAST)
    metrics |= {key: block for key, block in kept.items() if key not in told_anew} | dict(blocks)
    if own := kept.get(OWN, {}) | blocks.get(OWN, {}):
        metrics[OWN] = own
    for change in protocols.changes(subject.settings):
        metrics |= change.noted(subject, folder)
    if (made := folder / subjects.DECODING).is_file():
        metrics["decoding"] = storage.read_json(made, subjects.Made)
    metrics["seconds"] = round(time.perf_counter() - began, 1)
    metrics["peak_memory_gib"] = round(machine.peak_memory_gib(), 2)
    _set_aside(subject, folder, origin)
    checked = json.dumps(metrics, default=str)
    _record(subject.settings).model_validate_json(checked, strict=True)
    storage.write_json(folder / "metrics.json", metrics)
    return metrics


# --- what stays of earlier commands ---------------------------------------------------------------


def _origin(subject: Subject) -> dict[str, Any]:
    settings, made_with = subject.settings, subject.run.config()
    changed = {
        key: value
        for change in protocols.changes(settings)
        for key, value in change.recorded(settings).items()
    }
    return {
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


def _set_aside(subject: Subject, folder: Path, metrics: dict[str, Any]) -> None:
    """Renames metrics of the same answers on other data or under other settings, as a limit."""
    made, now = _decided_by(_before(subject, folder)), _decided_by(metrics)
    if made and made != now:
        aside = folder / f"metrics-{storage.fingerprint(made)}.json"
        (folder / "metrics.json").replace(aside)
        changed = "; ".join(storage.differences(made, now))
        log.warning("%s: metrics of other settings (%s) are now in %s", folder, changed, aside.name)


def _kept(subject: Subject, folder: Path, metrics: dict[str, Any]) -> dict[str, Any]:
    """The blocks that an earlier command left in `metrics.json` and that hold here.

    Under other settings these are only the blocks of tasks, which have settings of their own; on
    other data there are none.
    """
    before = _before(subject, folder)
    if before.get("data") != metrics["data"]:
        return {}
    of_tasks = {key: before[key] for key in subject.settings.table.tasks if key in before}
    return of_tasks | before if _decided_by(before) == _decided_by(metrics) else of_tasks


def _decided_by(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and the label of the data that decide all counts; empty without metrics."""
    return {"data": metrics.get("data"), **metrics.get("settings", {})} if metrics else {}


def _joined(
    subject: Subject, folder: Path, counted: dict[str, Any], earlier: Mapping[str, Any]
) -> dict[str, Any]:
    """The counts, with an earlier command's of the same data where it asked the other kind alone.

    So over-refusal and safety come to the same in one command and in two. A block has an entry for
    each set, or for whatever else; or it is a list of records of a kind.
    """
    now = _origin(subject)
    same = not earlier or _decided_by(earlier) == _decided_by(now)
    known: dict[str, Any] = earlier.get("sets", {}) if same else {}
    kinds = {of["kind"] for of in counted["sets"].values()}
    again = {name for name, of in known.items() if of["kind"] in kinds}
    if known.keys() - again:
        for key, new in counted.items():
            if isinstance(new, list):
                old = [each for each in earlier.get(key) or [] if each["kind"] not in kinds]
                counted[key] = old + new
            elif isinstance(new, dict):
                kept = {n: of for n, of in (earlier.get(key) or {}).items() if n not in again}
                counted[key] = kept | new
        counted[sets.DISCERNMENT] = _ranked(subject, folder, counted["sets"])
    # with prompts of one kind an earlier command's ranking stays, unless it is of other data
    if counted[sets.DISCERNMENT] is None and same:
        del counted[sets.DISCERNMENT]
    return counted


def _ranked(subject: Subject, folder: Path, counts: Mapping[str, Any]) -> dict[str, Any] | None:
    """Discernment over sets of several commands, by their stored answers."""
    masses: dict[str, dict[str, float]] = {}
    for name, of in counts.items():
        stored = generation.stored(folder / f"{name}.jsonl")
        rows = [stored[i] for i in of.get("ids") or stored if i in stored]
        masses[name] = {row.id: m for row in rows if (m := row.refusal_mass) is not None}
    there = [PromptSet(name, Kind(of["kind"]), []) for name, of in counts.items()]
    trained_on = subject.run.record().get("in_distribution", [])
    return scoring.discernment(there, masses, trained_on, subject.settings.seed)


def _before(subject: Subject, folder: Path) -> dict[str, Any]:
    """`metrics.json` as it stands there, if it does. DataError where it is damaged."""
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    found = storage.read_json(file, _record(subject.settings), CURE)
    return found.model_dump(mode="json", exclude_unset=True)
