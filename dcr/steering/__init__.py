"""Activation edits that over-refusal and safety are traded with: prompts in, edits out.

`prompts` draws what vectors are computed from, `scans`, `surgical` and `probe` compute them and say
where they act, `vectors` is what these share. A caller opens `activations.edited` with the result;
generation, refusal probability and the lm-evaluation-harness then run under it unaware.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from dcr.core import sources
from dcr.core.activations import Edits, Plan
from dcr.core.config import DataConfig, Steering, SteeringConfig
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.steering import probe, scans, surgical, vectors
from dcr.steering.prompts import RELEASED, Extraction, extraction
from dcr.steering.vectors import Info, Vectors


@dataclass(frozen=True)
class SteeringMethod:
    """`find` computes vectors, for any strength; `edits` makes the edits of one strength.

    `needs` names the method's node of the steering settings, `weights` what in it `find` does not
    read.
    """

    find: Callable[[Policy, ChatFormat, Extraction, SteeringConfig], Vectors]
    edits: Callable[[Policy, ChatFormat, Vectors, SteeringConfig], Edits | Plan]
    needs: str | None
    weights: tuple[str, ...] = ()


STEERING = {
    Steering.scans: SteeringMethod(scans.find, scans.edits, "scans"),
    Steering.surgical: SteeringMethod(surgical.find, surgical.edits, "surgical", ("add", "ablate")),
    Steering.probe: SteeringMethod(probe.find, probe.edits, "probe"),
    Steering.ablation: SteeringMethod(surgical.find_ablation, surgical.ablation_edits, None),
}


@dataclass(frozen=True)
class Steered:
    """The edits, and a record of what they were made from, to be stored as JSON."""

    edits: Edits | Plan
    record: Info


def steer(
    policy: Policy,
    chat: ChatFormat,
    data: DataConfig,
    settings: SteeringConfig,
    seed: int,
    folder: Path | None = None,
) -> Steered:
    """The edits of `settings.method` at its strength; none at strength 0, and nothing is read then.

    In `folder` vectors are kept for other strengths of the same weights, prompts and settings.
    Prompts are drawn by `seed`. Raises ConfigError as `extraction` and the method's `find` do.
    """
    if not acts(settings):
        return Steered((), {})
    method, drawn = STEERING[settings.method], extraction(data, settings, seed)
    used = {kind: sources.record(rows) for kind, rows in drawn.parts().items()}
    tensors, info = vectors.kept(
        folder,
        {
            **_made_with(settings, method.weights),
            "prompts": {kind: part["fingerprint"] for kind, part in used.items()},
            "chat": [chat.template, chat.system_prompt],
            "weights": vectors.trace(policy),
        },
        lambda: method.find(policy, chat, drawn, settings),
    )
    record = {
        "method": settings.method.value,
        "strength": settings.strength,
        "released_data": settings.released_data,
        "prompts": used,
        "dropped": drawn.dropped,
        "leaked": drawn.leaked,
        **info,
    }
    return Steered(method.edits(policy, chat, (tensors, info), settings), record)


def acts(settings: SteeringConfig) -> bool:
    """Whether anything is edited: not at strength 0, which equals `none` to the bit."""
    return settings.method is not Steering.none and settings.strength != 0


def identity(data: DataConfig, settings: SteeringConfig, seed: int) -> dict[str, Any]:
    """All that an edited completion depends on besides model and prompt; {} where nothing is.

    For the fingerprint of stored completions: those of one strength are never taken for another's.
    """
    if not acts(settings):
        return {}
    named = RELEASED[settings.method] if settings.released_data else data.extraction
    against = None if settings.released_data else [asdict(data.evaluation), data.near_duplicate]
    return {
        **_made_with(settings),
        "strength": settings.strength,
        "extraction": asdict(named),
        "apart_from": against,
        "seed": seed,
    }


def summary(settings: SteeringConfig) -> dict[str, Any]:
    """What tells evaluations under edits apart: method, strength, and the method's settings."""
    made_with = _made_with(settings)
    own = made_with.pop("settings")
    return made_with | {"strength": settings.strength} | own


def _made_with(settings: SteeringConfig, unread: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a method but its strength and those that are not read."""
    needs = STEERING[settings.method].needs
    node = asdict(getattr(settings, needs)) if needs else {}
    # `ablation` shares Surgical's number of prompts
    shared = {} if needs else {"train": settings.surgical.train}
    return {
        "method": settings.method.value,
        "released_data": settings.released_data,
        **shared,
        "settings": {
            key: value.value if isinstance(value, Enum) else value
            for key, value in node.items()
            if key not in unread
        },
    }
