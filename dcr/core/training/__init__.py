"""The parts that train any stage: its batches, Lightning's trainer, and the result at the end.

`stages` has those of the paper; `resuming` holds what their modules share and makes training go on
after a kill, and `callbacks` leaves logs.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from lightning import Callback, LightningDataModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch.utils.data import DataLoader

from dcr.core import extending, models, prompts, runs
from dcr.core.config import Precision, Stage
from dcr.core.config.training import FSDP, TrainConfig, TrainerConfig
from dcr.core.data import Splits
from dcr.core.data.rows import BATCHES, Batch, StageRows
from dcr.core.models import Policy, structure
from dcr.core.models.training import trained_weights
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.storage import Lease
from dcr.core.training import callbacks, resuming
from dcr.core.training.callbacks import RunLogger

log = logging.getLogger(__name__)

# What extensions may add, by the names that `config.TrainTable` gives them.
# Trains a stage behind those of the core.
Train = Callable[["Job"], None]
# Measures on a model, before it trains, the block whose states stage one should read.
FindLayer = Callable[[TrainConfig], int]
# Makes the callbacks that measure while a stage of so many steps trains, called before ours.
Watched = Callable[[Run, Stage, Policy, ChatFormat, int], list[Callback]]
Watch = Callable[[TrainConfig], Watched]
# Opens loggers for the stages of a run, and gives them with a function that is told of each result.
Show = Callable[
    [TrainConfig, Run], AbstractContextManager[tuple[list[Logger], Callable[[str], None] | None]]
]

LIGHTNING_PRECISION = {
    Precision.mixed: "bf16-mixed",
    Precision.bf16: "bf16-mixed",
    Precision.fp32: "32-true",
}


@dataclass(frozen=True)
class Job:
    """The parts that all stages of one command share."""

    settings: TrainConfig
    run: Run
    rows: Splits
    block: int
    lease: Lease | None  # None in processes that help another one with its run folder
    loggers: list[Logger]
    watched: Watched | None = None  # None where nothing is measured meanwhile


class Feed(NamedTuple):
    """The rows of a stage, what is drawn of them as a step's batches, and held-out rows as one."""

    rows: Any
    of_step: Callable[..., Any]
    of_heldout: Callable[..., Batch]


