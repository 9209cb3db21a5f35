"""Every prompt that a command needs, read before a model is opened."""

from collections.abc import Mapping
from dataclasses import dataclass

from dcr import analyses, benchmarks, refusal, steering
from dcr.benchmarks import Benchmark
from dcr.config import EvalConfig, Kind, Task
from dcr.sources import Example

ON_KINDS = {Task.refusal_probability, Task.kernel, Task.separability, Task.claims}


@dataclass(frozen=True)
class Prompts:
    """The sets that a model answers, all rows of the analyses by kind, and pairs that refuse.

    The latter two are empty where no task needs them.
    """

    sets: list[Benchmark]
    kinds: Mapping[Kind, list[Example]]
    refused: list[Example]


def read(settings: EvalConfig) -> Prompts:
    """What the tasks ask and measure with; UserError for whatever is wrong with the data."""
    tasks, data = set(settings.tasks), settings.data
    return Prompts(
        _sets(settings),
        analyses.every(data) if tasks & ON_KINDS else {},
        analyses.refused_pairs(data, settings.seed, refusal.is_refusal)
        if Task.claims in tasks
        else [],
    )


def _sets(settings: EvalConfig) -> list[Benchmark]:
    """The prompts of every task that has a model answer prompts."""
    if settings.steering.validation:
        return _validation(settings)
    found = benchmarks.read(settings.tasks, settings.data, settings.limit, settings.seed)
    if Task.quality in settings.tasks:
        source = settings.quality.source
        found.append(
            benchmarks.read_set(
                source, Kind.normal, settings.data.root, settings.limit, settings.seed
            )
        )
    return found


def _validation(settings: EvalConfig) -> list[Benchmark]:
    """The prompts that extraction leaves, the same first ones for every method of steering."""
    left = steering.extraction(settings.data, settings.steering, settings.seed)
    return [
        Benchmark(f"validation_{name}", kind, rows[: settings.limit])
        for name, kind, rows in (
            ("seemingly_toxic", Kind.seemingly_toxic, left.validation_seemingly_toxic),
            ("harmful", Kind.toxic, left.validation_harmful),
        )
    ]
