"""A gate in front of a model: it refuses prompts above a threshold, and the model answers others.

`python -m dcr.gate` trains one. Here are its settings and their checks, and what its folder tells;
`classifier` scores prompts, `answers` puts a gate in front of what is evaluated, and `serving` is
what an export has beside it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict

from dcr.core.config.evaluation import EvalConfig
from dcr.resolving import ranged

RECORD = "gate.json"  # in a gate's folder, beside weights and tokenizer
REFUSAL = "I'm sorry, but I can't help with that."
SHUT = -100.0  # logits: with this bias no answer opens with a refusal's first token


@dataclass
class GatingConfig:
    """The threshold of a gate's refusals, and whether the model behind it refuses as well."""

    # A prompt is refused above this probability of being toxic; null: the gate's own threshold, or
    # the one that `calibrate` chooses.
    threshold: float | None = ranged(None, lambda v: 0 <= v <= 1, "give a probability, or null")
    # The gate alone decides: behind it, no answer begins with a refusal's first token.
    alone: bool = True


class Record(TypedDict):
    """`gate.json`: what a gate was trained on, its threshold, and the words of its refusals."""

    __pydantic_config__ = ConfigDict(extra="allow")  # pyright: ignore[reportGeneralTypeIssues]

    made_with: dict[str, Any]
    threshold: float
    refusal: str


def folder_of(settings: EvalConfig) -> Path:
    """The folder that `gate` names."""
    return Path(vars(settings)["gate"])


def relations(settings: Any) -> Iterator[str]:
    """The contradictions of `gate` with other settings."""
    node = settings.node(GatingConfig)
    if settings.gate is None:
        for key, default in vars(GatingConfig()).items():
            if (value := getattr(node, key)) != default:
                yield f"gating.{key}={value}: there is no gate; name one with gate=<folder>"
        return
    named = f"gate={settings.gate}"
    if settings.endpoint is not None:
        yield (
            f"{named} endpoint={settings.endpoint}: a gate stands before weights that are here; "
            "name the model with model= or run="
        )
    if settings.calibrate is not None and node.threshold is not None:
        yield (
            f"gating.threshold={node.threshold} calibrate={settings.calibrate}: calibration "
            "chooses the threshold; give one of the two"
        )
    for name, value in settings.gen.contrast.items():
        yield f"{named} gen.{name}={value}: two ways to refuse less; give one"
    for task in ("frontier", *settings.table.on_weights):
        if task in settings.tasks:
            yield (
                f"{named} tasks=[{task}]: measures the model without a gate; leave one of the two "
                "out"
            )
