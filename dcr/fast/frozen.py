"""Frozen weights of stage one in less memory: bf16, as passes under autocast read them."""

from typing import Any

import torch
from torch import nn

from dcr.core.config import FSDP, Precision, TrainConfig
from dcr.core.models import decoder_blocks, final_norm, head
from dcr.tracking import TrackingConfig


def shrinks_frozen(settings: TrainConfig) -> bool:
    """Whether stage one holds frozen weights in less memory.

    It does if one process trains under autocast and nothing else is measured on the model.
    """
    trainer = settings.trainer
    alone = trainer.devices * trainer.num_nodes == 1 and trainer.strategy != FSDP
    mixed = settings.dcr.precision is Precision.mixed
    return alone and mixed and not settings.node(TrackingConfig).quantities


@torch.no_grad()
def shrink_frozen(model: Any, block: int, whole: bool) -> None:
    """Holds frozen weights as training with autocast to bf16 reads them: products stay the same.

    Frozen projections become bf16, and weights beyond `block` become empty unless passes go through
    the `whole` model. On a CPU the other weights of a whole model are copied, so that no page of
    their memory-mapped file stays.
    """
    embeddings, norm = model.get_input_embeddings().weight, final_norm(model)
    projections = (part for part in model.modules() if isinstance(part, nn.Linear))
    products = {id(part.weight) for part in projections if part.weight is not embeddings}
    beyond = [*decoder_blocks(model)[block:], head(model), *([norm[1]] if norm else [])]
    beyond = [weight for part in beyond for weight in part.parameters() if weight is not embeddings]
    unread = set() if whole else {id(weight) for weight in beyond}
    for weight in model.parameters():
        if id(weight) in unread:
            weight.data = weight.new_empty(0)
        elif not weight.is_floating_point():  # in four bits
            continue
        elif id(weight) in products and not weight.requires_grad:
            weight.data = weight.to(torch.bfloat16)
        elif whole and weight.device.type == "cpu":
            weight.data = weight.clone()
