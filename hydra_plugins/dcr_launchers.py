"""The launchers of `dcr.launching` for Hydra, which looks for plugins in this package alone.

Every Hydra program in this environment reads this file when it starts, so it imports little.
"""

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class CommandLauncher(Launcher):
    """Each job of a sweep as a command of its own."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        self.context, self.config = hydra_context, config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        from dcr import launching

        return launching.launch(self.context, self.config, job_overrides, self.options)
