"""What is measured of one subject: answers, verdicts, ability, quality and the paper's analyses.

`reading` reads all prompts, `scoring` counts answers, `weights` measures the weights themselves,
`records` keeps `metrics.json`.
"""

import functools
import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dcr import activations, config, endpoints, judges, models, runs, steering, storage, subjects
from dcr.benchmarks import ability, quality
from dcr.config import ConfigError, EvalConfig, Kind, Task
from dcr.models import Policy
from dcr.runs import Run
from dcr.subjects import Subject
from dcr.tasks import records, scoring
from dcr.tasks.reading import Prompts, read
from dcr.tasks.scoring import Answers
from dcr.tasks.weights import MEASURED, TRUNK, Work

__all__ = ["Prompts", "check", "measure", "read"]


def check(settings: EvalConfig) -> None:
    """Raises a UserError for all that can be known wrong before a model is loaded."""
    judges.check(settings.judge, settings)
    if settings.endpoint is not None:
        endpoints.check(subjects.server_of(settings), "endpoint")
    if Task.ability in settings.tasks:
        ability.check(settings.ability, settings.data.root)
    if Task.quality in settings.tasks:
        quality.check(settings)
    if {Task.kernel, Task.claims} & set(settings.tasks):
        _check_parameters(settings)


def _check_parameters(settings: EvalConfig) -> None:
    depth = models.facts(settings.model).depth
    if Task.kernel in settings.tasks:
        config.parameters("entk.params", settings.entk.params, depth)
    if Task.claims in settings.tasks:
        layer = settings.claims.layer
        if layer is not None and not 1 <= layer <= depth:
            raise ConfigError(f"claims.layer={layer}: the model has blocks 1 to {depth}")
        named = [f"trunk:{depth}" if p == TRUNK else p for p in settings.claims.params]
        config.parameters("claims.params", named, depth)


def measure(
    settings: EvalConfig, run: Run, subject: Subject, prompts: Prompts
) -> tuple[dict[str, Any], Answers]:
    """What `metrics.json` of one subject now says, and its answers to the sets of prompts.

    It is written after each task: a fault in a later one must not cost the hours of an earlier one.
    """
    folder = subjects.answers_folder(settings, run, subject)
    began = time.perf_counter()
    found: dict[str, Any] = {}
    with ExitStack() as stack:
        policy = _opener(settings, run, subject, stack, folder)
        answers = scoring.answers(settings, subject, prompts.sets, folder, policy)
        scoring.check_answered(prompts.sets, answers)
        work = Work(settings, run, policy, folder, prompts)
        for task, measured in MEASURED.items():
            if task in settings.tasks:
                found[task.value] = measured(work)
                _write(settings, run, subject, folder, found, began)
        policy.cache_clear()  # before a guard of eight billion parameters needs the room
    if Task.quality in settings.tasks:
        found["quality"] = scoring.win_rate(settings, run, prompts.sets, answers, folder)
    judged = [b for b in prompts.sets if b.kind is not Kind.normal]
    if judged:
        found |= scoring.scores(settings, run, judged, answers, folder)
    metrics = _write(settings, run, subject, folder, found, began)
    print(f"{subject.weights}: {folder}")
    return metrics, answers


def _write(
    settings: EvalConfig,
    run: Run,
    subject: Subject,
    folder: Path,
    found: Mapping[str, Any],
    began: float,
) -> dict[str, Any]:
    """`metrics.json`, of what was found so far and of what earlier commands found."""
    origin = records.origin(settings, run, subject)
    metrics = origin | records.kept(folder, origin["settings"]) | dict(found)
    if (edits := folder / "steering.json").is_file():
        metrics["steering"] = json.loads(edits.read_text(encoding="utf-8"))
    metrics["seconds"] = round(time.perf_counter() - began, 1)
    metrics["peak_memory_gib"] = round(runs.peak_memory_gib(), 2)
    records.set_aside(folder, origin["settings"])
    storage.write_json(folder / "metrics.json", metrics)
    return metrics


def _opener(
    settings: EvalConfig, run: Run, subject: Subject, stack: ExitStack, folder: Path
) -> Any:
    """Opens the weights, under the edits asked for, when they are first needed; then remembers."""

    @functools.cache
    def opened() -> Policy:
        policy = subjects.opened(settings, subject)
        if steering.acts(settings.steering):
            steered = subjects.steered(settings, policy, run.folder / "steering")
            stack.enter_context(activations.edited(policy.model, steered.edits))
            # at once: another command will find all answers here and open nothing
            storage.write_json(folder / "steering.json", steered.record)
        return policy

    return opened
