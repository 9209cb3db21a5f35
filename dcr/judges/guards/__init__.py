"""Guard models run here: Llama Guard 3 on harm, WildGuard on harm and refusal.

Both are causal language models that write their verdict in a few words of a fixed grammar. What
does not keep to it is invalid, never safe.
"""

from dcr.judges.guards.llama import llama_guard
from dcr.judges.guards.opening import check
from dcr.judges.guards.wild import wildguard, wording

__all__ = ["check", "llama_guard", "wildguard", "wording"]
