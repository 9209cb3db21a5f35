"""Refusals: a completion's verdict by keywords, and the probability of phrases that refuse.

`keywords` judges what was said, `probability` reads what a model is about to say, for the sets of
`phrases`, and `opening` what its first token says of it.
"""

from typing import TYPE_CHECKING

from dcr import on_demand
from dcr.core.refusal.keywords import RULES, XSTEST_PREFIXES, is_decided, is_refusal, outcome

if TYPE_CHECKING:
    from dcr.core.refusal.opening import (
        first_logits,
        opening_batches,
        refusal_log_odds,
        refusal_margin,
        refusal_mass,
        refusal_openings,
        shown_mass,
    )
    from dcr.core.refusal.phrases import (
        EXTENDED_PHRASES,
        OPENINGS,
        PHRASES,
        REFUSAL_PHRASES,
        PhraseError,
    )
    from dcr.core.refusal.probability import probabilities, probability_batches, refusal_probability
else:
    __getattr__ = on_demand(__name__, "phrases", "opening", "probability")
