"""Train: config -> stages -> run folder.

python train.py model=llama3_8b stage=contrastive
python train.py -m dcr.epochs=1,2,3,5
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import hydra
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from dcr import (
    cli,
    config,
    dashboard,
    data,
    models,
    plan,
    prompts,
    refusal,
    resuming,
    runs,
    tracking,
)
from dcr.config import (
    Adapter,
    ConfigError,
    Method,
    NLLSource,
    Precision,
    Stage,
    TrainConfig,
)
from dcr.contrastive import ContrastiveModule
from dcr.data import SafetyData, Splits
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.runs import Lease, Run
from dcr.sft import SFTModule

log = logging.getLogger(__name__)

STAGES = {
    (Method.dcr, Stage.all): (Stage.contrastive, Stage.sft),
    (Method.dcr, Stage.contrastive): (Stage.contrastive,),
    (Method.dcr, Stage.sft): (Stage.sft,),
    (Method.stl, Stage.all): (Stage.sft,),
    (Method.stl, Stage.sft): (Stage.sft,),
    (Method.stl_aug, Stage.all): (Stage.sft,),
    (Method.stl_aug, Stage.sft): (Stage.sft,),
}
LIGHTNING_PRECISION = {
    Precision.mixed: "bf16-mixed",
    Precision.bf16: "bf16-mixed",
    Precision.fp32: "32-true",
}
STEP_LOSS = {Stage.contrastive: "contrastive/step_circle", Stage.sft: "sft/step_nll"}


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@cli.job
def main(composed: DictConfig) -> None:
    settings = config.resolve(composed, TrainConfig)
    if settings.plan:
        print(plan.describe(settings))
    else:
        train(settings, Run(cli.output_folder()))


@dataclass(frozen=True)
class Job:
    """What the stages of one command share."""

    settings: TrainConfig
    run: Run
    rows: Splits
    block: int
    lease: Lease | None  # None in processes that help another one with its run folder
    loggers: list[Logger]
    watched: tracking.Watched | None = None


def train(settings: TrainConfig, run: Run) -> None:
    """Run the stages of a method in a run folder, going on from whatever is done there.

    Raises UserError for anything a user can mend, before weights are loaded where it can be known,
    TrainingError when training had to stop and Interrupted after a signal.
    """
    _check_devices(settings)
    config.block_of(settings.dcr, models.facts(settings.model).depth)
    stages = STAGES[settings.method, settings.stage]
    rows = data.split(
        settings.data,
        settings.dcr.ratio,
        settings.seed,
        contrastive=settings.method is Method.dcr,
        refuses=refusal.is_refusal,
        augment=settings.stl_aug if settings.method is Method.stl_aug else None,
    )
    watched = tracking.watched(settings.tracking, settings.data, settings.seed)
    _check_input(settings, run, stages, rows)
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    with tracking.quiet(), _claimed(settings, run, rows) as lease, _wandb(settings, run) as loggers:
        job = Job(settings, run, rows, _block(settings, run), lease, loggers, watched)
        for stage in stages:
            if run.done(stage.value):
                log.info("%s: done in %s, skipped", stage.value, run.stage(stage.value))
                _forget_checkpoints(run, stage)  # left by a kill right after the result was saved
            else:
                TRAIN[stage](job)
    if _leads():
        print(run.folder)


def _block(settings: TrainConfig, run: Run) -> int:
    """The block that stage one reads; with `auto` measured once and kept in the run folder."""
    if settings.dcr.layer != config.AUTO_LAYER or settings.method is not Method.dcr:
        return config.block_of(settings.dcr, models.facts(settings.model).depth)
    if run.layer_file.is_file():
        return json.loads(run.layer_file.read_text())["block"]
    from dcr import choice

    block = choice.best_layer(settings)
    if _leads():
        runs.write_json(run.layer_file, {"block": block})
    return block


def _leads() -> bool:
    """Whether this process is the first of the job's, the one that writes."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _check_devices(settings: TrainConfig) -> None:
    options, found = settings.trainer, torch.cuda.device_count()
    wants_gpu = options.accelerator in ("gpu", "cuda")
    if wants_gpu and found < options.devices:
        raise ConfigError(
            f"trainer.accelerator={options.accelerator} trainer.devices={options.devices}: this "
            f"machine has {found} GPUs; lower trainer.devices or use trainer.accelerator=cpu"
        )
    if options.devices * options.num_nodes > 1 and cli.is_sweep():
        raise ConfigError(
            f"trainer.devices={options.devices} in a sweep: its processes would run the whole "
            "sweep again; use one device a job, or run the jobs one by one"
        )


