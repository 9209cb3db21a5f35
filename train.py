"""Train: config -> stages -> run folder.

python train.py model=llama3_8b stage=contrastive
python train.py -m dcr.epochs=1,2,3,5
"""

import logging
import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import WandbLogger
from omegaconf import DictConfig

from dcr import cli, config, data, models, plan, prompts, refusal, resuming, runs, tracking
from dcr.config import Adapter, ConfigError, Method, Precision, Stage, TrainConfig, WandbMode
from dcr.contrastive import ContrastiveModule
from dcr.data import SafetyData, Splits
from dcr.models import Policy
from dcr.runs import Run
from dcr.sft import SFTModule

log = logging.getLogger(__name__)

STAGES = {
    (Method.dcr, Stage.all): (Stage.contrastive, Stage.sft),
    (Method.dcr, Stage.contrastive): (Stage.contrastive,),
    (Method.dcr, Stage.sft): (Stage.sft,),
    (Method.stl, Stage.all): (Stage.sft,),
    (Method.stl, Stage.sft): (Stage.sft,),
}
LIGHTNING_PRECISION = {
    Precision.mixed: "bf16-mixed",
    Precision.bf16: "bf16-mixed",
    Precision.fp32: "32-true",
}


@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@cli.job
def main(composed: DictConfig) -> None:
    settings = config.resolve(composed, TrainConfig)
    if settings.plan:
        print(plan.describe(settings))
    else:
        train(settings, Run(cli.output_folder()))


def train(settings: TrainConfig, run: Run) -> None:
    """Run the stages of a method in a run folder, going on from whatever is done there.

    Raises UserError for anything a user can mend, before weights are loaded where it can be known.
    """
    block = config.block_of(settings.dcr, models.facts(settings.model).depth)
    stages = STAGES[settings.method, settings.stage]
    rows = data.split(
        settings.data,
        settings.dcr.ratio,
        settings.seed,
        contrastive=settings.method is Method.dcr,
        refuses=refusal.is_refusal,
    )
    _check_input(settings, run, stages)
    if settings.trainer.threads:
        torch.set_num_threads(settings.trainer.threads)
    with runs.locked(run):
        runs.claim(run, cli.plain(settings), settings.force)
        runs.write_json(run.rows_file, data.row_record(rows))
        _say_rows(settings, rows)
        with _wandb(settings, run) as loggers:
            for stage in stages:
                if run.done(stage.value):
                    log.info("%s: done in %s, skipped", stage.value, run.stage(stage.value))
                    continue
                TRAIN[stage](settings, run, rows, block, loggers)
    print(f"{run.folder}")


def _check_input(settings: TrainConfig, run: Run, stages: tuple[Stage, ...]) -> None:
    missing = Stage.contrastive not in stages and not run.done("contrastive")
    if settings.method is Method.dcr and missing:
        raise ConfigError(
            f"stage=sft: {run.folder} holds no contrastive/ to start from; run stage=contrastive "
            "or stage=all with the same settings first"
        )


def _say_rows(settings: TrainConfig, rows: Splits) -> None:
    counts = {name: len(part) for name, part in rows.parts().items() if part}
    log.info("rows: %s", ", ".join(f"{count} {name}" for name, count in counts.items()))
    for reason, count in rows.dropped.items():
        log.info("dropped %d rows of %s", count, reason)
    warning = data.warn_of_forms(rows) if settings.method is Method.dcr else None
    if warning:
        log.warning(warning)


def train_contrastive(
    settings: TrainConfig, run: Run, rows: Splits, block: int, loggers: list[Any]
) -> None:
    """Stage one: from the base model to `contrastive/`."""
    policy = models.open_policy(settings.model, settings.dcr.precision, settings.seed)
    if settings.dcr.adapter is Adapter.lora:
        adapted = models.add_lora(policy.model, settings.dcr.lora, settings.seed, blocks=block)
        policy = Policy(adapted, policy.tokenizer, policy.name)
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    batches = SafetyData(Stage.contrastive, rows, chat, settings.dcr, settings.sft, settings.seed)
    total = batches.steps_per_epoch * settings.dcr.epochs
    module = ContrastiveModule(policy, settings.dcr, block, total)
    _fit(settings, run, Stage.contrastive, module, batches, settings.dcr.epochs, loggers, [])
    if settings.dcr.adapter is Adapter.lora:
        policy = Policy(policy.model.merge_and_unload(), policy.tokenizer, policy.name)
    models.save_full(policy, run.stage("contrastive"))
    _forget_checkpoints(run, Stage.contrastive)


