"""The empirical neural tangent kernel between prompts (Section 5 and A.6 of the paper).

`measuring` is the way in, `subset` finds the parameters, `capture`, `products` and `exact` are the
exact scheme, `finite` is the paper's, `memory` says what it takes, and `summary` reads matrices.
"""

from dcr.ntk.measuring import Kernel, Settings, kernel, measure, memory_needed, prompt_ids
from dcr.ntk.summary import log_probability_change, mean_by_kind, normalised

__all__ = [
    "Kernel",
    "Settings",
    "kernel",
    "log_probability_change",
    "mean_by_kind",
    "measure",
    "memory_needed",
    "normalised",
    "prompt_ids",
]
