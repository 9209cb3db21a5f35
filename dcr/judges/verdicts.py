"""The prompts of judges, and the counts of their verdicts."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dcr.core.config import ConfigError
from dcr.core.evaluation.verdicts import (
    COMPLIANCE,
    SAFETY,
    Verdict,
    Verdicts,
    answer_fingerprint,
)
from dcr.core.generation import Completion
from dcr.endpoints import ServerConfig, servers
from dcr.judges import GuardConfig
from dcr.outcomes import Outcome, outcome


def wording(key: str, named: str | None, shipped: str, *places: str) -> str:
    """A judge's prompt: the text of the user's file, or of the one shipped here.

    Raises ConfigError, beginning with the `key` and the file, if it cannot be read or lacks one of
    the `places`, which stand in braces.
    """
    file = Path(named) if named else Path(__file__).with_name(shipped)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ConfigError(f"{key}={file}: is not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(
            f"{key}={file}: cannot be read ({error.strerror or error}); name a text file, or leave "
            "it out"
        ) from None
    marks = [f"{{{place}}}" for place in places]
    if lacking := [mark for mark in marks if mark not in text]:
        raise ConfigError(
            f"{key}={file}: has no {lacking[0]}; write {' and '.join(marks)} where the texts belong"
        )
    return text


def filled(template: str, **texts: str) -> str:
    """The template with the texts in their places; braces in the texts mean nothing."""
    places = re.compile(r"\{(" + "|".join(texts) + r")\}")
    return places.sub(lambda match: texts[match[1]], template)


def counts(verdicts: Sequence[Verdict], model: str, labels: Sequence[str]) -> dict[str, Any]:
    """The block `sets.<name>.judged.<judge>` of `metrics.json` for a judge that gives `labels`.

    If the server names the model that answered, that name replaces `model`: an alias such as
    omni-moderation-latest stands for different models over time.
    """
    answered = sorted({v.model for v in verdicts if v.model})
    return {
        "model": ", ".join(answered) or model,
        "n": len(verdicts),
        **{
            label: sum(v.status == "ok" and label in (v.compliance, v.safety) for v in verdicts)
            for label in labels
        },
        "invalid": sum(v.status == "invalid" for v in verdicts),
        "error": sum(v.status == "error" for v in verdicts),
    }


def own_counts(verdicts: Sequence[Verdict], labels: Sequence[str]) -> dict[str, Any]:
    """The same of a user's own judge: labels that no other judge gives stand under `labels`."""
    said = Counter(verdict.raw for verdict in verdicts if verdict.status == "ok")
    others = [label for label in labels if label not in (*COMPLIANCE, *SAFETY)]
    shared = [
        label for family in (COMPLIANCE, SAFETY) if set(family) & {*labels} for label in family
    ]
    return {
        "n": len(verdicts),
        **{label: said[label] for label in shared},
        **({"labels": {label: said[label] for label in others}} if others else {}),
        "invalid": sum(verdict.status == "invalid" for verdict in verdicts),
        "error": 0,
    }


STANCES = {  # for comparison with judges of XSTest's three classes
    Outcome.answered: "complied",
    Outcome.partly_refused: "partial",
    Outcome.refused_but_helped: "partial",
    Outcome.refused: "refused",
}


def outcomes(answers: Sequence[Completion]) -> Verdicts:
    """The outcome of each answer, which stands in `raw`."""
    said = [outcome(answer.prompt, answer.response, answer.ended) for answer in answers]
    yield [
        Verdict(
            answer.id,
            answer_fingerprint(answer),
            "ok",
            compliance=STANCES.get(kind),
            raw=kind.value,
            asked=False,
        )
        for answer, kind in zip(answers, said, strict=True)
    ]


def outcome_counts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The block of the outcomes: all eight, each a share of all answers."""
    said = Counter(verdict.raw for verdict in verdicts)
    return {"n": len(verdicts), "labels": {kind.value: said[kind.value] for kind in Outcome}}


def usage(verdicts: Iterable[Verdict], node: ServerConfig | GuardConfig) -> dict[str, Any]:
    """The block `usage.<judge>` of `metrics.json`: the answered requests and their tokens.

    A response that stands in several sets was asked about once and counts once. `usd` is None for a
    model on this machine and for a server without prices.
    """
    server = node if isinstance(node, ServerConfig) else None
    return servers.usage((v for v in verdicts if v.asked and v.settled), server)
