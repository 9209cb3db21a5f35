"""Refusals: a completion's verdict by keywords, and the probability of phrases that refuse.

`keywords` judges what was said; `openings` and `probability` read what a model is about to say,
the latter for the sets of `phrases`.
"""

from dcr.refusal.continuations import PhraseError
from dcr.refusal.keywords import RULES, XSTEST_PREFIXES, is_refusal, outcome
from dcr.refusal.openings import refusal_mass, refusal_openings
from dcr.refusal.phrases import EXTENDED_PHRASES, OPENINGS, PHRASES, REFUSAL_PHRASES
from dcr.refusal.probability import probabilities, refusal_probability

__all__ = [
    "EXTENDED_PHRASES",
    "OPENINGS",
    "PHRASES",
    "REFUSAL_PHRASES",
    "RULES",
    "XSTEST_PREFIXES",
    "PhraseError",
    "is_refusal",
    "outcome",
    "probabilities",
    "refusal_mass",
    "refusal_openings",
    "refusal_probability",
]
