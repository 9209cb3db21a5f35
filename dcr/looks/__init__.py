"""Looks at the rows kept apart for `data=final`: each needs a plan, and each is counted.

The settings and their checks; `counting` reads plans and keeps the ledger.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dcr.core.config.evaluation import EvalConfig

SUFFIX = "_final"  # of the names of sources that are kept apart


@dataclass
class FinalConfig:
    """The plan that a look at the rows kept apart needs."""

    plan: str | None = None  # a YAML file, whose keys docs/evidence.md lists


def relations(settings: EvalConfig) -> Iterator[str]:
    """The contradictions of `final.plan` with the sets."""
    evaluated = (*settings.data.evaluation.over_refusal, *settings.data.evaluation.safety)
    kept = [name for name in evaluated if name.endswith(SUFFIX)]
    plan = settings.node(FinalConfig).plan
    if kept and plan is None:
        yield (
            f"data.evaluation: {kept[0]} is reserved for evaluation under a plan; write one "
            "(docs/evidence.md) and give final.plan=<file>, or choose data=test"
        )
    if plan is not None and not kept:
        yield f"final.plan={plan}: none of the sets is reserved for a plan; choose data=final"
