"""What judges say of one response, keywords among them, and how far two judges agree."""

import math
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dcr.core import statistics, storage
from dcr.core.config import Kind
from dcr.core.generation import Completion

KEYWORD = "keyword"  # the judge that is always there
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

    @property
    def settled(self) -> bool:
        """Whether the judge has answered, so that asking again would only cost."""
        return self.status != "error"


# Closing it ends what is under way.
Verdicts = Generator[list[Verdict], None, None]


def answer_fingerprint(answer: Completion) -> str:
    """Names what a verdict is about: the prompt and the response, whatever their id."""
    return storage.fingerprint([answer.prompt, answer.response])


def by_keywords(answers: Sequence[Completion], outcome: Callable[[str], str]) -> list[Verdict]:
    """A verdict for each answer by keyword rules, such as `refusal.outcome`."""
    return [
        Verdict(
            answer.id,
            answer_fingerprint(answer),
            "ok",
            compliance=outcome(answer.response),
            asked=False,
        )
        for answer in answers
    ]


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
    kappa = statistics.cohen_kappa([a for a, _ in both], [b for _, b in both])
    return {
        "n": len(both),
        "labels": labels,
        "kappa": None if math.isnan(kappa) else kappa,
        "confusion": [[times[a, b] for b in (True, False)] for a in (True, False)],
    }
