"""Training that can be killed at any moment and goes on with the very next step.

Everything a step depends on is either in the checkpoint (trainable weights, optimiser, progress)
or a pure function of seed and step (batches, dropout), so a resumed run equals an uninterrupted
one bit for bit. A checkpoint is a file with its SHA-256 beside it; both appear whole or not at all.
"""

import hashlib
import logging
import math
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor
from torchmetrics import MeanMetric

from dcr.core import extending, machine, storage
from dcr.core.config import Precision, UserError
from dcr.core.config.training import Moments, Schedule
from dcr.core.models.training import gathered

log = logging.getLogger(__name__)

KEPT = 2  # the newest checkpoint and one to fall back on
PEER_LOST = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer")
LOWER = (
    "lower sft.micro_tokens, sft.max_len or dcr.batch_size, or set sft.gradient_checkpointing=true "
    "or dcr.adapter=lora"
)
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class TrainingError(UserError):
    """Training had to stop: the run folder keeps its last good checkpoint."""

    exit_code = 1


class Interrupted(UserError):
    """A signal asked training to stop, once a checkpoint is written, or at once when it repeats."""

    def __init__(self, number: int, how: str = "") -> None:
        stopped = f"stopped by {signal.Signals(number).name}{how}"
        super().__init__(f"{stopped}; the same command goes on from the last checkpoint")
        self.exit_code = 128 + number


@contextmanager
def faults_explained(cure: str = LOWER) -> Iterator[None]:
    """Running out of memory becomes a TrainingError with the cure, what to turn down.

    So does the end of another process of the job, which this one then waits for in vain.
    """
    try:
        yield
    except SystemExit as error:  # how Lightning ends after a Ctrl-C between its own steps
        raise KeyboardInterrupt from error
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        text = str(error) or type(error).__name__
        if ranks() > 1 and any(words in text for words in PEER_LOST):
            raise TrainingError(
                f"another process of this job does not answer, or ended ({text:.160}); the same "
                "command goes on from the last checkpoint"
            ) from error
        if not machine.is_out_of_memory(error):
            raise
        raise TrainingError(
            f"out of memory ({text.splitlines()[0][:120]}): {cure}; the last checkpoint is kept"
        ) from error


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def epoch_mean() -> MeanMetric:
    """The mean over an epoch, exact over uneven batches and ranks, where each value has a weight.

    It stands in checkpoints, so that an epoch resumed in its middle reports the mean of all of it.
    """
    # not "warn", which leaves a NaN out, or "disable", with which torchmetrics 1.9 has no weights
    mean = MeanMetric(nan_strategy="error")
    mean.persistent(True)
    return mean


class ResumableModule(LightningModule):
    """A module whose checkpoints hold trainable tensors and metric states alone.

    Attributes:
        step_loss: the key of the loss that the bar shows.
        arithmetic: of passes, which Lightning makes under autocast unless it is fp32.
        total_steps: of the whole stage.
        clip: the greatest norm of gradients, None for any.
        splits: whether its weights may be split over processes.
    """

    model: Any
    step_loss: str
    arithmetic: Precision
    total_steps: int
    clip: float | None = None
    splits = True

    def __init__(self) -> None:
        super().__init__()
        self.rows: tuple[str, ...] = ()  # ids of the rows in the current step
        self.faulty: tuple[str, ...] = ()  # those of this rank in it whose loss is not finite
        self.strict_loading = False  # frozen weights are absent; on_load_checkpoint checks the rest

    def recompute_blocks(self) -> None:
        """Keep a hidden state of each block for the backward pass, and compute the rest again."""
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def on_fit_start(self) -> None:
        # from_pretrained returns evaluation mode and Lightning would keep it
        self.model.train()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        parts = batch if isinstance(batch, list) else [batch]
        self.rows = tuple(name for part in parts for name in part.names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainable = self._trainable_names()
        with ExitStack() as stack:
            for _, metric in self.means():
                stack.enter_context(metric.sync_context())  # the sums of all ranks, not of one
            state = self.state_dict()
        for name in trainable:
            if not torch.isfinite(gathered(torch.linalg.vector_norm(state[name]))):
                raise TrainingError(f"{name} is not finite {self._where()}: no checkpoint written")
        kept = trainable | self._metric_names(state)
        checkpoint["state_dict"] = {name: state[name] for name in state if name in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        if missing := self._trainable_names() - state.keys():
            raise TrainingError(f"checkpoint lacks trainable weights: {sorted(missing)[:3]}")
        if self.global_rank > 0:  # rank 0 goes on with the sums of all
            for name in self._metric_names(state):
                del state[name]

    def _trainable_names(self) -> set[str]:
        return {name for name, weight in self.named_parameters() if weight.requires_grad}

    def means(self) -> list[tuple[str, MeanMetric]]:
        """All but those that keep every held-out row, of which there is none at a checkpoint."""
        return [(name, m) for name, m in self.named_modules() if isinstance(m, MeanMetric)]

    def _metric_names(self, state: Mapping[str, Any]) -> set[str]:
        prefixes = tuple(f"{name}." for name, _ in self.means())
        return {name for name in state if name.startswith(prefixes)}

    def _where(self, rows: tuple[str, ...] = ()) -> str:
        named = rows or self.rows
        more = f" and {len(named) - 8} more" if len(named) > 8 else ""
        return f"at step {self.global_step}, rows {', '.join(named[:8])}{more}"

    def checked(self, loss: Tensor, rows: tuple[str, ...]) -> Tensor:
        """The loss itself. Raises TrainingError with step and rows if it is not finite.

        Of several ranks none stops alone, for which the others would wait: all do before the step.
        """
        if not torch.isfinite(loss):
            if self.training and ranks() > 1:
                self.faulty += rows
                return loss
            self._stop(f"loss is {loss.item()}", rows)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises TrainingError, on every rank, before what is not finite reaches a weight."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        norm = gathered(torch.nn.utils.get_total_norm(grads)) if grads else torch.zeros(())
        if ranks() > 1:
            faulty: list[Any] = [()] * ranks()
            dist.all_gather_object(faulty, self.faulty)
            if rows := tuple(row for rows in faulty for row in rows):
                self._stop("loss is not finite", rows)
        if not torch.isfinite(norm):
            self._stop("gradient is not finite")

    def _stop(self, what: str, rows: tuple[str, ...] = ()) -> NoReturn:
        raise TrainingError(
            f"{what} {self._where(rows)}: lower the learning rate, or look at these rows; the last "
            "checkpoint is kept"
        )


SHAPES: dict[Schedule, Callable[[float], float]] = {
    Schedule.constant: lambda _: 1.0,
    Schedule.linear: lambda progress: max(0.0, 1.0 - progress),
    Schedule.cosine: lambda progress: 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))),
}


