"""Harmless tuning as a user would do it: transformers' Trainer on instructions alone."""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainingArguments

from dcr.core import passes, prompts, sources
from dcr.core.config import ConfigError, Kind, LoraConfig, Precision
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation.subjects import Local, opened
from dcr.core.models import Policy, structure
from dcr.core.prompts import IGNORED, ChatFormat
from dcr.core.sources import Example
from dcr.guarding import KeepRefusals
from dcr.robustness import RobustnessConfig, TuningConfig

log = logging.getLogger(__name__)

LONGEST = 256  # tokens of a row; longer ones are cut


def harmless(settings: EvalConfig) -> list[Example]:
    """The rows that a model is tuned on: as many as the steps take, where there are as many.

    Raises ConfigError where `data.normal.source` names none.
    """
    options, named = settings.node(RobustnessConfig).tuning, settings.data.normal.source
    if not isinstance(named, list):
        raise ConfigError(
            "robustness.attacks=[tuning]: data.normal.source names no rows to tune on; name some"
        )
    read = [
        row
        for name in named
        for row in sources.read(name, root=settings.data.root, kind=Kind.normal, pairs=True)
    ]
    count = min(len(read), options.steps * options.batch_size)
    return sources.draw(read, count, settings.seed + 1)  # others than SFT drew by the same seed


def tuned(subject: Local, rows: Sequence[Example], guarded: bool) -> Policy:
    """The subject's weights, opened anew, merged and tuned, in the precision that it answers in."""
    settings = subject.settings
    options = settings.node(RobustnessConfig).tuning
    wide = opened(subject.under(replace(settings, precision=Precision.fp32)))
    model = wide.model
    if isinstance(model, PeftModel):
        model = model.merge_and_unload()
    output = structure.head(model).weight
    chat = prompts.chat_format(wide.tokenizer, settings.model, output_rows=output)
    lora = LoraConfig(targets=settings.model.lora_targets, dropout=0.0)
    with torch.random.fork_rng():  # the Trainer seeds all generators
        adapted = structure.add_lora(model, lora, settings.seed)
        log.info(
            "robustness: tuning for %d steps of %d harmless rows%s",
            *(options.steps, options.batch_size, ", guarded" if guarded else ""),
        )
        fit(adapted, chat, rows, options, settings, guarded)
    merged: Any = adapted.merge_and_unload()
    merged.to(structure.DTYPES[settings.precision])
    return Policy(merged.eval(), wide.tokenizer, wide.name)


def fit(
    model: Any,
    chat: ChatFormat,
    rows: Sequence[Example],
    options: TuningConfig,
    settings: EvalConfig,
    guarded: bool,
) -> None:
    """Trains a model in place on the answers of the rows, as `Trainer` does by default."""
    pairs = [chat.pair(row.prompt, row.response or "", LONGEST) for row in rows]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.lr,
            seed=settings.seed,
            bf16=settings.precision is not Precision.fp32,
            use_cpu=structure.unwrapped(model).device.type == "cpu",
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            **{"save_strategy": "no", "logging_strategy": "no", "report_to": []},
            disable_tqdm=True,
        )
        guards = [KeepRefusals(chat.tokenizer, weight=options.guard, seed=settings.seed)]
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=[pair for pair in pairs if pair[0]],  # pyright: ignore[reportArgumentType]
            data_collator=collated,
            callbacks=guards if guarded else [],  # pyright: ignore[reportArgumentType]
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()


def collated(pairs: Sequence[tuple[list[int], list[int]]]) -> dict[str, Tensor]:
    """Pairs as one batch; transformers shifts labels by itself."""
    ids = [pair[0] for pair in pairs]
    labels = [[IGNORED, *targets[:-1]] for _, targets in pairs]
    return {
        "input_ids": passes.padded(ids, 0),
        "attention_mask": passes.attention_mask(ids).long(),
        "labels": passes.padded(labels, IGNORED),
    }
