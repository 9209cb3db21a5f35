"""The table of steering methods, and an evaluation under one: settings and prompts in, edits out.

A caller opens `edits.edited` with the result; generation, refusal probability and the
lm-evaluation-harness then run under it unaware.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from dcr.calibration.biases import validation
from dcr.core import extending, models, sources, storage
from dcr.core.config import DataConfig
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation import PromptSet
from dcr.core.evaluation.protocols import Change
from dcr.core.evaluation.subjects import Local
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat, chat_format
from dcr.core.runs import Run
from dcr.overlaps import overlaps
from dcr.steering import SteeringConfig, probe, scans, surgical, vectors
from dcr.steering.edits import Edits, Plan, edited
from dcr.steering.prompts import Extraction, extraction
from dcr.steering.vectors import Info, Vectors

RECORD = "steering.json"  # beside the answers: the prompts and settings of the edits


@dataclass(frozen=True)
class SteeringMethod:
    """`find` computes vectors, for any strength; `edits` makes the edits of one strength.

    `needs` names the method's node of the steering settings, and `weights` those of its settings
    that `find` does not read.
    """

    find: Callable[[Policy, ChatFormat, Extraction, SteeringConfig], Vectors]
    edits: Callable[[Policy, ChatFormat, Vectors, SteeringConfig], Edits | Plan]
    needs: str | None
    weights: tuple[str, ...] = ()


STEERING = {
    "scans": SteeringMethod(scans.find, scans.edits, "scans"),
    "surgical": SteeringMethod(surgical.find, surgical.edits, "surgical", ("add", "ablate")),
    "probe": SteeringMethod(probe.find, probe.edits, "probe"),
    "ablation": SteeringMethod(surgical.find_ablation, surgical.ablation_edits, None),
}


@dataclass(frozen=True)
class Steered:
    """The edits, and a record of their prompts and settings, to be stored as JSON."""

    edits: Edits | Plan
    record: Info


def steer(
    policy: Policy,
    chat: ChatFormat,
    data: DataConfig,
    settings: SteeringConfig,
    seed: int,
    folder: Path | None = None,
    drawn: Extraction | None = None,
) -> Steered:
    """The edits of `settings.method` at its strength; at strength 0 there are none.

    `folder` stores the vectors for other strengths of the same weights, prompts and settings.
    Prompts are `drawn` already, or now by `seed`. Raises ConfigError as `extraction` and the
    method's `find` do.
    """
    if not is_active(settings):
        return Steered((), {})
    method, drawn = STEERING[settings.method], drawn or extraction(data, settings, seed)
    used = {kind: sources.record(rows) for kind, rows in drawn.parts().items()}
    tensors, info = vectors.cached(
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
        "method": settings.method,
        "strength": settings.strength,
        "released_data": settings.released_data,
        "prompts": used,
        "dropped": drawn.dropped,
        "leaked": drawn.leaked,
        **info,
    }
    return Steered(method.edits(policy, chat, (tensors, info), settings), record)


def is_active(settings: SteeringConfig) -> bool:
    """Whether one of these edits; strength 0 equals `none` to the bit."""
    return settings.method in STEERING and settings.strength != 0


def identity(
    data: DataConfig, settings: SteeringConfig, seed: int, drawn: Extraction | None = None
) -> dict[str, Any]:
    """Everything that an edited completion depends on besides model and prompt; {} without edits.

    It enters the fingerprint of stored completions, so one strength never takes another's, nor one
    content of a file of prompts another's. Prompts are `drawn` already, or now by `seed`. Raises
    what `extraction` raises.
    """
    if not is_active(settings):
        return {}
    used = (drawn or extraction(data, settings, seed)).parts()
    prompts = {kind: sources.fingerprint(rows) for kind, rows in used.items()}
    return {**_made_with(settings), "strength": settings.strength, "prompts": prompts}


def summary(settings: SteeringConfig) -> dict[str, Any]:
    """The settings that tell evaluations apart: method, strength, and the method's own."""
    made_with = _made_with(settings)
    own = made_with.pop("settings")
    return made_with | {"strength": settings.strength} | own


def _made_with(settings: SteeringConfig, unread: Sequence[str] = ()) -> dict[str, Any]:
    """The settings of a method without its strength and without those in `unread`."""
    needs = STEERING[settings.method].needs
    node = asdict(getattr(settings, needs)) if needs else {}
    # `ablation` shares Surgical's number of prompts
    shared = {} if needs else {"train": settings.surgical.train}
    return {
        "method": settings.method,
        "released_data": settings.released_data,
        **shared,
        "settings": {
            key: value.value if isinstance(value, Enum) else value
            for key, value in node.items()
            if key not in unread
        },
    }


