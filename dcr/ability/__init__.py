"""General ability, by the lm-evaluation-harness: its settings; `scores` runs the harness."""

from dataclasses import dataclass, field

from dcr.resolving import not_negative, ranged


@dataclass
class AbilityConfig:
    """Tasks of the lm-evaluation-harness: ours from `data.root` where it holds them."""

    # Any tasks of the harness.
    tasks: list[str] = field(
        default_factory=lambda: ["mmlu", "arc_easy", "arc_challenge", "openbookqa", "piqa"]
    )
    # worked examples before each question
    shots: int = ranged(0, not_negative, "give 0 or more examples")
    limit: int | None = None  # questions a task, or a subject of MMLU; null: all
    batch_size: int = 16  # questions at once
