"""AlpacaEval: how often a model's answers are preferred to a reference's, the STL run's.

Its settings and their checks; `win_rates` has the answers compared.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dcr.core.config.evaluation import EvalConfig
from dcr.resolving import cut_short


@dataclass
class QualityConfig:
    """AlpacaEval: win rate against the answers of a reference run, the STL run of this model."""

    reference: str | None = None  # the STL run's folder
    source: str = "alpaca_eval"  # of the instructions


def relations(settings: EvalConfig) -> Iterator[str]:
    """The contradictions of `tasks=[quality]` with other settings."""
    if "quality" not in settings.tasks:
        return
    yield from cut_short(settings, "tasks=[quality]")
    if settings.node(QualityConfig).reference is None:
        yield (
            "tasks=[quality]: needs answers to compare with; name the STL run of the same "
            "model, quality.reference=<run folder>"
        )
