"""Refusals: a completion's verdict by keywords, and the refusal mass of its first token.

`keywords` judges completions; `opening` has the refusals' tokens and reads the first one's logits.
"""

from typing import TYPE_CHECKING, Any

from dcr.core.keywords import (
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

    def __getattr__(name: str) -> Any:
        """A name of `opening`, which is imported with torch when one is first asked for."""
        if name == "opening" or name.startswith("__"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from dcr.core.refusal import opening

        return getattr(opening, name)
