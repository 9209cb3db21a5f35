"""The rows that a plan counts, and their tokens: training's own, or estimated from characters."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcr.core import prompts
from dcr.core.config import EMBEDDED_MODEL, TINY_MODEL, ModelConfig, Stage
from dcr.core.config.training import TrainConfig
from dcr.core.data import Splits
from dcr.core.data.rows import PairRow, PromptRow, StageRows
from dcr.core.prompts import IGNORED, ChatFormat
from dcr.core.sources import Example
from dcr.core.text import CHARACTERS_PER_TOKEN
from dcr.plan import cost
from dcr.plan.cost import Load
from dcr.readout.rows import ReadoutRow

# One token a character, and as many control tokens around a turn as ChatML has.
COUNTING_TEMPLATE = (
    "{% for m in messages %}<|im_start|><|im_start|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><|im_start|>\n{% endif %}"
)


def tokenizer_is_here(config: ModelConfig) -> bool:
    """Whether the tokenizer opens without the network and without a conversion of weights."""
    from dcr import builtin

    if config.name == EMBEDDED_MODEL:
        return (builtin.cache_folder() / EMBEDDED_MODEL / "config.json").is_file()
    return config.name == TINY_MODEL or Path(config.name).is_dir()


def batches_of(settings: TrainConfig, stage: Stage, rows: Splits) -> tuple[StageRows, int]:
    """A stage's rows in order, and the number of template tokens that all of them begin with.

    The rows are training's own, or have a token for every four characters. Raises UserError as
    training does for rows that exceed the context.
    """
    from dcr.checking import check_lengths  # with torch
    from dcr.core import models

    if stage is Stage.contrastive and not _anchored(settings):
        rows = replace(rows, normal=[])  # training tokenises them but uses none
    chat, rows = chat_of(settings.model, rows)
    # estimated tokens say nothing of what exceeds the context
    context = models.facts(settings.model).context if tokenizer_is_here(settings.model) else None
    if stage is Stage.sft and context is not None:
        check_lengths(chat, rows, settings.sft, context)
    batches = StageRows(stage, rows, chat, settings, context)
    batches.world = settings.trainer.devices * settings.trainer.num_nodes
    return batches, shared_prefix(chat)


def shared_prefix(chat: ChatFormat) -> int:
    """The number of tokens that all templated prompts begin with."""
    alike = [a == b for a, b in zip(*map(chat.prompt_ids, ("A", "b")), strict=False)]
    return alike.index(False)


def chat_of(config: ModelConfig, rows: Splits) -> tuple[ChatFormat, Splits]:
    """The model's chat format and the rows, or a format and shortened rows for counting."""
    from dcr import builtin
    from dcr.core import models

    if tokenizer_is_here(config):
        tiny = config.name == TINY_MODEL  # its folder would be made with weights
        tokenizer = builtin.byte_tokenizer() if tiny else models.open_tokenizer(config)
        return prompts.chat_format(tokenizer, config), rows
    system = _short(config.system_prompt) if config.system_prompt else None
    counted = ModelConfig(name=config.name, system_prompt=system)
    return prompts.chat_format(builtin.byte_tokenizer(COUNTING_TEMPLATE), counted), _shortened(rows)


def _shortened(rows: Splits) -> Splits:
    def short(row: Example) -> Example:
        return replace(row, prompt=_short(row.prompt), response=_short(row.response or "") or None)

    parts: dict[str, Any] = {name: [*map(short, part)] for name, part in rows.parts().items()}
    return replace(rows, **parts)


def _short(text: str) -> str:
    return "x" * math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def _anchored(settings: TrainConfig) -> bool:
    """Whether stage one's NLL is on general pairs, in a pass of their own."""
    return settings.dcr.nll.source.value == "general" and settings.dcr.nll.weight > 0


def load_of(settings: TrainConfig, batches: StageRows, prefix: int | None = None) -> Load:
    """The tokens of rank 0's first epoch, counted on training's own batches.

    Passes are padded without a `prefix`. With one they are packed, and rows share so many first
    tokens unless LoRA's dropout is on (`dcr.fast.packing`).
    """
    nll, lora = settings.dcr.nll, cost.lora_of(settings, batches.stage)
    shared = 0 if prefix and lora and lora.dropout else prefix
    short = _anchored(settings) or nll.weight == 0
    trunk: list[Sequence[PromptRow]] = []
    full: list[Sequence[PromptRow | PairRow]] = []
    for places in batches.sampler:
        if batches.stage is Stage.sft:
            pairs = [batches.pairs[place] for place in places]
            full += batches.sft_step(pairs)
            continue
        rows, general = batches.contrastive_step([batches.prompts[place] for place in places])
        (trunk if short else full).append(rows)
        full += [general] if general else []
    return Load(
        trunk=sum(computed(rows, shared) for rows in trunk),
        full=sum(computed(rows, shared) for rows in full),
        unpadded=sum(len(row.ids) for rows in [*trunk, *full] for row in rows),
        labelled=sum(
            target != IGNORED
            for rows in full
            for row in rows
            for target in (row.targets if isinstance(row, PairRow) else row.nll)
        ),
        largest_trunk=max((computed(rows, shared) for rows in trunk), default=0),
        largest_full=max((computed(rows, shared) for rows in full), default=0),
        heldout=sum(computed(rows, prefix) for rows in batches.heldout_passes),
    )


def computed(rows: Sequence[PromptRow | PairRow | ReadoutRow], prefix: int | None) -> int:
    """The tokens of one forward pass, padded or with a prefix computed once."""
    lengths = [len(row.ids) for row in rows]
    if prefix is None:
        return len(rows) * max(lengths)
    return sum(lengths) - (len(rows) - 1) * min(prefix, min(lengths) - 1)
