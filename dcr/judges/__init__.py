"""Judges: who says whether a response refuses, answers or does harm.

`judging` has the table of judges and asks them for what is missing, `verdicts` says what they
answer and keeps it, `llm`, `moderation` and `guards` are the judges themselves, `agreement`
compares them, `pairwise` says which of two answers is better.
"""

from dcr.judges.agreement import agreements
from dcr.judges.judging import JUDGES, KINDS, check, judge, model_of, server_of
from dcr.judges.keyword import by_keywords
from dcr.judges.verdicts import LABELS, Verdict, answer_fingerprint, counts, stored, usage

__all__ = [
    "JUDGES",
    "KINDS",
    "LABELS",
    "Verdict",
    "agreements",
    "answer_fingerprint",
    "by_keywords",
    "check",
    "counts",
    "judge",
    "model_of",
    "server_of",
    "stored",
    "usage",
]