_drawn: WeakKeyDictionary[Local, Extraction] = WeakKeyDictionary()


def drawn_for(subject: Local) -> Extraction:
    """The prompts of a subject's vectors: drawn once, since files may change before another's.

    Raises what `extraction` raises.
    """
    if subject not in _drawn:
        settings = subject.settings
        steering = settings.node(SteeringConfig)
        _drawn[subject] = extraction(settings.data, steering, settings.seed)
    return _drawn[subject]


class Steering(Change):
    """Evaluates under the edits of `steering`, or on the prompts that choose a strength."""

    def check(self, settings: EvalConfig, run: Run) -> None:
        steering = settings.node(SteeringConfig)
        if steering.method == "probe":
            probe.block_of(models.facts(settings.model).depth, steering.probe)

    def recorded(self, settings: EvalConfig) -> dict[str, Any]:
        steering = settings.node(SteeringConfig)
        edits = {"steering": summary(steering)} if is_active(steering) else {}
        return edits | ({"validation": True} if steering.validation else {})

    def identity(self, subject: Local) -> dict[str, object]:
        settings = subject.settings
        steering = settings.node(SteeringConfig)
        if not is_active(steering):
            return {}
        drawn = drawn_for(subject)
        return {"steering": identity(settings.data, steering, settings.seed, drawn)}

    @contextmanager
    def around(self, subject: Local, policy: Policy) -> Iterator[None]:
        settings = subject.settings
        steering = settings.node(SteeringConfig)
        if not is_active(steering):
            yield
            return
        chat = chat_format(policy.tokenizer, settings.model)
        folder, drawn = subject.run.folder / "steering", drawn_for(subject)
        steered = steer(policy, chat, settings.data, steering, settings.seed, folder, drawn)
        with edited(policy.model, steered.edits):
            # now, since a later command that finds all answers here opens nothing
            storage.write_json(subject.folder / RECORD, steered.record)
            yield

    def noted(self, subject: Local, folder: Path) -> dict[str, Any]:
        file = folder / RECORD
        return {"steering": storage.read_json(file, dict[str, Any])} if file.is_file() else {}

    def prompts(self, settings: EvalConfig) -> list[PromptSet] | None:
        apart = settings.node(SteeringConfig).validation
        return validation(settings, settings.limit) if apart else None

    def made_from(self, settings: EvalConfig, sets: Sequence[PromptSet]) -> dict[str, int]:
        """Counts each set's prompts among the released ones that vectors were computed from."""
        steering = settings.node(SteeringConfig)
        if not is_active(steering):
            return {}
        if not steering.released_data:
            return {b.name: 0 for b in sets}
        used = extraction(settings.data, steering, settings.seed).parts()
        known = {"steering": [row.prompt for rows in used.values() for row in rows]}
        near = settings.data.near_duplicate
        return {
            b.name: sum(
                overlap is not None
                for overlap in overlaps([r.prompt for r in b.rows], known, near=near)
            )
            for b in sets
        }


class Own(Change):
    """A user's own edit, named by its path as the method, unless its strength is 0.

    Every hook is the user's.
    """

    def part(self, settings: EvalConfig) -> Change:
        """The user's, or one that changes nothing."""
        steering = settings.node(SteeringConfig)
        own = extending.made(steering.method, Change, "steering.method")
        return own if steering.strength != 0 else Change()

    def recorded(self, settings: EvalConfig) -> dict[str, Any]:
        own, strength = self.part(settings), settings.node(SteeringConfig).strength
        if strength == 0:
            return {}
        made = {"method": type(own).__name__, "strength": strength, **extending.origin(own)}
        return own.recorded(settings) | {"steering": made}

    def identity(self, subject: Local) -> dict[str, object]:
        return self.part(subject.settings).identity(subject) | self.recorded(subject.settings)


def _handed_on(hook: str) -> Callable[..., Any]:
    def called(self: Own, of: Any, *more: Any) -> Any:
        settings = of if isinstance(of, EvalConfig) else of.settings  # of a subject
        return getattr(self.part(settings), hook)(of, *more)

    return called


for _hook in ("check", "prepared", "around", "decoding", "chat", "before", "answering", "masses",
              "measured", "noted", "prompts", "made_from"):  # fmt: skip
    setattr(Own, _hook, _handed_on(_hook))
