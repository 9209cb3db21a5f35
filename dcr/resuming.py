"""Training that can be killed at any moment and goes on with the very next step.

Everything a step depends on is either in the checkpoint (trainable weights, optimiser, progress)
or a pure function of seed and step (batches, dropout), so a resumed run equals an uninterrupted
one bit for bit. A checkpoint is a file with its SHA-256 beside it; both appear whole or not at all.
"""

import hashlib
import logging
import os
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torchmetrics import Metric

from dcr.config import UserError

log = logging.getLogger(__name__)

KEPT = 2  # the newest checkpoint and one to fall back on
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


class TrainingError(UserError):
    """Training had to stop: the run folder keeps its last good checkpoint."""

    exit_code = 1


class Interrupted(UserError):
    """A signal asked training to stop; a checkpoint was written first."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after a checkpoint; the same command goes on from it")
        self.exit_code = 128 + number


class ResumableModule(LightningModule):
    """A module whose checkpoints hold trainable tensors and metric states alone."""

    model: Any

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False  # frozen weights are absent; on_load_checkpoint checks the rest

    def keep_metrics_in_checkpoints(self) -> None:
        """An epoch resumed in its middle still reports the mean over all of its steps."""
        for metric in self.modules():
            if isinstance(metric, Metric):
                metric.persistent(True)

    def on_fit_start(self) -> None:
        # from_pretrained returns evaluation mode and Lightning would keep it
        self.model.train()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        kept = self._kept_names()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: state[name] for name in state if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        missing = self._trainable_names() - checkpoint["state_dict"].keys()
        if missing:
            raise TrainingError(f"checkpoint lacks trainable weights: {sorted(missing)[:3]}")

    def _trainable_names(self) -> set[str]:
        return {name for name, weight in self.named_parameters() if weight.requires_grad}

    def _kept_names(self) -> set[str]:
        metrics = [n for n, module in self.named_modules() if isinstance(module, Metric)]
        of_metrics = {
            name
            for name in self.state_dict()
            if any(name.startswith(f"{metric}.") for metric in metrics)
        }
        return self._trainable_names() | of_metrics

    def checked(self, loss: Tensor, rows: tuple[str, ...]) -> Tensor:
        """The loss itself. Raises TrainingError with step and rows if it is not finite."""
        if not torch.isfinite(loss):
            raise TrainingError(
                f"loss is {float(loss)} at step {self.global_step}, rows {', '.join(rows[:8])}"
            )
        return loss

    def check_gradients(self) -> None:
        """Raises TrainingError before a gradient that is not finite reaches a weight."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if grads and not torch.isfinite(torch.nn.utils.get_total_norm(grads)):
            raise TrainingError(
                f"gradient is not finite at step {self.global_step}: lower the learning rate"
            )

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.check_gradients()


class StepSeed(Callback):
    """Makes chance inside a step (LoRA dropout) a function of seed, step and rank."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        key = f"{self.seed}/{trainer.global_step}/{trainer.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


class VerifiedCheckpointIO(CheckpointIO):
    """Atomic writes with a checksum; loads tensors and plain values only, never pickled code."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        target = Path(path)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".writing-", dir=target.parent)
        except OSError as error:
            raise TrainingError(f"{target}: cannot be written ({error.strerror})") from error
        try:
            with os.fdopen(handle, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            # the sum first: a checkpoint without one does not count as written
            _checksum_file(target).write_text(_sha256(Path(name)))
            os.replace(name, target)
        except OSError as error:
            raise TrainingError(f"{target}: cannot be written ({error.strerror})") from error
        finally:
            Path(name).unlink(missing_ok=True)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
        _checksum_file(Path(path)).unlink(missing_ok=True)


def _checksum_file(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".sha256")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(checkpoint: Path) -> bool:
    sums = _checksum_file(checkpoint)
    return sums.exists() and sums.read_text().strip() == _sha256(checkpoint)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a stage that is whole, None where none was written.

    A damaged one is passed over with a warning. Raises TrainingError when all are damaged: the
    stage would silently start again.
    """
    found = sorted(folder.glob("step-*.ckpt"), reverse=True)
    for checkpoint in found:
        if _is_whole(checkpoint):
            return checkpoint
        log.warning("%s is damaged (its checksum differs): using the one before it", checkpoint)
    if found:
        raise TrainingError(f"{folder}: every checkpoint is damaged; delete the folder to restart")
    return None


class Checkpoints(Callback):
    """Writes a checkpoint every `every` optimiser steps, and before it gives in to a signal."""

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.received: int | None = None
        self.handlers: Mapping[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # set here, after Lightning has set its own
        self.handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def _receive(self, number: int, _frame: Any) -> None:
        if self.received is not None:  # asked twice: stop without waiting for the step's end
            raise KeyboardInterrupt
        self.received = number

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step % self.every == 0 or self.received is not None:
            trainer.save_checkpoint(self.folder / f"step-{step:06d}.ckpt")
            self._prune(trainer)
        if self.received is not None:
            raise Interrupted(self.received)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            for old in sorted(self.folder.glob("step-*.ckpt"))[:-KEPT]:
                trainer.strategy.remove_checkpoint(old)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}


def step_of(checkpoint: Path | None) -> int:
    """The optimiser step a checkpoint was written after, 0 for none."""
    return int(checkpoint.stem.removeprefix("step-")) if checkpoint else 0
