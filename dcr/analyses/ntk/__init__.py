"""The empirical neural tangent kernel between prompts (Section 5 and A.6 of the paper).

`empirical` is the way in, with the finite differences of the paper and what is read off a matrix;
`subset` finds the parameters; `exact` is the exact scheme, and what it takes.
"""

from dcr.analyses.ntk.empirical import (
    Kernel,
    Settings,
    collected,
    kernel,
    kind_mean,
    log_probability_change,
    mean_by_kind,
    measure,
    memory_needed,
    normalised,
    prompt_ids,
)
from dcr.analyses.ntk.exact import Batch, batches, gradient, last_logits
from dcr.analyses.ntk.subset import move, parameters, restored, still
