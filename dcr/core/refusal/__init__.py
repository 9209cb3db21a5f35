"""Refusals: a completion's verdict by keywords, and the refusal mass of its first token.

`keywords` judges completions; `opening` has the refusals' tokens and reads the first one's logits.
"""

from typing import TYPE_CHECKING

from dcr import on_demand
from dcr.core.refusal.keywords import (
    XSTEST_PREFIXES,
    is_decided,
    is_refusal,
    is_visible,
    outcome,
    refuses_in,
)

if TYPE_CHECKING:
    from dcr.core.refusal.opening import (
        OPENINGS,
        OPENINGS_IN,
        REFUSAL_PHRASES,
        PhraseError,
        first_logits,
        opening_batches,
        refusal_log_odds,
        refusal_margin,
        refusal_mass,
        refusal_openings,
        shown_mass,
    )
else:
    __getattr__ = on_demand(__name__, "opening")