def train_sft(
    settings: TrainConfig, run: Run, rows: Splits, block: int, loggers: list[Any]
) -> None:
    """Stage two: from the base model (STL) or `contrastive/` (DCR) to the adapter in `sft/`."""
    policy, base = _sft_start(settings, run)
    output_rows = models.head(policy.model).weight.detach()
    chat = prompts.chat_format(
        policy.tokenizer, settings.model, settings.sft.terminator, output_rows
    )
    adapted = models.add_lora(policy.model, settings.sft.lora, settings.seed)
    policy = Policy(adapted, policy.tokenizer, policy.name)
    batches = SafetyData(Stage.sft, rows, chat, settings.dcr, settings.sft, settings.seed)
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
    _fit(settings, run, Stage.sft, module, batches, settings.sft.epochs, loggers, [snapshots])
    models.save_adapter(policy, run.stage("sft"), base)
    _forget_checkpoints(run, Stage.sft)


TRAIN = {Stage.contrastive: train_contrastive, Stage.sft: train_sft}


def _sft_start(settings: TrainConfig, run: Run) -> tuple[Policy, str]:
    if settings.method is Method.stl:
        policy = models.open_policy(settings.model, settings.sft.precision, settings.seed)
        return policy, policy.name
    folder = str(run.stage("contrastive"))
    return models.open_folder(folder, settings.sft.precision), folder


def _fit(
    settings: TrainConfig,
    run: Run,
    stage: Stage,
    module: resuming.ResumableModule,
    batches: SafetyData,
    epochs: int,
    loggers: list[Any],
    callbacks: list[Any],
) -> None:
    folder = run.checkpoints(stage.value)
    checkpoint = resuming.newest_checkpoint(folder)
    step = resuming.step_of(checkpoint)
    if checkpoint:
        log.info("%s: going on after step %d", stage.value, step)
    runs.forget_metrics_beyond(run, stage.value, step)
    options = settings.trainer
    precision = (settings.dcr if stage is Stage.contrastive else settings.sft).precision
    bar = [TQDMProgressBar(leave=True)] if options.progress else []
    clock = tracking.StepClock(run, stage.value)
    trainer = Trainer(
        accelerator=options.accelerator,
        devices=options.devices,
        num_nodes=options.num_nodes,
        strategy=options.strategy,
        precision=LIGHTNING_PRECISION[precision],  # pyright: ignore[reportArgumentType]
        max_epochs=epochs,
        logger=[tracking.RunLogger(run, stage.value), *loggers],
        callbacks=[
            *callbacks,
            *bar,
            clock,
            resuming.StepSeed(settings.seed),
            resuming.Checkpoints(folder, options.checkpoint_every_n_steps),
        ],
        plugins=[resuming.VerifiedCheckpointIO()],
        enable_checkpointing=False,
        enable_progress_bar=options.progress,
        enable_model_summary=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        gradient_clip_val=settings.dcr.optim.clip if stage is Stage.contrastive else None,
        default_root_dir=str(run.folder),
    )
    trainer.fit(module, datamodule=batches, ckpt_path=checkpoint, weights_only=True)


def _forget_checkpoints(run: Run, stage: Stage) -> None:
    for file in run.checkpoints(stage.value).glob("*"):
        file.unlink()


@contextmanager
def _wandb(settings: TrainConfig, run: Run):
    """One W&B run for the job, closed whatever happens; an empty list when it is off."""
    if settings.wandb.mode is WandbMode.disabled:
        yield []
        return
    import wandb

    os.environ["WANDB_SILENT"] = "true"
    logger = WandbLogger(
        name=run.folder.name,
        id=run_id(run),
        save_dir=str(run.folder),
        project=settings.wandb.project,
        entity=settings.wandb.entity,
        group=settings.wandb.group or os.environ.get("DCR_SWEEP"),
        job_type=settings.stage.value,
        tags=[settings.method.value, settings.model.label, *settings.wandb.tags],
        config=cli.plain(settings),
        mode=settings.wandb.mode.value,
        resume="allow",
        log_model=False,
    )
    try:
        yield [logger]
    finally:
        wandb.finish()


def run_id(run: Run) -> str:
    """The W&B id of a run folder: kept in it, so that moving the folder keeps the run."""
    file = run.folder / "wandb_id"
    if not file.is_file():
        runs.write_text(file, runs.fingerprint([str(run.folder.resolve())]))
    return file.read_text().strip()


if __name__ == "__main__":
    cli.run(main)
