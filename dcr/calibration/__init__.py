"""Calibration: a bias on the first token of refusals, so that a share of toxic prompts is refused.

Its settings and their checks; `biases` finds the bias.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from dcr.core.config.evaluation import EvalConfig
from dcr.resolving import decoding_alone


@dataclass
class CalibrationConfig:
    """Prompts on which `calibrate` chooses a bias, and a user a strength of steering. None of them
    may be evaluated on, trained on or extracted from."""

    toxic: list[str] = field(default_factory=lambda: ["contrasts_toxic_heldout"])
    seemingly_toxic: list[str] = field(
        default_factory=lambda: ["contrasts_seemingly_toxic_heldout"]
    )


def relations(settings: EvalConfig) -> Iterator[str]:
    """The contradictions of `calibrate` with other settings."""
    if settings.calibrate is None:
        return
    named, prompts = f"calibrate={settings.calibrate}", settings.node(CalibrationConfig)
    if settings.endpoint is not None:
        yield (
            f"{named}: an endpoint's logit_bias acts on every token of an answer, not on its first "
            "alone; leave it out, or name the model with model= or run="
        )
    yield from decoding_alone(settings, named, "a bias changes how answers are decoded")
    for name, value in settings.gen.contrast.items():
        yield f"{named} gen.{name}={value}: contrasted logits take no bias; give one"
    if not prompts.toxic:
        yield "calibration.toxic=[]: name prompts to calibrate on"
    evaluated = {*settings.data.evaluation.over_refusal, *settings.data.evaluation.safety}
    for kind in ("toxic", "seemingly_toxic"):
        for source in getattr(prompts, kind):
            if source in evaluated:
                yield (
                    f"calibration.{kind}=[{source}]: is evaluated on as well; name prompts of "
                    "another origin"
                )
