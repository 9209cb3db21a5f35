"""The stages of a run folder, each from the weights it starts from to its result.

`contrastive` and `sft` hold the training steps; `resuming` holds what they share and makes training
go on after a kill, and `callbacks` leaves logs.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning import Callback, LightningDataModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.utils.data import DataLoader

from dcr.core import continuing, extending, learning, models, prompts, runs, storage
from dcr.core.config import ConfigError, LoraConfig, Method, Precision, Quantization, Stage
from dcr.core.config.training import FSDP, Adapter, TrainConfig, TrainerConfig, block_of
from dcr.core.data import Splits
from dcr.core.data.rows import BATCHES, Batch, StageRows, check_lengths
from dcr.core.models import Policy, structure
from dcr.core.models.training import is_sharded, save_adapter, save_full, skeleton, trained_weights
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.storage import Lease
from dcr.core.training import callbacks, resuming
from dcr.core.training.callbacks import RunLogger
from dcr.core.training.contrastive import ContrastiveModule
from dcr.core.training.sft import SFTModule

log = logging.getLogger(__name__)

# What extensions may add, by the names that `config.TrainTable` gives them.
# Adds to a run's `rows.json`, and gives a line for each thing to warn of.
Examine = Callable[[Splits], tuple[Mapping[str, Any], list[str]]]
# Trains a stage behind those of the core.
Train = Callable[["Job"], None]
# Measures on a model, before it trains, the block whose states stage one should read.
FindLayer = Callable[[TrainConfig], int]
# Makes the callbacks that measure while a stage of so many steps trains, called before ours.
Watched = Callable[[Run, Stage, Policy, ChatFormat, int], list[Callback]]
Watch = Callable[[TrainConfig], Watched]
# Makes a callback that ends training within a step for what the last callback, `Checkpoints`, has
# received.
Stop = Callable[[], Callback]
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


def check(settings: TrainConfig, rows: Splits, wanted: Sequence[Stage]) -> None:
    """Finds before any stage trains what would stop one half-way.

    Raises ConfigError for LoRA targets that match nothing, for a model or a template that cannot
    be, and where no training pair fits, and DataError for a prompt longer than the context or a
    conversation that the template refuses.
    """
    facts, first, sft = models.facts(settings.model), settings.dcr, settings.sft
    chat = prompts.chat_format(models.open_tokenizer(settings.model), settings.model)
    for part in rows.parts().values():
        chat.check(part)
    if Stage.contrastive in wanted:
        if settings.trainer.strategy == FSDP:
            extending.part("check_sharding")(first, facts)
        if first.adapter is Adapter.lora:
            _check_targets(settings, first.lora, block_of(first, facts.depth))
        StageRows(Stage.contrastive, rows, chat, settings, facts.context)
    if Stage.sft in wanted:
        _check_targets(settings, sft.lora)
        check_lengths(chat, rows, sft, facts.context)


def _check_targets(settings: TrainConfig, lora: LoraConfig, blocks: int | None = None) -> None:
    with callbacks.quiet():
        structure.add_lora(skeleton(settings.model), lora, settings.seed, blocks=blocks)


def train_contrastive(job: Job) -> None:
    """Stage one: from the base model to `contrastive/`."""
    settings, run = job.settings, job.run
    policy = _contrastive_start(job)
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    batches = batches_of(job, Stage.contrastive, policy, chat)
    total = batches.steps_per_epoch * settings.dcr.epochs
    module = ContrastiveModule(policy, settings.dcr, job.block, total)
    light = learning.current().shrink_frozen(
        policy.model, job.block, whole=module.anchored, settings=settings
    )
    trainer = fit(job, Stage.contrastive, module, policy, chat, batches, total)
    trained = trained_weights(policy.model)
    if trainer.is_global_zero:
        if light or structure.is_quantised(policy.model) or is_sharded(policy.model):
            policy = _contrastive_start(job, whole=True)  # no whole weights are here
            policy.model.load_state_dict(trained, strict=False)
        if settings.dcr.adapter is Adapter.lora:
            policy = Policy(policy.model.merge_and_unload(), policy.tokenizer, policy.name)
        save_full(policy, run.stage("contrastive"))
    end(job, Stage.contrastive, trainer)


def train_sft(job: Job) -> None:
    """Stage two: from the base model (STL, STL-aug) or `contrastive/` (DCR) to `sft/`."""
    settings, run = job.settings, job.run
    policy = _sft_start(job)
    chat = chat_of_answers(job, policy)
    batches = batches_of(job, Stage.sft, policy, chat)
    if batches.rows.too_long:
        log.warning(
            "%d pairs have no room for a response within sft.max_len=%d and were left out",
            len(batches.rows.too_long),
            settings.sft.max_len,
        )
    total = batches.steps_per_epoch * settings.sft.epochs
    module = SFTModule(policy, settings.sft, total)
    trainer = fit(job, Stage.sft, module, policy, chat, batches, total)
    trained = trained_weights(policy.model)
    if trainer.is_global_zero:
        save_adapter(policy, run.stage("sft"), policy.name, trained)
    end(job, Stage.sft, trainer)


def batches_of(
    job: Job, stage: Stage, policy: Policy, chat: ChatFormat, feed: Feed | None = None
) -> SafetyData:
    """The batches of a stage, whose base is recorded, or found to be the one that was."""
    if job.lease:
        name, commit = Path(policy.name), getattr(policy.model.config, "_commit_hash", None)
        weights = storage.weights_fingerprint(name) if name.is_dir() else f"{policy.name}@{commit}"
        continuing.claim_base(job.run, stage.value, weights, job.settings.force)
    context = models.facts(job.settings.model).context
    return SafetyData(stage, job.rows, chat, job.settings, context, feed)


def chat_of_answers(job: Job, policy: Policy) -> ChatFormat:
    output_rows = structure.head(policy.model).weight.detach()
    terminator = job.settings.sft.terminator
    return prompts.chat_format(policy.tokenizer, job.settings.model, terminator, output_rows)


def _contrastive_start(job: Job, whole: bool = False) -> Policy:
    """The base model as the stage trains it, or whole for a result.

    A result of weights in four bits adds what was trained to the weights in full: to the rounded
    ones it would be lost where SFT rounds again, since each stands on a step of the grid.
    """
    settings = job.settings
    model = replace(settings.model, quantization=Quantization.none) if whole else settings.model
    policy = models.open_policy(model, settings.dcr.precision)
    if settings.dcr.adapter is not Adapter.lora:
        return policy
    adapted = structure.add_lora(policy.model, settings.dcr.lora, settings.seed, blocks=job.block)
    return Policy(adapted, policy.tokenizer, policy.name)


def _sft_start(job: Job) -> Policy:
    settings = job.settings
    if settings.method is not Method.dcr:
        policy = models.open_policy(settings.model, settings.sft.precision)
    else:
        policy = models.open_folder(
            str(job.run.stage("contrastive")),
            settings.sft.precision,
            trust_remote_code=settings.model.trust_remote_code,
            quantization=settings.model.quantization,
        )
    adapted = structure.add_lora(policy.model, settings.sft.lora, settings.seed)
    return Policy(adapted, policy.tokenizer, policy.name)


def fit(
    job: Job,
    stage: Stage,
    module: resuming.ResumableModule,
    policy: Policy,
    chat: ChatFormat,
    batches: SafetyData,
    total: int,
) -> Trainer:
    """Train to the end, from the newest checkpoint on; the checkpoints are left until `end`.

    Raises TrainingError where no weight moved.
    """
    settings, options, folder = job.settings, job.settings.trainer, job.run.checkpoints(stage.value)
    checkpoint = resuming.newest_checkpoint(folder)
    step = resuming.step_of(checkpoint)
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
    return trainer


def end(job: Job, stage: Stage, trainer: Trainer) -> None:
    """The stage is done: its result is written."""
    if trainer.is_global_zero:
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
    stop: Stop | None = extending.ours(settings.table.stopping)
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
        callbacks=[*([stop()] if stop else []), *callbacks],
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


TRAIN: dict[Stage, Train] = {Stage.contrastive: train_contrastive, Stage.sft: train_sft}


def train_stage(stage: Stage, job: Job) -> None:
    """From the weights that a stage starts from to its result."""
    train: Train = TRAIN.get(stage) or extending.ours(job.settings.table.stages[stage.value])
    train(job)
