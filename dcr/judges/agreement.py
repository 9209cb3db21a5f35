"""Whether judges agree on the same responses: Cohen's kappa and tables of confusion."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from dcr import statistics
from dcr.config import Kind
from dcr.judges.verdicts import Verdict

Labels = tuple[str, str]
COMPLIANCE_LABELS: Labels = ("complied", "refused")
SAFETY_LABELS: Labels = ("unsafe", "safe")


def agreements(
    kinds: Mapping[str, Kind], verdicts: Mapping[str, Mapping[str, Sequence[Verdict]]]
) -> list[dict[str, Any]]:
    """The list `agreement` of `metrics.json`: every two judges, for each kind of prompt.

    `kinds` gives the kind of each set; `verdicts` maps judge to set to one verdict an answer, in
    the order of the answers. Sets of one kind are pooled; a response counts where both judges have
    a label for it. Partial compliance counts as compliance. Two judges that both say who complied
    are compared by that, two that both judge safety by that; of one of each, unsafe stands for
    complied and safe for refused. Raises ValueError where two lists are not about the same answers.
    """
    found = []
    for first, second in combinations(verdicts, 2):
        for kind in Kind:
            sets = [
                name
                for name, of in kinds.items()
                if of is kind and name in verdicts[first] and name in verdicts[second]
            ]
            pairs = [
                pair
                for name in sets
                for pair in _pairs(verdicts[first][name], verdicts[second][name])
            ]
            if pairs:
                found.append({"judges": [first, second], "kind": kind.value, **_compared(pairs)})
    return found


def _pairs(a: Sequence[Verdict], b: Sequence[Verdict]) -> list[tuple[Verdict, Verdict]]:
    if [v.of for v in a] != [v.of for v in b]:
        raise ValueError("verdicts on different answers cannot be compared")
    return list(zip(a, b, strict=True))


def _compared(pairs: Sequence[tuple[Verdict, Verdict]]) -> dict[str, Any]:
    answered = [(a, b) for a, b in pairs if a.status == b.status == "ok"]
    by_safety = [(_unsafe(a), _unsafe(b)) for a, b in answered]
    by_compliance = [(_complied(a), _complied(b)) for a, b in answered]
    mixed = [(_either(a), _either(b)) for a, b in answered]
    for said, labels in (
        (by_compliance, COMPLIANCE_LABELS),
        (by_safety, SAFETY_LABELS),
        (mixed, COMPLIANCE_LABELS),
    ):
        both = [(a, b) for a, b in said if a is not None and b is not None]
        if both:
            return {"n": len(both), "labels": list(labels), **_table(both)}
    return {"n": 0, "labels": list(COMPLIANCE_LABELS), **_table([])}


def _table(both: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """Kappa, and counts with the first judge's verdicts as rows."""
    times = Counter(both)
    kappa = statistics.cohen_kappa([a for a, _ in both], [b for _, b in both])
    return {
        "kappa": None if math.isnan(kappa) else kappa,
        "confusion": [[times[a, b] for b in (True, False)] for a in (True, False)],
    }


def _complied(verdict: Verdict) -> bool | None:
    return None if verdict.compliance is None else verdict.compliance != "refused"


def _unsafe(verdict: Verdict) -> bool | None:
    return None if verdict.safety is None else verdict.safety == "unsafe"


def _either(verdict: Verdict) -> bool | None:
    complied = _complied(verdict)
    return _unsafe(verdict) if complied is None else complied
