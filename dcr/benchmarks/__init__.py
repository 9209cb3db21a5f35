"""What is asked and how it is counted: over-refusal, safety, general ability, answer quality.

`sets` names the prompts of a task, `completing` has them answered, `scoring` counts the answers,
`ability` runs the real lm-evaluation-harness and `quality` the pairwise annotator.
"""

from dcr.benchmarks.completing import complete
from dcr.benchmarks.scoring import RULES, is_foreign, is_repetitive, score
from dcr.benchmarks.sets import (
    APART,
    PAIRS,
    PAPER_OVER_REFUSAL,
    PAPER_SAFETY,
    Benchmark,
    pairs_of,
    read,
    read_set,
    set_name,
)

__all__ = [
    "APART",
    "PAIRS",
    "PAPER_OVER_REFUSAL",
    "PAPER_SAFETY",
    "RULES",
    "Benchmark",
    "complete",
    "is_foreign",
    "is_repetitive",
    "pairs_of",
    "read",
    "read_set",
    "score",
    "set_name",
]
