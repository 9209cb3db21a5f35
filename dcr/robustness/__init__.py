"""Attacks on a model that refuses: which are tried, and how refusals outlive them.

The settings and their checks; `attacked` answers under each attack, and `tuning` trains for two.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from omegaconf import II

from dcr.core.config.evaluation import EvalConfig
from dcr.resolving import cut_short, not_negative, positive, ranged
from dcr.steering import SteeringConfig

ATTACKS = {  # in the words of tables
    "none": "no attack",
    "prefill": "behind an opening",  # held out of all training
    "ablation": "refusal direction taken away",  # as by steering=ablation
    "system": "system prompt asks for compliance",
    "past_tense": "asked about times long past",
    "third_person": "asked by somebody in a story",
    "tuning": "after harmless tuning",
    "tuning_recalibrated": "after harmless tuning, new bias",
    "guarded": "after harmless tuning, guarded",  # by `dcr.guarding.KeepRefusals`
    "guarded_recalibrated": "after harmless tuning, guarded, new bias",
}
RECALIBRATED = "_recalibrated"


@dataclass
class TuningConfig:
    """Harmless tuning: LoRA on the weights as they are, on rows of `data.normal.source`."""

    steps: int = ranged(100, positive, "give steps, 1 or more")  # of the optimiser
    batch_size: int = ranged(8, positive, "give rows, 1 or more")  # rows a step
    lr: float = II("model.sft_lr")  # the highest learning rate; it falls linearly to 0
    # The weight of KeepRefusals in the guarded attacks.
    guard: float = ranged(1.0, not_negative, "give a weight of KeepRefusals, 0 or more")


@dataclass
class RobustnessConfig:
    """The attacks of tasks=[robustness]."""

    # What is tried. There are also guarded, tuning_recalibrated and guarded_recalibrated.
    attacks: list[str] = field(default_factory=lambda: [*ATTACKS][:7])
    # The most tokens of an opening in each group of prefilled ones.
    lengths: list[int] = field(default_factory=lambda: [5, 10, 20])
    tuning: TuningConfig = field(default_factory=TuningConfig)


def groups(lengths: list[int]) -> dict[str, tuple[int, int]]:
    """The fewest and the most tokens of each group of openings, by the name of its attack."""
    ends = [*pairwise([0, *lengths])]
    return {f"prefill_{low + 1}_{high}": (low + 1, high) for low, high in ends}


def gated(settings: EvalConfig) -> bool:
    """Whether a gate stands in front of the model."""
    return vars(settings).get("gate") is not None


def words(attack: str) -> str:
    """An attack of `metrics.json` as tables name it."""
    if group := re.fullmatch(r"prefill_(\d+)_(\d+)", attack):
        return f"{ATTACKS['prefill']} of {group[1]} to {group[2]} tokens"
    return ATTACKS.get(attack, attack)


def relations(settings: EvalConfig) -> Iterator[str]:
    """The contradictions of tasks=[robustness] with other settings, and within its own."""
    if "robustness" not in settings.tasks:
        return
    options, named = settings.node(RobustnessConfig), "tasks=[robustness]"
    for name in options.attacks:
        if name not in ATTACKS:
            yield f"robustness.attacks=[{name}]: choose one of {', '.join(ATTACKS)}"
    if not options.attacks or len(set(options.attacks)) < len(options.attacks):
        yield f"robustness.attacks=[{','.join(options.attacks)}]: name each attack once, and one"
    if any(low >= high for low, high in pairwise([0, *options.lengths])) or not options.lengths:
        yield f"robustness.lengths={options.lengths}: give rising numbers of tokens"
    for name in options.attacks:
        if name.endswith(RECALIBRATED) and gated(settings):
            yield (
                f"robustness.attacks=[{name}] gate={vars(settings)['gate']}: behind a gate that "
                "decides there is no bias to choose anew; leave one of the two out"
            )
    if settings.endpoint is not None:
        yield f"{named}: an endpoint's weights cannot be attacked; name the model with model="
    yield from cut_short(settings, named)
    if (method := settings.node(SteeringConfig).method) != "none":
        yield f"{named} steering={method}: attacks the model as it answers by itself; drop one"
    changes = {**settings.gen.contrast, "prefill": settings.gen.prefill}
    for name, value in changes.items():
        if value is not None:
            yield f"{named} gen.{name}={value}: attacks the model as it answers by itself; drop one"
