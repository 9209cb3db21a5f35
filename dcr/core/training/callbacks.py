"""Callbacks of all stages: every logged value, a bar, and the end of a run without its folder."""

import logging
import math
import sys
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from tqdm import tqdm

from dcr.core import runs
from dcr.core.runs import Run
from dcr.core.storage import Lease

QUIET = (
    "in eval mode at the start of training",  # metrics and dropped blocks; ours is checked
    "dataloader is not resumable",  # its batches are a function of the step, so it is
    "does not have many workers",
    "across ranks is zero",  # all rows are learnt, and none is held out
    "smaller than the logging interval",
    "already been called",
    "`srun` command is available",  # on a cluster's login node
)


@contextmanager
def quiet() -> Iterator[None]:
    """Lightning without what no user of ours can act on."""
    chatter = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = chatter.level
    chatter.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for text in QUIET:
            warnings.filterwarnings("ignore", message=f".*{text}.*")
        try:
            yield
        finally:
            chatter.setLevel(before)


class RunLogger(Logger):
    """Appends every logged value to the run's `metrics.csv`, one row a value.

    Long rows, not wide ones, so that new keys and resumed runs never rewrite what is there.
    """

    def __init__(self, run: Run, stage: str) -> None:
        super().__init__()
        self.run, self.stage = run, stage

    @property
    def name(self) -> str:
        return "run"

    @property
    def version(self) -> str:
        return self.stage

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        epoch = int(metrics.get("epoch", 0))
        rows = [
            (self.stage, int(step or 0), epoch, key, float(value))
            for key, value in metrics.items()
            if key != "epoch" and math.isfinite(value)  # unlike a mean over rows of no kind
        ]
        runs.append_metrics(self.run, rows)

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        """Nothing: the whole configuration stands in `config.yaml`."""


def bar(called: str, total: int, unit: str = "step", done: int = 0, shown: bool = True) -> tqdm:
    """The bar of a stage or of its preparation."""
    return tqdm(
        desc=called,
        total=total,
        initial=done,
        unit=unit,
        disable=not shown,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file keeps every line
    )


class Progress(Callback):
    """One bar for a whole stage, resumed or not: steps done, time left and loss."""

    def __init__(self, stage: str, total: int, loss: str) -> None:
        self.stage, self.total, self.loss = stage, total, loss
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        done, shown = trainer.global_step, trainer.is_global_zero
        self.bar = bar(self.stage, self.total, done=done, shown=shown)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if self.bar is not None:
            loss = float(trainer.callback_metrics[self.loss])
            self.bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            self.bar.update()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._describe(f"{self.stage}, held-out rows")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._describe(self.stage)

    def _describe(self, text: str) -> None:
        if self.bar is not None and sys.stderr.isatty():
            self.bar.set_description(text)

    def _close(self, *_: Any, **__: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    on_train_end = on_exception = _close


class FolderGuard(Callback):
    """Stops a process whose run folder was deleted, perhaps for another process to write into."""

    def __init__(self, lease: Lease) -> None:
        self.lease = lease

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.lease.check()