class SafetyData(LightningDataModule):
    """Batches of one stage, for its LightningModule.

    Stage one yields PromptBatch, SFT a list of PairBatch (the micro-batches of one step), each of
    this rank's part of the rows. Called like `StageRows`, with its errors; the stage of an
    extension brings its `feed`.
    """

    def __init__(
        self,
        stage: Stage,
        rows: Splits,
        chat: ChatFormat,
        settings: TrainConfig,
        context: int | None = None,
        feed: Feed | None = None,
    ) -> None:
        super().__init__()
        if feed is None:
            feed = Feed(StageRows(stage, rows, chat, settings, context), *BATCHES[stage])
        self.rows, self.of_step, self.of_heldout = feed
        self.rows.sharded = settings.trainer.strategy == FSDP
        self.sampler = self.rows.sampler

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps of one epoch, the same on every rank."""
        return len(self.sampler)

    def train_dataloader(self) -> DataLoader:
        rows, trainer = self.rows, self.trainer
        if trainer is not None:
            self.sampler.start = trainer.global_step
            rows.rank, rows.world = trainer.global_rank, trainer.world_size
        step = partial(self.of_step, rows)
        # what has a length and items is a dataset to torch
        return DataLoader(rows.drawn, batch_sampler=self.sampler, collate_fn=step)

    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        passes = self.heldout()
        return DataLoader(passes, batch_size=None) if passes else []  # pyright: ignore[reportArgumentType]

    def heldout(self) -> list[Any]:
        """The batches of held-out rows, whole on every rank."""
        return [self.of_heldout(rows, self.rows.pad) for rows in self.rows.heldout_passes]


def batches_of(
    job: Job, stage: Stage, policy: Policy, chat: ChatFormat, feed: Feed | None = None
) -> SafetyData:
    """The batches of a stage, whose base is recorded, or found to be the one that was."""
    if job.lease:
        extending.part("claim_start")(job.run, stage, policy, job.settings.force)
    context = models.facts(job.settings.model).context
    return SafetyData(stage, job.rows, chat, job.settings, context, feed)


def chat_of_answers(job: Job, policy: Policy) -> ChatFormat:
    output_rows = structure.head(policy.model).weight.detach()
    terminator = job.settings.sft.terminator
    return prompts.chat_format(policy.tokenizer, job.settings.model, terminator, output_rows)


def fit(
    job: Job,
    stage: Stage,
    module: resuming.ResumableModule,
    policy: Policy,
    chat: ChatFormat,
    batches: SafetyData,
    save: Callable[[dict[str, Tensor]], None],
) -> None:
    """Trains a stage to its end, from the newest checkpoint on, and saves its result.

    The first process calls `save` with all trained weights, see `trained_weights`; checkpoints are
    gone behind that. Raises TrainingError where no weight moved.
    """
    settings, options, folder = job.settings, job.settings.trainer, job.run.checkpoints(stage.value)
    checkpoint = resuming.newest_checkpoint(folder)
    step, total = resuming.step_of(checkpoint), module.total_steps
    if checkpoint:
        log.info("%s: going on after step %d of %d", stage.value, step, total)
    if job.lease:
        runs.forget_metrics_beyond(job.run, stage.value, step)
    bar = callbacks.Progress(stage.value, total, module.step_loss)
    trainer = lightning_trainer(
        settings,
        job.run,
        stage.value,
        module,
        module.arithmetic,
        loggers=job.loggers,
        strategy=_strategy(options, module),
        max_epochs=total // batches.steps_per_epoch,
        callbacks=[
            *(job.watched(job.run, stage, policy, chat, total) if job.watched else []),
            *([bar] if options.progress else []),
            resuming.StepSeed(settings.seed),
            *([callbacks.FolderGuard(job.lease)] if job.lease else []),
            # last, when a step's other traces are there
            resuming.Checkpoints(folder, options.checkpoint_every_n_steps),
        ],
        gradient_clip_val=module.clip,
    )
    start = resuming.bit_sums(module)
    with resuming.faults_explained():
        trainer.fit(module, datamodule=batches, ckpt_path=checkpoint, weights_only=True)
    if job.lease:
        job.lease.check()
    if resuming.bit_sums(module) == start:
        raise resuming.TrainingError(
            f"{stage.value}: no weight moved in {total} steps: the learning rate is too small for "
            "the weights' precision, or every gradient was zero (all pairs beyond the margin, and "
            "no NLL term)"
        )
    trained = trained_weights(policy.model)
    if trainer.is_global_zero:
        save(trained)
        forget_checkpoints(job.run, stage)
    trainer.strategy.barrier()  # no process opens a result that another is still writing


def lightning_trainer(
    settings: TrainConfig,
    run: Run,
    name: str,
    module: resuming.ResumableModule,
    precision: Precision,
    *,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger] = (),
    **more: Any,
) -> Trainer:
    """Lightning's Trainer with what all training has in common, whose logs are under `name`."""
    options = settings.trainer
    plugins: list[Any] = [resuming.VerifiedCheckpointIO(module)]
    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        # as Lightning would choose, without requeueing, whose checkpoint can fall into the middle
        # of a step: `resuming.Checkpoints` obeys the signal
        plugins.append(SLURMEnvironment(auto_requeue=False))
    return Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        precision=LIGHTNING_PRECISION[precision],  # pyright: ignore[reportArgumentType]
        # a signal is obeyed within a step, which may take minutes
        callbacks=[extending.part("within_step")(), *callbacks],
        logger=[RunLogger(run, name), *loggers],
        plugins=plugins,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=str(run.folder),
        **more,
    )


def _strategy(options: TrainerConfig, module: resuming.ResumableModule) -> str | Strategy:
    if options.strategy != FSDP:
        return options.strategy
    processes = options.devices * options.num_nodes
    return extending.part("sharding")(processes) if module.splits else "auto"


def forget_checkpoints(run: Run, stage: Stage) -> None:
    shutil.rmtree(run.checkpoints(stage.value), ignore_errors=True)
