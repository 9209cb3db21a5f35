"""Calibration: a bias on the first token of refusals, so that a share of toxic prompts is refused.

Greedy decoding opens an answer with a refusal's token where the best of these lies above the best
of all others (`refusal.refusal_margin`); a bias b moves all margins by b. So one forward pass over
validation prompts gives the bias of every share at once.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from dcr import config, prompts, refusal, storage
from dcr.config import STAGES, ConfigError, EvalConfig, Kind, SteeringConfig
from dcr.evaluation import discernment, subjects
from dcr.evaluation.discernment import Opening
from dcr.evaluation.sets import PromptSet, read_set, set_name
from dcr.evaluation.subjects import Subject
from dcr.generation import OpeningBias
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.runs import Run

log = logging.getLogger(__name__)

BEYOND = 0.25  # logits beyond the last prompt, where every one is to be refused


class Place(TypedDict):
    """Where the bias acts: behind which tokens, and on which."""

    lead: list[int]
    tokens: list[int]


def check(settings: EvalConfig, made_with: Mapping[str, Any]) -> None:
    """Raises ConfigError for what is neither a share nor a run, and for prompts trained on.

    `made_with` is the configuration of the run that is calibrated.
    """
    if _share(settings) is None:
        subjects.final(_reference(settings))
    if made_with["method"] not in {method.value for method in STAGES}:
        return
    for node in ("seemingly_toxic", "toxic", "safety", "normal"):
        named = made_with["data"].get(node, {}).get("source") or []
        trained_on = {named} if isinstance(named, str) else set(named)
        for kind in ("toxic", "seemingly_toxic"):
            if both := trained_on & set(getattr(settings.calibration, kind)):
                raise ConfigError(
                    f"calibration.{kind}=[{min(both)}]: the run was trained on it (data.{node}); "
                    "name prompts of another origin"
                )


def label(settings: EvalConfig) -> str:
    """The target as records and tables tell it: a share, or the name of a run's folder."""
    share = _share(settings)
    return Path(str(settings.calibrate)).resolve().name if share is None else f"{share:g}"


def _share(settings: EvalConfig) -> float | None:
    """The target where it is a number; ConfigError where that is no share."""
    try:
        share = float(str(settings.calibrate))
    except ValueError:
        return None
    if not 0 < share <= 1:
        raise ConfigError(
            f"calibrate={settings.calibrate}: give a share of toxic prompts above 0, at most 1, or "
            "the folder of a run to be as safe as"
        )
    return share


def _reference(settings: EvalConfig) -> Run:
    run = Run(Path(str(settings.calibrate)))
    if not run.config_file.is_file():
        raise ConfigError(
            f"calibrate={settings.calibrate}: neither a share such as 0.9 nor a run folder with a "
            "config.yaml"
        )
    return run


def asked(settings: EvalConfig) -> list[PromptSet]:
    """The validation prompts, whole sets."""
    return [
        read_set(source, kind, settings.data.root, None, settings.seed)
        for kind in (Kind.toxic, Kind.seemingly_toxic)
        for source in getattr(settings.calibration, kind.value)
    ]


def calibrated(
    settings: EvalConfig, subject: Subject, policy: Callable[[], Policy], folder: Path
) -> tuple[Subject, dict[str, Any]]:
    """The subject with its bias, and `calibration` of `metrics.json`.

    `folder` is that of its plain answers: what is read of the validation prompts is kept there.
    """
    openings = discernment.openings(settings, policy, asked(settings), folder)
    file = folder / "opening.json"  # else a command whose answers are all there opened the weights
    if not file.is_file():
        chat = prompts.chat_format(policy().tokenizer, settings.model)
        storage.write_json(file, place(chat))
    bias, record = chosen(settings, storage.read_json(file, Place), openings)
    return replace(subject, bias=bias), record


def place(chat: ChatFormat) -> Place:
    """Raises ConfigError for a template without a token between a user's words and the answer."""
    lead = chat.lead()
    if not lead:
        raise ConfigError(
            "calibrate: no token of the chat template stands between the user's words and the "
            "answer, so a bias cannot know where that begins; name another model.template"
        )
    if lead[0] not in chat.stop:
        log.warning(
            "calibrate: no end token stands before %r in the chat template: in an answer that "
            "holds these words the bias acts a second time",
            chat.tokenizer.decode(lead),
        )
    return Place(lead=lead, tokens=refusal.refusal_openings(chat.tokenizer).tolist())


def chosen(
    settings: EvalConfig, where: Place, openings: Mapping[str, Sequence[Opening]]
) -> tuple[OpeningBias, dict[str, Any]]:
    """The bias for the openings of the validation sets, by name, and its record."""
    toxic = _margins(openings, settings.calibration.toxic)
    share = _share(settings) or _refused(settings)
    bias = bias_for(toxic, share)
    counts = {
        name: {
            "kind": kind,
            "n": len(margins),
            "plain": sum(margin > 0 for margin in margins),
            "refused": sum(margin + bias > 0 for margin in margins),
        }
        for kind in ("toxic", "seemingly_toxic")
        for name in getattr(settings.calibration, kind)
        for margins in [_margins(openings, [name])]
    }
    named = None if _share(settings) else label(settings)
    record = {"target": share, "run": named, "bias": bias, "sets": counts}
    return OpeningBias(tuple(where["lead"]), tuple(where["tokens"]), bias), record


def _margins(openings: Mapping[str, Sequence[Opening]], names: Sequence[str]) -> list[float]:
    return [opening.margin for name in names for opening in openings[set_name(name)]]


def bias_for(margins: Sequence[float], share: float) -> float:
    """A bias under which at least `share` of the margins are above 0, and no prompt more than ties.

    0 where that does it, else the middle between the last prompt refused and the first that is not,
    so that the rounding of another batch changes neither. It never falls with `share`.
    """
    ordered = sorted(margins, reverse=True)
    count = math.ceil(share * len(ordered) - 1e-9)
    last = ordered[count - 1]
    below = next((margin for margin in ordered[count:] if margin < last), -math.inf)
    if last > 0 >= below:
        return 0.0
    return BEYOND - last if below == -math.inf else -(last + below) / 2


def _refused(settings: EvalConfig) -> float:
    """The share of the toxic prompts whose plain answers the reference run opens with a refusal."""
    run = _reference(settings)
    beside = replace(
        settings,
        model=config.model_of(run.config()),
        run=str(run.folder),
        steering=SteeringConfig(),
    )
    subject = subjects.final(run)
    policy = functools.cache(functools.partial(subjects.opened, beside, subject))
    toxic = [b for b in asked(settings) if b.kind is Kind.toxic]
    folder = subjects.answers_folder(beside, run, subject)
    openings = discernment.openings(beside, policy, toxic, folder)
    margins = [opening.margin for read in openings.values() for opening in read]
    refused = sum(margin > 0 for margin in margins)
    if not refused:
        raise ConfigError(
            f"calibrate={settings.calibrate}: that run refuses none of {len(margins)} toxic "
            "prompts; give a share such as 0.9"
        )
    return refused / len(margins)
