"""Activation edits that over-refusal and safety are traded with: their settings, and their checks.

`methods` makes edits of the settings, `edits` applies them, `prompts` draws the prompts that
vectors are computed from, `scans`, `surgical` and `probe` compute the vectors and the edits, and
`vectors` has the code that they share. Nothing here loads torch, so that help and a user's error
come at once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import II

from dcr.calibration import CalibrationConfig
from dcr.core.config import Kind
from dcr.core.config.evaluation import EvalConfig
from dcr.resolving import positive, ranged, unknown

METHODS = ("none", "scans", "surgical", "ablation", "probe")
OF_EACH_KIND = "give prompts of each kind, 1 or more"
DIVERGENCE = "give a divergence above 0"


class ScansLayers(Enum):
    absolute = "absolute"  # blocks 11 to 20, as released for models of 32
    middle_third = "middle_third"


class ScansEnd(Enum):
    """The end of the instruction part of a SCANS query."""

    user_end = "user_end"
    prompt_last = "prompt_last"


@dataclass
class ScansConfig:
    """SCANS (Cao et al. 2025), as released."""

    anchors: int = ranged(64, positive, OF_EACH_KIND)  # prompts of each kind
    layers: ScansLayers = ScansLayers.absolute  # which blocks are edited
    s1: ScansEnd = ScansEnd.user_end  # where the compared instruction ends
    # null: calibrated on anchors held out of extraction
    threshold: float | None = ranged(
        0.75, lambda v: -1 <= v <= 1, "give a cosine in [-1, 1], or null to calibrate it"
    )


@dataclass
class SurgicalConfig:
    """Surgical (Wang et al. 2025); candidates for addition are compared at a coefficient of 1."""

    # prompts of each kind that vectors are computed from
    train: int = ranged(128, positive, OF_EACH_KIND)
    # prompts of each kind that candidates are selected on
    validation: int = ranged(32, positive, OF_EACH_KIND)
    add: float = II("model.surgical_add")  # of the toxic direction
    ablate: float = II("model.surgical_ablate")  # of the false-refusal direction
    # the most that ablating a candidate may change ordinary answers
    ablation_kl: float = ranged(0.2, positive, DIVERGENCE)
    addition_kl: float = ranged(2.0, positive, DIVERGENCE)  # the same for adding it
    # First tokens of refusals, by whose probability candidates are chosen.
    refusal_tokens: list[str] = II("model.refusal_tokens")


@dataclass
class ProbeConfig:
    """Probe-gated refusal: a linear probe of the prompt decides how the answer opens."""

    layer: int | None = None  # the block that is read; null: 0.6 of the depth
    # prompts of each kind that the probe is fitted to
    train: int = ranged(64, positive, OF_EACH_KIND)


@dataclass
class SteeringConfig:
    """Activation edits in evaluation. Strength is α for SCANS; it multiplies Surgical's pair; for
    the probe it is what each log-odds of the probe adds to the log-odds of refusing."""

    method: str = "none"  # none, scans, surgical, ablation, probe, or package.module:Class
    # 0 leaves the model as it is
    strength: float = ranged(
        1.0, math.isfinite, "give a finite number; 0 leaves the model as it is"
    )
    # Take the prompts of the released code, which hold evaluation prompts.
    released_data: bool = False
    # Ask the prompts of `calibration` instead of the evaluation sets, to choose a strength.
    validation: bool = False
    scans: ScansConfig = field(default_factory=ScansConfig)
    surgical: SurgicalConfig = field(default_factory=SurgicalConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)


def relations(settings: EvalConfig) -> Iterator[str]:
    """The contradictions of steering with other settings, and within it."""
    steering = settings.node(SteeringConfig)
    named = f"steering={steering.method}"
    yield from unknown("steering.method", steering.method, METHODS)
    if steering.method != "none":
        if settings.endpoint is not None:
            yield (
                f"{named}: an endpoint's activations cannot be edited; leave it out, or name the "
                "model with model="
            )
        for name, value in settings.gen.contrast.items():
            yield f"gen.{name}={value} {named}: two methods at once; give one"
        if settings.gen.thinking is not None:
            yield (
                f"gen.thinking={settings.gen.thinking} {named}: an edit is made for prompts "
                "without thoughts; give one"
            )
    if steering.method == "probe" and steering.released_data:
        yield (
            "steering=probe steering.released_data=true: no prompts were released for it; leave "
            "steering.released_data out"
        )
    if not steering.validation:
        return
    if "quality" in settings.tasks:
        yield (
            "steering.validation=true tasks=[quality]: asks other prompts than quality "
            "compares; leave one of the two out"
        )
    calibration = settings.node(CalibrationConfig)
    for kind in (Kind.toxic.value, Kind.seemingly_toxic.value):
        extracted = getattr(settings.data.extraction, kind)
        for name in sorted(set(getattr(calibration, kind)) & set(extracted)):
            yield (
                f"steering.validation=true calibration.{kind}: {name} is extracted from as "
                "well, and a strength chosen there flatters; name another source"
            )
