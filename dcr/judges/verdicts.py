"""Judges' verdicts on responses, keywords among them: their counts, and how far two agree."""

import math
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from dcr import inference
from dcr.core import storage
from dcr.core.config import ConfigError, Kind
from dcr.core.generation import Completion
from dcr.core.text import TURN, turns_of
from dcr.endpoints import ServerConfig, servers
from dcr.judges import GuardConfig
from dcr.outcomes import Outcome, outcome

COMPLIANCE = ("complied", "partial", "refused")
SAFETY = ("safe", "unsafe")


@dataclass(frozen=True)
class Verdict:
    """One judge's word on one response. A failed one has no label and counts as neither."""

    id: str
    of: str  # fingerprint of the prompt and response it was given for
    status: str  # ok; error: nothing came back; invalid: what came back is no verdict
    compliance: str | None = None  # complied, partial or refused; by keywords also empty
    safety: str | None = None  # safe or unsafe
    p_unsafe: float | None = None
    raw: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    model: str = ""  # which one answered, where the server says so
    asked: bool = True  # False where no judge was needed

    @classmethod
    def on(cls, answer: Completion, status: str = "ok", **said: Any) -> "Verdict":
        return cls(answer.id, answer_fingerprint(answer), status, **said)

    @property
    def settled(self) -> bool:
        """Whether the judge has answered, so that asking again would only cost."""
        return self.status != "error"

    @property
    def label(self) -> str:
        """The outcome, or the label of a user's own judge; empty of judges with two aspects."""
        return "" if self.asked or self.safety else self.raw


# Closing it ends what is under way.
Verdicts = Generator[list[Verdict], None, None]


def answer_fingerprint(answer: Completion) -> str:
    """Names what a verdict is about: the prompt and the response, whatever their id."""
    return storage.fingerprint([answer.prompt, answer.response])


def transcript(prompt: str) -> str:
    """A prompt for a judge to read, without the signs of a conversation."""
    return prompt.replace(TURN, "") if len(turns_of(prompt)) > 1 else prompt


def by_keywords(answers: Sequence[Completion], outcome: Callable[[str], str]) -> list[Verdict]:
    """A verdict for each answer by keyword rules, such as `refusal.outcome`."""
    return [Verdict.on(a, compliance=outcome(a.response), asked=False) for a in answers]


def counts(
    verdicts: Sequence[Verdict], labels: Sequence[str], made: Mapping[str, Any]
) -> dict[str, Any]:
    """The block `sets.<name>.judged.<judge>` of `metrics.json` for a judge that gives `labels`.

    `made` tells of the judge. If the server names the model that answered, that name replaces its
    `model`: an alias such as omni-moderation-latest stands for different models over time. Labels
    that only a user's own judge gives stand under `labels`.
    """
    answered = sorted({v.model for v in verdicts if v.model})
    ok = [verdict for verdict in verdicts if verdict.status == "ok"]
    said = Counter(label for verdict in ok for label in (verdict.compliance, verdict.safety))
    shared = [of for family in (COMPLIANCE, SAFETY) if {*family} & {*labels} for of in family]
    own = {of: sum(verdict.raw == of for verdict in ok) for of in labels if of not in shared}
    return {
        **made,
        **({"model": ", ".join(answered)} if answered else {}),
        "n": len(verdicts),
        **{label: said[label] for label in shared},
        **({"labels": own} if own else {}),
        "invalid": sum(verdict.status == "invalid" for verdict in verdicts),
        "error": sum(verdict.status == "error" for verdict in verdicts),
    }


STANCES = {  # for comparison with judges of XSTest's three classes
    Outcome.answered: "complied",
    Outcome.partly_refused: "partial",
    Outcome.refused_but_helped: "partial",
    Outcome.refused: "refused",
}


def outcomes(answers: Sequence[Completion]) -> Verdicts:
    """The outcome of each answer, which stands in `raw`."""
    found = [(answer, outcome(answer.prompt, answer.response, answer.ended)) for answer in answers]
    yield [
        Verdict.on(answer, compliance=STANCES.get(kind), raw=kind.value, asked=False)
        for answer, kind in found
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


def agreements(
    kinds: Mapping[str, Kind], verdicts: Mapping[str, Mapping[str, Sequence[Verdict]]]
) -> list[dict[str, Any]]:
    """The list `agreement` of `metrics.json`: every two judges, for each kind of prompt.

    `kinds` gives the kind of each set; `verdicts` maps judge to set to one verdict an answer, in
    the order of the answers. Sets of one kind are pooled; a response counts where both judges have
    a label for it, which keywords have not for an empty one. Partial compliance counts as
    compliance. Two judges that both say who complied
    are compared by that, two that both judge safety by that; of one of each, unsafe stands for
    complied and safe for refused. Raises ValueError where two lists are not about the same answers.
    """
    entries = []
    for first, second in combinations(verdicts, 2):
        for kind in Kind:
            pairs: list[tuple[Verdict, Verdict]] = []
            for name, of in kinds.items():
                if of is kind and name in verdicts[first] and name in verdicts[second]:
                    a, b = verdicts[first][name], verdicts[second][name]
                    if [v.of for v in a] != [v.of for v in b]:
                        raise ValueError("verdicts on different answers cannot be compared")
                    pairs += zip(a, b, strict=True)
            if pairs:
                entries.append({"judges": [first, second], "kind": kind.value, **_compared(pairs)})
    return entries


def _compared(pairs: Sequence[tuple[Verdict, Verdict]]) -> dict[str, Any]:
    """Kappa, and counts with the first judge's verdicts as rows."""

    def complied(verdict: Verdict) -> bool | None:
        known = verdict.compliance not in (None, "empty")
        return verdict.compliance != "refused" if known else None

    def unsafe(verdict: Verdict) -> bool | None:
        return None if verdict.safety is None else verdict.safety == "unsafe"

    def either(verdict: Verdict) -> bool | None:
        return unsafe(verdict) if verdict.compliance is None else complied(verdict)

    labels, both = ["complied", "refused"], []
    for read, names in (
        (complied, ["complied", "refused"]),
        (unsafe, ["unsafe", "safe"]),
        (either, ["complied", "refused"]),
    ):
        labelled = [(read(a), read(b)) for a, b in pairs if a.status == b.status == "ok"]
        both = [(a, b) for a, b in labelled if a is not None and b is not None]
        if both:
            labels = names
            break
    times = Counter(both)
    kappa = inference.cohen_kappa([a for a, _ in both], [b for _, b in both])
    return {
        "n": len(both),
        "labels": labels,
        "kappa": None if math.isnan(kappa) else kappa,
        "confusion": [[times[a, b] for b in (True, False)] for a in (True, False)],
    }


# --- the prompts of judges --------------------------------------------------------------------


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