def rate_factor(schedule: Schedule, total: int, warmup: int) -> Callable[[int], float]:
    """The factor of the peak rate at step 0, 1, …: linear warm-up, then the shape.

    Step `s` of the warm-up has (s + 1) / (warmup + 1), so that no step is wasted at rate 0.
    """

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return SHAPES[schedule]((step - warmup) / max(1, total - warmup))

    return factor


def adamw(
    module: torch.nn.Module,
    lr: float,
    weight_decay: float,
    factor: Callable[[int], float],
    moments: Moments = Moments.full,
) -> dict[str, Any]:
    """AdamW over what trains, as Lightning wants it, its rate `lr` times `factor` of the step."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    # in one pass on a CPU: a third of the time, and no copies of the size of all that trains
    fused = all(weight.device.type == "cpu" for weight in trained)
    made: Any = partial(torch.optim.AdamW, fused=fused or None)
    if moments is Moments.int8:
        made = extending.part("int8_adamw")
    optimizer = made(trained, lr=lr, weight_decay=weight_decay)
    # or Lightning, with an eye to fp16, refuses to clip gradients before a fused step
    optimizer._step_supports_amp_scaling = False
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


def bit_sums(module: torch.nn.Module) -> list[int]:
    """A number for each trainable weight that changes with any of its bits."""
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    weights = (gathered(p.detach()) for p in module.parameters() if p.requires_grad)
    return [int(w.view(whole[w.element_size()]).sum(dtype=torch.int64)) for w in weights]


class StepSeed(Callback):
    """Makes chance inside a step (LoRA dropout) a function of seed, step and rank."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        key = f"{self.seed}/{trainer.global_step}/{trainer.global_rank}"
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big"))


