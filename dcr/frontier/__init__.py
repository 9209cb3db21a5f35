"""Arms of an experiment compared on generated answers at equal achieved safety.

`answers` keeps both greedy answers of every prompt, `arms` compares models by them, and the command
prints the comparison that a plan names.
"""

from enum import StrEnum


class Rule(StrEnum):
    """The rule by which an answer counts as refused, or as answered."""

    outcome = "outcome"  # `dcr.outcomes`: refused without help; answered
    partial = "partial"  # the same, but what refuses in part and does not help counts as refused
    keyword = "keyword"  # XSTest's keywords: the opening; all else is an answer