def _check_input(settings: TrainConfig, run: Run, stages: tuple[Stage, ...], rows: Splits) -> None:
    missing = Stage.contrastive not in stages and not run.done("contrastive")
    if settings.method is Method.dcr and missing:
        raise ConfigError(
            f"stage=sft: {run.folder} holds no contrastive/ to start from; run stage=contrastive "
            "or stage=all with the same settings first"
        )
    anchor = settings.dcr.nll
    anchored = anchor.source is NLLSource.general and anchor.weight > 0
    if Stage.contrastive in stages and anchored and not rows.normal:
        raise ConfigError("dcr.nll.source=general: data.normal.source has no rows; name another")


@contextmanager
def _claimed(settings: TrainConfig, run: Run, rows: Splits) -> Iterator[Lease | None]:
    """The run folder as this command's own: locked, and made with these settings and rows."""
    if not _leads():  # the process that does holds the folder for all
        yield None
        return
    with runs.locked(run) as lease:
        runs.claim(run, cli.plain(settings), settings.force)
        runs.claim_rows(run, data.row_record(rows), settings.force)
        _say_rows(settings, rows)
        yield lease


def _say_rows(settings: TrainConfig, rows: Splits) -> None:
    counts = {name: len(part) for name, part in rows.parts().items() if part}
    log.info("rows: %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    for reason, count in rows.dropped.items():
        log.info("dropped %d rows of %s", count, reason)
    warning = data.warn_of_forms(rows) if settings.method is Method.dcr else None
    if warning:
        log.warning(warning)


def train_contrastive(job: Job) -> None:
    """Stage one: from the base model to `contrastive/`."""
    settings, run = job.settings, job.run
    policy = models.open_policy(settings.model, settings.dcr.precision, settings.seed)
    _claim_base(job, Stage.contrastive, policy)
    if settings.dcr.adapter is Adapter.lora:
        adapted = models.add_lora(policy.model, settings.dcr.lora, settings.seed, blocks=job.block)
        policy = Policy(adapted, policy.tokenizer, policy.name)
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    batches = _batches(job, Stage.contrastive, chat)
    total = batches.steps_per_epoch * settings.dcr.epochs
    module = ContrastiveModule(policy, settings.dcr, job.block, total)
    seen = _measuring(job, Stage.contrastive, policy, chat, total)
    with _fitted(job, Stage.contrastive, module, batches, total, *seen) as writes:
        if settings.dcr.adapter is Adapter.lora:
            policy = Policy(policy.model.merge_and_unload(), policy.tokenizer, policy.name)
        if writes:
            models.save_full(policy, run.stage("contrastive"))


def train_sft(job: Job) -> None:
    """Stage two: from the base model (STL, STL-aug) or `contrastive/` (DCR) to `sft/`."""
    settings, run = job.settings, job.run
    policy = _sft_start(settings, run)
    _claim_base(job, Stage.sft, policy)
    output_rows = models.head(policy.model).weight.detach()
    chat = prompts.chat_format(
        policy.tokenizer, settings.model, settings.sft.terminator, output_rows
    )
    base = policy.name
    adapted = models.add_lora(policy.model, settings.sft.lora, settings.seed)
    policy = Policy(adapted, policy.tokenizer, policy.name)
    batches = _batches(job, Stage.sft, chat)
    if batches.too_long:
        log.warning(
            "%d pairs have no room for a response within sft.max_len=%d and were left out",
            len(batches.too_long),
            settings.sft.max_len,
        )
    total = batches.steps_per_epoch * settings.sft.epochs
    module = SFTModule(policy, settings.sft, total)
    steps = tracking.snapshot_steps(total, settings.tracking.snapshots)
    snapshots = tracking.Snapshots(run, policy, base, steps)
    seen = _measuring(job, Stage.sft, policy, chat, total)
    with _fitted(job, Stage.sft, module, batches, total, snapshots, *seen) as writes:
        if writes:
            models.save_adapter(policy, run.stage("sft"), base)


def _measuring(
    job: Job, stage: Stage, policy: Policy, chat: ChatFormat, total: int
) -> list[Callback]:
    if job.watched is None:
        return []
    steps = tracking.watched_steps(total, job.settings.tracking.every_n_steps)
    return [tracking.Watch(stage.value, policy, chat, job.watched, steps)]


def _batches(job: Job, stage: Stage, chat: ChatFormat) -> SafetyData:
    settings = job.settings
    context = models.facts(settings.model).context
    return SafetyData(
        stage, job.rows, chat, settings.dcr, settings.sft, settings.seed, context=context
    )


TRAIN = {Stage.contrastive: train_contrastive, Stage.sft: train_sft}


def _sft_start(settings: TrainConfig, run: Run) -> Policy:
    if settings.method is not Method.dcr:
        return models.open_policy(settings.model, settings.sft.precision, settings.seed)
    return models.open_folder(
        str(run.stage("contrastive")),
        settings.sft.precision,
        trust_remote_code=settings.model.trust_remote_code,
    )


def _claim_base(job: Job, stage: Stage, policy: Policy) -> None:
    if job.lease is None:
        return
    name, commit = Path(policy.name), getattr(policy.model.config, "_commit_hash", None)
    weights = models.weights_fingerprint(name) if name.is_dir() else f"{policy.name}@{commit}"
    runs.claim_base(job.run, stage.value, weights, job.settings.force)


@contextmanager
def _fitted(
    job: Job,
    stage: Stage,
    module: resuming.ResumableModule,
    batches: SafetyData,
    total: int,
    *callbacks: Callback,
) -> Iterator[bool]:
    """Train to the end. Inside, the result may be written, by the process that is told True."""
    folder = job.run.checkpoints(stage.value)
    checkpoint = resuming.newest_checkpoint(folder)
    step = resuming.step_of(checkpoint)
    if checkpoint:
        log.info("%s: going on after step %d of %d", stage.value, step, total)
    if job.lease:
        runs.forget_metrics_beyond(job.run, stage.value, step)
    trainer = _trainer(
        job, stage, total // batches.steps_per_epoch, [*callbacks, *_watch(job, stage, total)]
    )
    with resuming.memory_errors_explained():
        trainer.fit(module, datamodule=batches, ckpt_path=checkpoint, weights_only=True)
    if job.lease:
        job.lease.check()
    yield trainer.is_global_zero
    if trainer.is_global_zero:
        _forget_checkpoints(job.run, stage)
    trainer.strategy.barrier()  # no process opens a result that another is still writing


def _watch(job: Job, stage: Stage, total: int) -> list[Callback]:
    """The callbacks of both stages; checkpoints come last, when a step's other traces are there."""
    options = job.settings.trainer
    bar = tracking.Progress(stage.value, total, STEP_LOSS[stage])
    return [
        *([bar] if options.progress else []),
        tracking.StepClock(job.run, stage.value),
        resuming.StepSeed(job.settings.seed),
        *([tracking.Holding(job.lease)] if job.lease else []),
        resuming.Checkpoints(job.run.checkpoints(stage.value), options.checkpoint_every_n_steps),
    ]


def _trainer(job: Job, stage: Stage, epochs: int, callbacks: list[Callback]) -> Trainer:
    settings, options = job.settings, job.settings.trainer
    contrastive = stage is Stage.contrastive
    precision = settings.dcr.precision if contrastive else settings.sft.precision
    return Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        precision=LIGHTNING_PRECISION[precision],  # pyright: ignore[reportArgumentType]
        max_epochs=epochs,
        logger=[tracking.RunLogger(job.run, stage.value), *job.loggers],
        callbacks=callbacks,
        plugins=[resuming.VerifiedCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=settings.dcr.optim.clip if contrastive else None,
        default_root_dir=str(job.run.folder),
    )


def _forget_checkpoints(run: Run, stage: Stage) -> None:
    for file in run.checkpoints(stage.value).glob("*"):
        file.unlink()


@contextmanager
def _wandb(settings: TrainConfig, run: Run) -> Iterator[list[Logger]]:
    """Lightning's logger of the job's W&B run; none where W&B is off or another process leads."""
    if not _leads():
        yield []
        return
    tags = [settings.method.value, settings.model.label]
    made_with = cli.plain(settings)
    with dashboard.opened(settings.wandb, run, settings.stage.value, tags, made_with) as started:
        if started is None:
            yield []
            return
        started.define_metric("*", step_metric="trainer/global_step")
        yield [WandbLogger(experiment=started)]


if __name__ == "__main__":
    cli.run(main)
