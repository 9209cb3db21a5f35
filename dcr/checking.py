"""Checks of a training command that need no weights: they run before any is opened."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dcr.core import models, prompts
from dcr.core.config import ConfigError, LoraConfig, ModelConfig, Stage
from dcr.core.config.training import (
    FSDP,
    Adapter,
    ContrastiveConfig,
    ReadoutConfig,
    SFTConfig,
    TrainConfig,
    block_of,
    stages_of,
)
from dcr.core.data import Splits
from dcr.core.data.rows import StageRows, none_fits
from dcr.core.models import architecture, refused_as, structure
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.resolving import check_extras

PROCESSES_A_CORE = 4  # slow, but a way to try several; more is a slip of the finger


def check_settings(settings: TrainConfig) -> None:
    """Finds, before rows are drawn, what this machine lacks and blocks that the model lacks.

    Raises ConfigError.
    """
    if not settings.plan:  # which opens no weights
        check_extras(settings)
    trainer, wanted = settings.trainer, stages_of(settings)
    check_devices(trainer.accelerator, trainer.devices)
    processes = trainer.devices * trainer.num_nodes
    shared = (Stage.contrastive, "dcr", settings.dcr), (Stage.sft, "sft", settings.sft)
    for stage, name, node in shared:  # the readout's batches are not
        if stage in wanted and node.batch_size < processes:
            raise ConfigError(
                f"{name}.batch_size={node.batch_size}: is the batch of all {processes} processes "
                "of trainer.devices and trainer.num_nodes, of which each needs a row; give more"
            )
    check_blocks(settings.dcr, settings.sft.readout, models.facts(settings.model).depth)


def check_devices(accelerator: str, devices: int) -> None:
    """Raises ConfigError if this machine has fewer devices than `trainer.devices`."""
    named = f"trainer.accelerator={accelerator} trainer.devices={devices}"
    found, cores = torch.cuda.device_count(), os.cpu_count() or 1
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and found):
        if found < devices:
            raise ConfigError(
                f"{named}: this machine has {found} GPUs; lower trainer.devices or use "
                "trainer.accelerator=cpu"
            )
    elif devices > PROCESSES_A_CORE * cores:
        raise ConfigError(f"{named}: this machine has {cores} cores; lower trainer.devices")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"{named}: this machine has none; use trainer.accelerator=cpu")


def check_blocks(dcr: ContrastiveConfig, readout: ReadoutConfig, depth: int) -> None:
    """Raises ConfigError for blocks of stage one or the readout beyond a model `depth` deep."""
    block_of(dcr, depth)
    if readout.steps and readout.blocks > depth:
        raise ConfigError(
            f"sft.readout.blocks={readout.blocks}: the model has {depth}; give as many or fewer"
        )


def check_stages(settings: TrainConfig, run: Run, rows: Splits) -> None:
    """Finds before any stage trains what would stop one half-way.

    Raises ConfigError where nothing is there to start from, and as `check_unfinished` does.
    """
    wanted = stages_of(settings)
    chain = stages_of(replace(settings, stage=Stage.all))
    first = chain.index(wanted[0])
    before = chain[first - 1].value if first else None
    if before and not run.done(before):
        raise ConfigError(
            f"stage={wanted[0].value}: {run.folder} holds no {before}/ to start from; run "
            f"stage={before} or stage=all with the same settings first"
        )
    check_unfinished(settings, rows, [stage for stage in wanted if not run.done(stage.value)])


def check_unfinished(settings: TrainConfig, rows: Splits, wanted: Sequence[Stage]) -> None:
    """Finds what would stop one of these stages.

    Raises ConfigError for LoRA targets that match nothing, for a model or a template that cannot
    be, and where no training pair fits, and DataError for a prompt longer than the context or a
    conversation that the template refuses.
    """
    facts, first, sft = models.facts(settings.model), settings.dcr, settings.sft
    chat = prompts.chat_format(models.open_tokenizer(settings.model), settings.model)
    for part in rows.parts().values():
        chat.check(part)
    if Stage.contrastive in wanted:
        if settings.trainer.strategy == FSDP and first.train_embeddings and facts.tied:
            raise ConfigError(
                "trainer.strategy=fsdp dcr.train_embeddings=true: the embeddings are the head as "
                "well, which cannot be split between the two; leave them frozen, or use "
                "trainer.strategy=ddp"
            )
        if first.adapter is Adapter.lora:
            _check_targets(settings, first.lora, block_of(first, facts.depth))
        StageRows(Stage.contrastive, rows, chat, settings, facts.context)
    if Stage.sft in wanted:
        _check_targets(settings, sft.lora)
        check_lengths(chat, rows, sft, facts.context)


def _check_targets(settings: TrainConfig, lora: LoraConfig, blocks: int | None = None) -> None:
    structure.add_lora(skeleton(settings.model), lora, settings.seed, blocks=blocks)


def skeleton(config: ModelConfig) -> Any:
    """The real architecture, whose parameters have shapes and no values.

    Raises ConfigError if no causal language model can be made of it.
    """
    shape = architecture(config)
    called = "model.architecture" if config.architecture else f"model.name={config.name}"
    with refused_as(called, "name a causal language model"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape, trust_remote_code=config.trust_remote_code)


def check_lengths(chat: ChatFormat, rows: Splits, config: SFTConfig, context: int) -> None:
    """Raises ConfigError where the model cannot read `sft.max_len` tokens or no pair fits."""
    if config.max_len > context:
        raise ConfigError(
            f"sft.max_len={config.max_len}: the model's context is {context} tokens; lower it"
        )
    pairs = (*rows.normal, *rows.refusals, *rows.augmented)
    fits = (chat.pair(row.prompt, row.response or "", config.max_len)[0] for row in pairs)
    if not any(fits):
        raise none_fits(config)
