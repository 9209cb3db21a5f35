"""The empirical neural tangent kernel between prompts (Section 5 and A.6 of the paper).

`empirical` measures a kernel, also by the paper's finite differences, and averages its matrix;
`subset` finds the parameters; `exact` has the exact scheme.
"""

from dcr.analyses.ntk.empirical import (
    Kernel,
    Settings,
    collected,
    kernel,
    kind_mean,
    label,
    log_probability_change,
    mean_by_kind,
    measure,
    normalised,
    prompt_ids,
)
from dcr.analyses.ntk.exact import Batch, batches, gradient, last_logits
from dcr.analyses.ntk.subset import move, parameters, restored, still
