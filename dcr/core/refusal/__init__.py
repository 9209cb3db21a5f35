"""Refusals: a completion's verdict by keywords, and the refusal mass of its first token.

`keywords` judges completions, `opening` reads the logits of the first token, and `phrases` has the
words of both.
"""

from typing import TYPE_CHECKING

from dcr import on_demand
from dcr.core.refusal.keywords import XSTEST_PREFIXES, is_decided, is_refusal, is_visible, outcome

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
    from dcr.core.refusal.phrases import OPENINGS, REFUSAL_PHRASES, PhraseError
else:
    __getattr__ = on_demand(__name__, "phrases", "opening")
