"""Parameters by part, trained and frozen, counted on the real architecture without weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcr import models
from dcr.config import Adapter, Precision, Stage, TrainConfig, block_of

# Bytes a block keeps per token and unit of (rows + columns) of its matrices: where a gradient
# passes, and more where the matrix itself is trained, and where it carries LoRA. Measured with
# saved-tensor hooks on Llama and Qwen2 blocks.
SAVED = {
    Precision.mixed: (2.4, 0.6, 2.2),
    Precision.bf16: (2.2, 0.3, 2.2),
    Precision.fp32: (3.8, 0.7, 2.9),
}


@dataclass(frozen=True)
class Shape:
    """The model as one stage would train it. Counts of parameters unless said otherwise."""

    parts: dict[str, int]  # disjoint, tied weights in the first part that holds them
    trained: dict[str, int]  # of each part
    block: int  # ℓ, 1-based
    depth: int
    width: int
    vocabulary: int
    tied: bool
    trunk: int  # blocks 1 to ℓ
    blocks: int  # all blocks
    head: int  # the output projection, also where tied
    trunk_saved: float  # bytes kept by blocks 1 to ℓ for the backward pass of one token
    full_saved: float  # by all blocks

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def stage_shape(settings: TrainConfig, stage: Stage) -> Shape:
    """The model prepared as the stage prepares it.

    Raises ConfigError for a block the model does not have and LoRA targets that match nothing.
    """
    first = stage is Stage.contrastive
    node = settings.dcr if first else settings.sft
    model = models.skeleton(settings.model)
    blocks, head = models.decoder_blocks(model), models.head(model).weight
    block = block_of(settings.dcr, len(blocks))
    tied = head is model.get_input_embeddings().weight
    parts = _parts(model, block)
    if first and settings.dcr.adapter is Adapter.full:
        models.freeze_beyond(model, block, settings.dcr.train_embeddings)
    else:
        known = {id(weight) for part in parts.values() for weight in part}
        with torch.device("meta"):
            model = models.add_lora(model, node.lora, seed=0, blocks=block if first else None)
        parts["LoRA"] = [weight for weight in model.parameters() if id(weight) not in known]
    saved = [saved_by(layer, node.precision) for layer in blocks]
    return Shape(
        parts={name: _size(weights) for name, weights in parts.items()},
        trained={n: _size(w for w in ws if w.requires_grad) for n, ws in parts.items()},
        block=block,
        depth=len(blocks),
        width=head.shape[1],
        vocabulary=head.shape[0],
        tied=tied,
        trunk=_size(parts[lower(block)]),
        blocks=_size(parts[lower(block)]) + _size(parts.get(upper(block, len(blocks)), [])),
        head=head.numel(),
        trunk_saved=sum(saved[:block]),
        full_saved=sum(saved),
    )


def lower(block: int) -> str:
    """The name of the part up to ℓ."""
    return f"blocks 1 to {block}"


def upper(block: int, depth: int) -> str:
    """The name of the part beyond ℓ, which a model cut at its last block does not have."""
    return f"blocks {block + 1} to {depth}"


def _parts(model: Any, block: int) -> dict[str, list[nn.Parameter]]:
    """Every parameter in exactly one part, in the order of a forward pass."""
    blocks, norm = models.decoder_blocks(model), models.final_norm(model)
    norms = list(norm[1].parameters()) if norm else []
    inside = {id(weight) for weight in [*blocks.parameters(), *norms]}
    embeddings = [w for w in models.backbone(model).parameters() if id(w) not in inside]
    inside |= {id(weight) for weight in embeddings}
    parts = {
        "embeddings": embeddings,
        lower(block): list(blocks[:block].parameters()),
        upper(block, len(blocks)): list(blocks[block:].parameters()),
        "final norm": norms,
        "head": [weight for weight in model.parameters() if id(weight) not in inside],
    }
    return {name: weights for name, weights in parts.items() if weights or name == "head"}


def _size(weights: Iterable[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


def saved_by(block: nn.Module, precision: Precision) -> float:
    """Bytes a block keeps for the backward pass of one token, by the table SAVED."""
    passing, trained, adapted = SAVED[precision]
    kept = 0.0
    for name, weight in block.named_parameters():
        if weight.dim() == 2 and "lora_" not in name:
            kept += sum(weight.shape) * (passing + trained * weight.requires_grad)
    for module in block.modules():
        if hasattr(module, "lora_A"):
            kept += adapted * sum(module.base_layer.weight.shape)  # pyright: ignore
    return kept
