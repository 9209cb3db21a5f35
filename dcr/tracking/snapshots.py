"""The adapters that SFT left on its way, as subjects of an evaluation."""

from dcr.core.config import ConfigError
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation.subjects import Local, local
from dcr.core.runs import Run


def subjects(settings: EvalConfig, run: Run) -> list[Local]:
    """The snapshots of a run, or those of the steps named. ConfigError for one that it lacks."""
    saved = {int(f.name.removeprefix("step-")): f for f in sorted(run.snapshots.glob("step-*"))}
    if not saved:
        raise ConfigError(
            f"run={run.folder}: holds no snapshots; train with tracking.snapshots=<number>"
        )
    wanted = saved if settings.steps is None else dict.fromkeys(settings.steps)
    if missing := [step for step in wanted if step not in saved]:
        raise ConfigError(
            f"steps={settings.steps}: {run.folder} holds no snapshot of step {missing[0]}; choose "
            f"from {', '.join(map(str, saved))}"
        )
    return [local(settings, run, "snapshot", saved[step], step) for step in wanted]
