"""All that is measured of one subject, and what `metrics.json` keeps of it."""

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from dcr import ability, calibration, endpoints, judges, quality, steering
from dcr.analyses.weights import MEASURED, TRUNK, Work
from dcr.core import batching, config, models, results, runs, storage
from dcr.core.config import ConfigError, EvalConfig, Kind, Steering, Task
from dcr.core.evaluation import discernment, scoring, subjects
from dcr.core.evaluation.sets import Prompts
from dcr.core.evaluation.subjects import Answers, Subject
from dcr.core.runs import Run
from dcr.workers import Workers

log = logging.getLogger(__name__)

# What the prompts of over-refusal and safety are counted and ranked into.
SCORES = ("sets", "discernment", "agreement", "usage", "contamination")
# What does not depend on which prompts another command asks.
ALONE = (
    Task.ability,
    Task.refusal_probability,
    Task.kernel,
    Task.separability,
    Task.claims,
    Task.quality,
)


def check(settings: EvalConfig, run: Run) -> None:
    """Raises a UserError for all that can be known wrong before a model is loaded."""
    batching.check_devices(settings.trainer.accelerator, settings.trainer.devices)
    judges.check(settings.judge, settings)
    if settings.endpoint is not None:
        endpoints.check(subjects.server_of(settings), "endpoint")
    if settings.calibrate is not None:
        calibration.check(settings, run.config() if settings.run else {"method": "base"})
    if settings.steering.method is Steering.probe:
        steering.probe.block_of(models.facts(settings.model).depth, settings.steering.probe)
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
    blocks: dict[str, Any] = {}
    with ExitStack() as stack:
        policy = subjects.opener(settings, run, subject, stack, folder)
        if settings.calibrate is not None:
            edits = folder / "steering.json"
            subject, record = calibration.calibrated(settings, subject, policy, folder)
            blocks["calibration"] = record
            folder = subjects.answers_folder(settings, run, subject)
            if edits.is_file():
                storage.write_bytes(folder / edits.name, edits.read_bytes())
        among = None
        if settings.trainer.devices > 1:
            among = stack.enter_context(Workers(settings, run, subject, folder))
        if Task.discernment in settings.tasks:  # first: an endpoint may not be able to
            trained_on = run.record().get("in_distribution", [])
            blocks["discernment"] = discernment.measured(
                settings, policy, prompts.ranked, trained_on, folder, among
            )
            _write(settings, run, subject, folder, blocks, began)
        given = subjects.answers(settings, subject, prompts.sets, folder, policy, among)
        subjects.check_answered(prompts.sets, given)
        before = _kept(folder, {})
        work = Work(settings, run, policy, folder, prompts.kinds, prompts.refused, before, among)
        for task, measured in MEASURED.items():
            if task in settings.tasks:
                blocks[task.value] = measured(work)
                _write(settings, run, subject, folder, blocks, began)
        policy.cache_clear()  # before a guard of eight billion parameters needs the room
    if Task.quality in settings.tasks:
        blocks["quality"] = quality.win_rate(settings, run, prompts.sets, given, folder)
    judged = [b for b in prompts.sets if b.kind is not Kind.normal]
    if judged:
        counted = scoring.scores(settings, run, judged, given, folder)
        if counted["discernment"] is None:  # of one kind alone: an earlier command's stays
            del counted["discernment"]
        blocks = counted | blocks
    metrics = _write(settings, run, subject, folder, blocks, began)
    print(f"{subject.weights}: {folder}")
    if silence := results.Metrics.model_validate(metrics).silence:
        log.warning("%s: %s", folder, silence)
    return metrics, given


def _write(
    settings: EvalConfig,
    run: Run,
    subject: Subject,
    folder: Path,
    blocks: Mapping[str, Any],
    began: float,
) -> dict[str, Any]:
    """`metrics.json`, of what was measured so far and of what earlier commands measured."""
    origin = _origin(settings, run, subject)
    metrics = origin | _kept(folder, origin["settings"]) | dict(blocks)
    if (edits := folder / "steering.json").is_file():
        metrics["steering"] = storage.read_json(edits, dict[str, Any])
    if (made := folder / subjects.DECODING).is_file():
        metrics["decoding"] = storage.read_json(made, subjects.Made)
    metrics["seconds"] = round(time.perf_counter() - began, 1)
    metrics["peak_memory_gib"] = round(runs.peak_memory_gib(), 2)
    _set_aside(folder, origin["settings"])
    results.write(folder / "metrics.json", metrics)
    return metrics


# --- what stays of earlier commands ---------------------------------------------------------------


def _origin(settings: EvalConfig, run: Run, subject: Subject) -> dict[str, Any]:
    made_with = run.config()
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
            **_decoded_otherwise(settings),
        },
    }


def _decoded_otherwise(settings: EvalConfig) -> dict[str, Any]:
    """Settings that are told only where they change something, so that old and new records meet."""
    changed: dict[str, Any] = {}
    if steering.acts(settings.steering):
        changed["steering"] = steering.summary(settings.steering)
    if settings.steering.validation:
        changed["validation"] = True
    changed |= settings.gen.contrast
    if settings.gen.prefill is not None:
        changed["prefill"] = settings.gen.prefill
    if settings.calibrate is not None:
        changed["calibrate"] = calibration.label(settings)
    return changed


def _set_aside(folder: Path, settings: dict[str, Any]) -> None:
    """Renames metrics of the same answers under other settings, such as another limit."""
    made = _before(folder).get("settings", settings)
    if made != settings:
        aside = folder / f"metrics-{storage.fingerprint(made)}.json"
        (folder / "metrics.json").replace(aside)
        changed = "; ".join(storage.differences(made, settings))
        log.warning("%s: metrics of other settings (%s) are now in %s", folder, changed, aside.name)


def _kept(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command measured of the same answers, and this one did not ask for."""
    before = _before(folder)
    kept = {key: before[key] for key in (*(t.value for t in ALONE), "steering") if key in before}
    if before.get("settings") == settings:
        kept |= {key: before[key] for key in SCORES if key in before}
    return kept


def _before(folder: Path) -> dict[str, Any]:
    """`metrics.json` as it stands there, if it does. DataError where it is damaged."""
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    return results.read(file).model_dump(mode="json", exclude_unset=True)
