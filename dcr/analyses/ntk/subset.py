"""The parameters that a kernel is over, and the module that each of them works in."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from peft import PeftModel
from peft.utils.peft_types import PeftType
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from dcr.analyses import check_parameters
from dcr.core import models
from dcr.core.config import ConfigError
from dcr.core.models import structure


class LayerKind(Enum):
    """The ways in which a module's parameters enter its output."""

    linear = "linear"
    embedding = "embedding"
    norm = "norm"  # an elementwise gain, with or without a bias
    head = "head"  # a linear module read at the last position alone


ADAPTER = "adapter"
# By what runs, not by class: a subclass with a forward of its own computes something else.
FORWARDS: dict[object, LayerKind] = {
    nn.Linear.forward: LayerKind.linear,
    Conv1D.forward: LayerKind.linear,
    nn.Embedding.forward: LayerKind.embedding,
}


@dataclass(frozen=True)
class Layer:
    """A module with parameters of its own, all of which are in the subset.

    `block` is the block it lies in (from 1), 0 before the blocks, depth + 1 behind them.
    """

    name: str
    module: Any
    kind: LayerKind
    block: int


def layers(model: Any, params: str, head: bool) -> list[Layer]:
    """The modules of a subset, in the order of their blocks.

    `params`: `tail:N`, the last N blocks, the final norm and the head; `trunk:ℓ`, the first ℓ
    blocks alone, without the embeddings; `all`, every base weight; `adapter`, the matrices of the
    active LoRA adapters, which are in no other subset. `head=False` leaves the head's matrix (and
    bias) out, and where it is tied the embeddings with it, since the two are one parameter. Raises
    ConfigError for a subset that the model does not have, and for a module or adapter whose
    gradients this package does not know.
    """
    _check_adapters(model)
    inner = structure.unwrapped(model)
    wanted = _wanted(model, params, head)
    blocks = structure.decoder_blocks(model)
    places = {id(m): i for i, block in enumerate(blocks, 1) for m in block.modules()}
    behind = [structure.final_norm(model), ("head", output_layer(model))]
    places |= {id(entry[1]): len(blocks) + 1 for entry in behind if entry}
    chosen = []
    for name, module in inner.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if any(id(p) in wanted for p in own.values()):
            kind = _kind(name, module, own, output_layer(model))
            chosen.append(Layer(name, module, kind, places.get(id(module), 0)))
    _check_covered(chosen, wanted)
    return sorted(chosen, key=lambda layer: layer.block)


def tied(chosen: Sequence[Layer]) -> tuple[Layer, ...]:
    """The input embedding and the head if they are one matrix of the subset, else nothing."""
    heads = [layer for layer in chosen if layer.kind is LayerKind.head]
    embeddings = [layer for layer in chosen if layer.kind is LayerKind.embedding]
    pairs = [(e, h) for h in heads for e in embeddings if e.module.weight is h.module.weight]
    return pairs[0] if pairs else ()


def parameters(model: Any, params: str, head: bool) -> list[nn.Parameter]:
    """Every parameter of a subset once, whatever its module computes; see `layers`."""
    _check_adapters(model)
    wanted = _wanted(model, params, head)
    return [p for p in structure.unwrapped(model).parameters() if id(p) in wanted]


def output_layer(model: Any) -> nn.Linear:
    """The head itself, without the adapter around it."""
    layer: Any = structure.head(model)
    return getattr(layer, "base_layer", layer)


@contextmanager
def still(model: Any) -> Iterator[None]:
    """Holds the model in evaluation mode without any gradient asked for; then restores both."""
    inner: Any = model
    asked = {parameter: parameter.requires_grad for parameter in inner.parameters()}
    device = next(inner.parameters()).device.type
    try:
        with (
            models.evaluating(inner.requires_grad_(False)),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device, enabled=False),
        ):
            yield
    finally:
        for parameter, asks in asked.items():
            parameter.requires_grad_(asks)


