"""What tracking kept beside `metrics.csv`: intervals, every prompt's values and whole kernels."""

import json
from dataclasses import dataclass
from pathlib import Path

from dcr.report import blocks, measurements
from dcr.report.measurements import Kernel, Probability
from dcr.runs import Run

STAGES = ("contrastive", "sft")


@dataclass(frozen=True)
class Tracked:
    """What was measured after so many steps of a stage; None for what was not."""

    folder: Path
    stage: str
    step: int
    refusal_probability: Probability | None
    kernel: Kernel | None


def read_tracked(run: Run, notes: list[str]) -> list[Tracked]:
    """By stage and step; a step that was not finished is noted. DataError for a damaged file."""
    found = []
    for stage in STAGES:
        for folder in sorted(run.tracked(stage).glob("step-*/")):
            path = folder / "metrics.json"
            if not path.exists():
                notes.append(f"{folder}: skipped, no metrics.json; measuring did not finish")
                continue
            try:
                found.append(_tracked(path, stage))
            except blocks.UNREADABLE as error:
                raise blocks.damaged(path, error, "delete its folder") from error
    return sorted(found, key=lambda tracked: (STAGES.index(tracked.stage), tracked.step))


def _tracked(path: Path, stage: str) -> Tracked:
    step = int(path.parent.name.removeprefix("step-"))
    raw = json.loads(path.read_text(encoding="utf-8"))
    return Tracked(
        path.parent,
        stage,
        step,
        blocks.only(path, "refusal_probability", raw, measurements.probability),
        blocks.only(path, "kernel", raw, measurements.kernel),
    )