@contextmanager
def saving(checkpoint: Path) -> Iterator[None]:
    """A checkpoint that cannot be written is a TrainingError with the reason."""
    try:
        yield
    except (UserError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
        reason = error.__cause__ if isinstance(error, UserError) else error
        why = getattr(reason, "strerror", None) or " ".join(str(reason).split())[:120]
        raise TrainingError(
            f"{checkpoint}: cannot be written ({why}); earlier checkpoints are intact"
        ) from error


class VerifiedCheckpointIO(CheckpointIO):
    """Atomic writes with a checksum; loads tensors and plain values only, never pickled code.

    Where weights are split over processes, an extension writes a checkpoint as a folder. It is read
    here as well, with tensors whole, or split as the weights of `module` are.
    """

    def __init__(self, module: Any) -> None:
        self.module = module

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        target = Path(path)
        with saving(target):
            self.remove_checkpoint(target)  # only a damaged one can be there
            with storage.replaced_file(target) as file:
                summed = _Summed(file)
                torch.save(checkpoint, summed)  # pyright: ignore[reportArgumentType]  # only writes
                # the sum first: a checkpoint without one does not count as written
                storage.write_text(_checksum_file(target), summed.digest.hexdigest())

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if Path(path).is_dir():
            return extending.part("sharded_checkpoint")(Path(path), self.module)
        return torch.load(path, map_location=map_location or "cpu", weights_only=True)

    def remove_checkpoint(self, path: str | Path) -> None:
        for place in (Path(path), _checksum_file(Path(path))):
            if place.is_dir():
                shutil.rmtree(place, ignore_errors=True)
            else:
                with suppress(OSError):
                    place.unlink()


class _Summed:
    """A file that adds up what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def _checksum_file(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".sha256")


def _is_whole(checkpoint: Path) -> bool:
    try:
        if checkpoint.is_dir():
            storage.check_checksums(checkpoint)
            return True
        known = _checksum_file(checkpoint).read_bytes().strip()
        return known == storage.sha256(checkpoint).encode()
    except (OSError, UserError):  # not there, not to be read, or another file's
        return False


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a stage that can be gone on from, None where none was written.

    A damaged one is passed over with a warning. Raises UserError when there is no other: the
    stage would silently start again.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file where checkpoints belong; delete it to start the stage")
    checkpoints = _files(folder)[::-1]
    for checkpoint in checkpoints:
        if _is_whole(checkpoint):
            return checkpoint
        log.warning("%s is damaged (its checksum differs): using the one before it", checkpoint)
    if checkpoints:
        raise UserError(f"{folder}: every checkpoint is damaged; delete the folder to restart")
    return None


class Checkpoints(Callback):
    """Writes a checkpoint every `every` optimiser steps and at epoch ends, and obeys signals.

    The step that ends an epoch gets its checkpoint only once validation is over and the epoch's
    means are logged, which is when the next epoch starts: Lightning would do neither on resuming.
    A signal ends training behind the step or the validation that it came in, with a checkpoint.
    """

    def __init__(self, folder: Path, every: int) -> None:
        self.folder, self.every = folder, every
        self.written = 0  # the newest step that has a checkpoint
        self.received: int | None = None
        self.stopping = False  # agreed upon by all ranks
        self.handlers: Mapping[int, Any] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.written = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            # set here, after Lightning has set its own
            self.handlers = {number: signal.signal(number, self._receive) for number in SIGNALS}
        if trainer.is_last_batch:
            # Resumed where an epoch starts: the loop over batches would take itself for finished.
            trainer.fit_loop.epoch_loop.restarting = False

    def _receive(self, number: int, _frame: Any) -> None:
        # Slurm sends several for one request; a person who asks twice cannot wait for the step
        if self.received is not None and "SLURM_JOB_ID" not in os.environ:
            raise Interrupted(number, " a second time, without another checkpoint")
        self.received = self.received or number

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        if not trainer.is_last_batch:
            self.save(trainer, due=trainer.global_step % self.every == 0)

    def on_train_batch_start(self, *_: Any, **__: Any) -> None:
        self._stop()  # no earlier: only now is the step before in the log

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, due=True)
        self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer, due=False)  # unless a signal came, the result itself is next
        self._stop()
        self.restore()

    def on_exception(self, *_: Any, **__: Any) -> None:
        self.restore()

    def save(self, trainer: Trainer, due: bool) -> None:
        """Write a checkpoint of the steps so far if it is `due` or a signal came."""
        # a signal may have reached some ranks only, and all must write together
        asked = self.received is not None
        self.stopping = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if (due or self.stopping) and trainer.global_step > self.written:
            self.written = trainer.global_step
            trainer.save_checkpoint(_file(self.folder, self.written), weights_only=False)
            self._prune(trainer)

    def _stop(self) -> None:
        if self.stopping:
            raise Interrupted(self.received or signal.SIGTERM)

    def _prune(self, trainer: Trainer) -> None:
        if trainer.is_global_zero:
            # a damaged one from before the restart may be newer and does not count
            whole = [file for file in _files(self.folder) if step_of(file) <= self.written]
            for old in whole[:-KEPT]:
                trainer.strategy.remove_checkpoint(old)

    def restore(self) -> None:
        """Give signals back to whoever had them before training."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.ckpt"


def _files(folder: Path) -> list[Path]:
    named = (file for file in folder.glob("step-*.ckpt") if re.fullmatch(r"step-\d+", file.stem))
    return sorted(named, key=step_of)


def step_of(checkpoint: Path | None) -> int:
    """The optimiser step a checkpoint was written after, 0 for none."""
    return int(checkpoint.stem.removeprefix("step-")) if checkpoint else 0
