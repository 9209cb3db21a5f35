"""The empirical neural tangent kernel between prompts (Section 5 and A.6 of the paper).

`measuring` is the way in, `subset` finds the parameters, `capture`, `products` and `exact` are the
exact scheme, `finite` is the paper's, `memory` says what it takes, and `summary` reads matrices.
"""

from dcr.ntk.capture import Batch, batches, by_length, last_logits
from dcr.ntk.measuring import Kernel, Settings, kernel, measure, memory_needed, prompt_ids
from dcr.ntk.subset import parameters, still
from dcr.ntk.summary import log_probability_change, mean_by_kind, normalised

__all__ = [
    "Batch",
    "Kernel",
    "Settings",
    "batches",
    "by_length",
    "kernel",
    "last_logits",
    "log_probability_change",
    "mean_by_kind",
    "measure",
    "memory_needed",
    "normalised",
    "parameters",
    "prompt_ids",
    "still",
]
