"""Keeps how answers begin while a user tunes on: a callback of transformers' `Trainer`.

    from dcr.guarding import KeepRefusals

    Trainer(model=model, processing_class=tokenizer, callbacks=[KeepRefusals()], …).train()

A safety-tuned model decides in its first answer tokens, and harmless rows move those of all
prompts. So each optimiser step also pulls the first answer tokens of a few probe prompts, of which
half should be refused, towards what the model gave before training. TRL's trainers, which are
subclasses of `Trainer`, take the callback as well.
"""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from dcr.core import models, passes, prompts, sources, storage
from dcr.core.config import ConfigError, Kind, ModelConfig
from dcr.core.models import structure
from dcr.readout.stage import drift

SOURCES = {Kind.toxic: "contrasts_toxic", Kind.seemingly_toxic: "contrasts_seemingly_toxic"}
FILE = "keep_refusals.safetensors"  # in the trainer's output folder, for training that is resumed
PARTS = ("ids", "mask", "before")  # of a batch: `before` are log-probabilities


def probes(count: int, seed: int) -> list[str]:
    """So many of the project's contrasts, toxic and seemingly toxic ones in turn."""
    kinds = [
        sources.draw(sources.read(name, kind=kind), (count + 1) // 2, seed)
        for kind, name in SOURCES.items()
    ]
    return [row.prompt for pair in zip(*kinds, strict=True) for row in pair][:count]


class KeepRefusals(TrainerCallback):
    """Adds the gradient of weight · KL(before ‖ now) of first answer tokens to each step's.

    The KL is the mean over a batch of probe prompts and over the first `tokens` tokens of the
    greedy answers that the model gave when training began, in nats. Its gradient is added behind
    the clipping of the others. The model before is read once, into a cache of probabilities
    (`probes` · `tokens` · vocabulary numbers); training that goes on from a checkpoint finds them
    in its output folder. It takes whole models and PEFT's, in fp32 or bf16.

    Args:
        tokenizer: with a chat template; None takes the trainer's `processing_class`.
        probes: prompts in a user's words; None draws 64 of the project's contrasts.
        weight: 0 adds nothing.
        batch_size: probes a step.
        seed: of the draw.

    Attributes:
        divergence: the KL at each step, before it.

    Raises ConfigError where training begins, for a tokenizer that is not there, for fp16 (whose
    gradients are scaled), and for weights that are split over processes.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        probes: Sequence[str] | None = None,
        *,
        weight: float = 1.0,
        tokens: int = 4,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        if min(tokens, batch_size) < 1 or weight < 0 or (probes is not None and not probes):
            raise ConfigError(
                f"KeepRefusals(weight={weight}, tokens={tokens}, batch_size={batch_size}): give a "
                "weight of 0 or more, and at least one token, row and probe"
            )
        self.tokenizer, self.given, self.seed = tokenizer, probes, seed
        self.weight, self.tokens, self.batch_size = weight, tokens, batch_size
        self.divergence: list[float] = []
        self._batches: list[tuple[Tensor, ...]] = []  # of PARTS

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        processing_class: Any = None,
        **_: Any,
    ) -> None:
        tokenizer = self.tokenizer or processing_class
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ConfigError(
                "KeepRefusals: give it the tokenizer, or the trainer as processing_class"
            )
        for named in ("fp16", "fsdp", "deepspeed"):
            if getattr(args, named, None):
                raise ConfigError(
                    f"KeepRefusals {named}: is not supported; use bf16 or fp32, and ddp"
                )
        file = Path(str(args.output_dir)) / FILE
        if state.global_step:
            self._batches = _kept(file)
            return
        chat = prompts.chat_format(tokenizer, ModelConfig(name="KeepRefusals"))
        asked = list(probes(64, self.seed) if self.given is None else self.given)
        ids = [chat.prompt_ids(prompt) for prompt in asked]
        with models.evaluating(model), torch.no_grad():
            self._batches = [
                self._before(model, ids[start : start + self.batch_size])
                for start in range(0, len(ids), self.batch_size)
            ]
        if state.is_world_process_zero:
            named = {
                f"{i}.{name}": each.contiguous()
                for i, batch in enumerate(self._batches)
                for name, each in zip(PARTS, batch, strict=True)
            }
            storage.write_bytes(file, save(named))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        if not self.weight:
            return
        ids, mask, before = self._batches[state.global_step % len(self._batches)]
        with models.evaluating(model):  # dropout would look like a change
            now = self._logits(model, ids, mask)
            kl = drift(before.to(now.device).flatten(0, 1), now.flatten(0, 1)).mean()
            (self.weight * kl).backward()
        self.divergence.append(kl.item())

    def _before(self, model: Any, rows: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """A batch of prompts with the greedy answers' tokens but the last, and what it gave."""
        for _ in range(self.tokens - 1):
            newest = self._logits(model, *_padded(rows))[:, -1].argmax(-1).tolist()
            rows = [[*row, token] for row, token in zip(rows, newest, strict=True)]
        ids, mask = _padded(rows)
        return ids, mask, self._logits(model, ids, mask).log_softmax(-1).cpu()

    def _logits(
        self, model: Any, ids: Tensor, mask: Tensor
    ) -> Float[Tensor, "rows tokens vocabulary"]:
        """The logits of the first answer tokens, in fp32, of rows padded on the left."""
        inner = structure.unwrapped(model)
        device = inner.device
        options: dict[str, Any] = passes.placed(inner, passes.positions(mask).to(device))
        if "logits_to_keep" in inspect.signature(inner.forward).parameters:
            options["logits_to_keep"] = self.tokens
        with passes.contiguous_head(inner):
            output = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **options
            )
        return output.logits[:, -self.tokens :].float()


def _kept(file: Path) -> list[tuple[Tensor, ...]]:
    """The batches that an earlier process kept. Raises ConfigError where they are gone."""
    if not file.is_file():
        raise ConfigError(f"{file}: gone, and with it the model before training; begin anew")
    kept = load_file(file)
    return [tuple(kept[f"{i}.{part}"] for part in PARTS) for i in range(len(kept) // len(PARTS))]


def _padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    return passes.padded(rows, 0, left=True), passes.attention_mask(rows, left=True).long()