@contextmanager
def restored(moved: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Gives a copy of the parameters, and sets them back to it at the end, to the bit."""
    saved = [parameter.detach().clone() for parameter in moved]
    try:
        yield saved
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, saved, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def move(
    moved: Sequence[nn.Parameter], saved: Sequence[Tensor], along: Sequence[Tensor], by: float
) -> None:
    """Sets the parameters to saved + by·along."""
    for parameter, value, direction in zip(moved, saved, along, strict=True):
        parameter.copy_(value).add_(direction, alpha=by)


def _wanted(model: Any, params: str, head: bool) -> dict[int, str]:
    """The ids of the subset's parameters, with their names."""
    inner, blocks = structure.unwrapped(model), structure.decoder_blocks(model)
    layer = output_layer(model)
    if params == ADAPTER:
        return _of_adapters(model)
    check_parameters("params", [params], len(blocks))
    part, _, number = params.partition(":")
    count = int(number or len(blocks))
    norm = structure.final_norm(model)
    norms = [norm[1]] if norm else []
    roots: dict[str, list[nn.Module]] = {
        "tail": [*blocks[len(blocks) - count :], *norms, layer],
        "trunk": list(blocks[:count]),
        "all": [inner],
    }
    chosen = {id(p) for root in roots[part] for p in root.parameters()}
    dropped = set() if head else {id(p) for p in layer.parameters()}
    every = inner.named_parameters()
    return {
        id(p): name
        for name, p in every
        if id(p) in chosen and id(p) not in dropped and not _in_adapter(name)
    }


def _of_adapters(model: Any) -> dict[int, str]:
    active = set(getattr(model, "active_adapters", ())) if isinstance(model, PeftModel) else set()
    matrices = {
        id(p): name
        for name, p in structure.unwrapped(model).named_parameters()
        if _in_adapter(name) and active & set(name.split("."))
    }
    if not matrices:
        raise ConfigError(
            "params=adapter: the model has no LoRA adapter; measure the weights of a run's SFT, "
            "or choose tail:N, trunk:ℓ or all"
        )
    return matrices


def _kind(name: str, module: nn.Module, own: dict[str, nn.Parameter], head: nn.Module) -> LayerKind:
    kind = FORWARDS.get(type(module).forward)
    if kind is LayerKind.linear:
        return LayerKind.head if module is head else kind
    if kind is None and isinstance(module, nn.Embedding) and hasattr(module, "embed_scale"):
        return LayerKind.embedding  # Gemma's; `exact` checks on its output that it only scales
    if kind is None and set(own) <= {"weight", "bias"} and all(p.dim() == 1 for p in own.values()):
        return LayerKind.norm  # `exact` checks on its output that it is one
    if kind is None:
        raise ConfigError(
            f"params: the gradients of {name} ({type(module).__name__}) are not known to the exact "
            "kernel; choose a subset without it, or method=finite_difference"
        )
    return kind


def _check_covered(chosen: list[Layer], wanted: dict[int, str]) -> None:
    """Raises ConfigError for a parameter that two modules share, but an embedding with the head."""
    users: dict[int, list[LayerKind]] = {key: [] for key in wanted}
    for layer in chosen:
        for name, parameter in layer.module.named_parameters(recurse=False):
            if id(parameter) not in users:
                raise ConfigError(f"params: {layer.name}.{name} is not in the subset, its rest is")
            users[id(parameter)].append(layer.kind)
    pair = [LayerKind.embedding, LayerKind.head]
    for key, kinds in users.items():
        if len(kinds) != 1 and sorted(kinds, key=lambda kind: kind.value) != pair:
            raise ConfigError(
                f"params: {wanted[key]} works in {len(kinds)} modules; the kernel knows no sharing "
                "but that of the embeddings with the head"
            )


def _in_adapter(name: str) -> bool:
    return any(segment.startswith("lora_") for segment in name.split("."))


def _check_adapters(model: Any) -> None:
    """Raises ConfigError for all but LoRA, which keeps a base weight's gradient as if merged."""
    if not isinstance(model, PeftModel):
        return
    for name in model.active_adapters:
        settings = model.peft_config[name]
        dora = getattr(settings, "use_dora", False)
        if settings.peft_type != PeftType.LORA or dora:
            kind = "DoRA" if dora else settings.peft_type
            raise ConfigError(f"adapter {name}: the kernel knows LoRA, not {kind}; merge it first")
