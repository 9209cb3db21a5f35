"""Thinking: a model writes a thought of at most `gen.thinking` tokens before each answer.

Here are the checks of that setting; `reasoning` makes the thoughts and counts what they say.
"""

from collections.abc import Iterator

from dcr.core.config.evaluation import EvalConfig


def relations(settings: EvalConfig) -> Iterator[str]:
    """The contradictions of `gen.thinking` with other settings."""
    if settings.gen.thinking is None:
        return
    named = f"gen.thinking={settings.gen.thinking}"
    if settings.endpoint is not None:
        yield (
            f"{named} endpoint={settings.endpoint}: gen.thinking does not reach a server; "
            "leave it out and set endpoint_parameters"
        )
    if settings.trainer.devices > 1:
        yield f"{named} trainer.devices={settings.trainer.devices}: one process thinks; give one"
    for name, value in settings.gen.contrast.items():
        yield f"{named} gen.{name}={value}: a contrast would reach into the thought; give one"
    for task in (*settings.table.on_weights, "frontier", "robustness"):
        if task in settings.tasks:
            yield f"{named} tasks=[{task}]: {task} reads prompts without thoughts; leave one out"
