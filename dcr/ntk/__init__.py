"""The empirical neural tangent kernel between prompts (Section 5 and A.6 of the paper).

`measuring` is the way in, says what it takes and reads matrices; `subset` finds the parameters,
`capture` what the exact scheme needs of them; `schemes` are that and the paper's.
"""

from dcr.ntk.capture import Batch, batches, last_logits
from dcr.ntk.measuring import (
    Kernel,
    Settings,
    kernel,
    log_probability_change,
    mean_by_kind,
    measure,
    memory_needed,
    normalised,
    prompt_ids,
)
from dcr.ntk.subset import parameters, still

__all__ = [
    "Batch",
    "Kernel",
    "Settings",
    "batches",
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
