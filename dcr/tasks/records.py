"""What `metrics.json` says of its subject, and what of an earlier command's stays in it."""

import json
import logging
from pathlib import Path
from typing import Any

from dcr import data, steering, storage
from dcr.config import DataError, EvalConfig, Task
from dcr.runs import Run
from dcr.subjects import Subject

log = logging.getLogger(__name__)

# What the prompts of over-refusal and safety are counted into.
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


def origin(settings: EvalConfig, run: Run, subject: Subject) -> dict[str, Any]:
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
    told: dict[str, Any] = {}
    if steering.acts(settings.steering):
        told["steering"] = steering.told(settings.steering)
    if settings.steering.validation:
        told["validation"] = True
    if settings.gen.self_cd is not None:
        told["self_cd"] = settings.gen.self_cd
    return told


def trained_texts(run: Run) -> dict[str, list[str]]:
    """All that a run was trained on, by source; empty, with a warning, where a source has changed.

    Empty as well for what was not trained here.
    """
    try:
        return data.trained_texts(run.config()["data"], run.record())
    except DataError as error:
        log.warning("what was trained on is not known: %s", error)
        return {}


def set_aside(folder: Path, settings: dict[str, Any]) -> None:
    """Renames metrics of the same answers under other settings, such as another limit."""
    file = folder / "metrics.json"
    if not file.is_file():
        return
    before = json.loads(file.read_text())["settings"]
    if before != settings:
        aside = folder / f"metrics-{storage.fingerprint(before)}.json"
        file.replace(aside)
        changed = "; ".join(storage.differences(before, settings))
        log.warning("%s: metrics of other settings (%s) are now in %s", folder, changed, aside.name)


def kept(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier command measured of the same answers, and this one did not ask for."""
    file = folder / "metrics.json"
    if not file.is_file():
        return {}
    before = json.loads(file.read_text())
    found = {key: before[key] for key in (*(t.value for t in ALONE), "steering") if key in before}
    if before["settings"] == settings:
        found |= {key: before[key] for key in SCORES if key in before}
    return found
