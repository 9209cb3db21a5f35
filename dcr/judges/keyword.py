"""Keyword verdicts in the form of every other judge's, for comparing them."""

from collections.abc import Sequence

from dcr import refusal
from dcr.generation import Completion
from dcr.judges.verdicts import Verdict, answer_fingerprint


def by_keywords(answers: Sequence[Completion], rules: str) -> list[Verdict]:
    """A verdict for each answer by the rules `paper` or `recommended` (`dcr.refusal`)."""
    return [
        Verdict(
            answer.id,
            answer_fingerprint(answer),
            "ok",
            compliance=refusal.outcome(answer.response, rules),
            asked=False,
        )
        for answer in answers
    ]
