"""The parts of a model, found by structure and not by family: blocks, norm, head, trained weights.

Blocks are counted from 1: layer ℓ is the output of the ℓ-th block.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dcr.core.config import ALL_LINEAR, ConfigError, LoraConfig, Precision

UNLIMITED = 2**30  # tokens
DTYPES = {
    Precision.mixed: torch.float32,
    Precision.bf16: torch.bfloat16,
    Precision.fp32: torch.float32,
}


def unwrapped(model: Any) -> PreTrainedModel:
    """The transformers model inside a PEFT one, adapters still in place."""
    inside: Any = model.base_model.model if isinstance(model, PeftModel) else model
    return inside


def decoder_blocks(model: Any) -> nn.ModuleList:
    """The one ModuleList with `num_hidden_layers` entries.

    Raises ConfigError if there is none or more than one.
    """
    return _blocks_and_parent(unwrapped(model))[0]


def _blocks_and_parent(model: PreTrainedModel) -> tuple[nn.ModuleList, nn.Module, str]:
    depth = model.config.get_text_config().num_hidden_layers
    places = list({id(entry[0]): entry for entry in _lists(model, depth)}.values())
    if len(places) != 1:
        kind = type(model).__name__
        raise ConfigError(f"model.name: {kind} has {len(places)} lists of {depth} blocks, not one")
    return places[0]


def _lists(parent: nn.Module, length: int) -> Iterator[tuple[nn.ModuleList, nn.Module, str]]:
    """The lists of so many modules, with their owners and names.

    It does not look inside such a list: as many experts as blocks, say, are no list of blocks.
    """
    for name, child in parent.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == length:
            yield child, parent, name
        else:
            yield from _lists(child, length)


def backbone(model: Any) -> nn.Module:
    """The module that owns the blocks: embeddings in, final-normed hidden states out."""
    return _blocks_and_parent(unwrapped(model))[1]


def final_norm(model: Any) -> tuple[str, nn.Module] | None:
    """The norm after the last block with its name in the backbone; None if there is none."""
    norms = [
        (name, child)
        for name, child in backbone(model).named_children()
        if "norm" in type(child).__name__.lower() and "embed" not in name
    ]
    return norms[-1] if norms else None


def context_length(config: Any) -> int:
    """The number of tokens that a model can read; `UNLIMITED` if its config names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or UNLIMITED


def head(model: Any) -> nn.Linear:
    """The output projection from hidden states to logits."""
    layer = unwrapped(model).get_output_embeddings()
    assert layer is not None, "a causal language model has output embeddings"
    return layer  # pyright: ignore[reportReturnType]


def add_lora(
    model: Any,
    config: LoraConfig,
    seed: int,
    blocks: int | None = None,
    task_type: str = "CAUSAL_LM",
) -> PeftModel:
    """The model with fresh LoRA weights in fp32 on `config.targets`, in the first `blocks` or all.

    With the task type SEQ_CLS the head of a classifier is trained as well. The weights follow from
    `seed` alone, and the global generators keep their states. Raises ConfigError for a target that
    matches no projection of a block.
    """
    inside = decoder_blocks(model)
    projections = _projections(inside)
    every = config.targets == [ALL_LINEAR]
    unknown = [t for t in config.targets if not any(f".{p}".endswith(f".{t}") for p in projections)]
    names = sorted({path.rpartition(".")[2] for path in projections})
    if unknown and not every:
        raise ConfigError(
            f"{'dcr' if blocks else 'sft'}.lora.targets=[{','.join(config.targets)}]: "
            f"{', '.join(unknown)} match nothing in the model's blocks; choose from "
            f"{', '.join(names)}, or {ALL_LINEAR}"
        )
    # PEFT restricts only named modules to some blocks
    spelled_out = names if blocks else ALL_LINEAR
    settings = PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=spelled_out if every else list(config.targets),
        layers_to_transform=list(range(blocks)) if blocks else None,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in inside.modules()),
        task_type=task_type,
    )
    commit = getattr(unwrapped(model).config, "_commit_hash", None)  # of a base from the hub
    with seeded(seed):
        return get_peft_model(model, settings, revision=commit)  # pyright: ignore[reportReturnType]


def _projections(blocks: nn.ModuleList) -> list[str]:
    return [n for n, module in blocks.named_modules() if isinstance(module, nn.Linear | Conv1D)]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeds the CPU's generator for the weights made inside, then restores its state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def is_quantised(model: Any) -> bool:
    """Whether the model has layers in four bits."""
    return any(type(layer).__name__ == "Linear4bit" for layer in model.modules())
