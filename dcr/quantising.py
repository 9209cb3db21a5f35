"""Weights in four bits: the layers of a base as NF4 (QLoRA, arXiv 2305.14314), and in full again.

The blocks' linear layers are held so. Embeddings, norms, routed experts and head keep the type of
the stage's precision. A layer's numbers follow from the weights in the file alone, so they are the
same in every precision; products are computed in that of the stage, bf16 under autocast. Layers
are frozen, and only an adapter on them can be trained.
"""

import importlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcr.core import storage
from dcr.core.config import ConfigError, Precision, check_installed
from dcr.core.models import folders, structure, whole_model
from dcr.core.models.structure import DTYPES

BLOCK = 64  # weights of one scale
# Half a byte, and for a block a scale of a byte, itself scaled in fp32 with 255 others.
NF4_BYTES = 1 / 2 + (1 + 4 / 256) / BLOCK


def open_quantised(source: str, precision: Precision, called: str, **options: Any) -> Any:
    """The `whole_model` of a source in four bits. Raises as that and `quantise` do."""
    check_installed("bitsandbytes", "memory", f"{called or source}: in four bits")
    # in the type of the file, whose pages are read and left again
    model = whole_model(source, "auto", called, **options)
    quantise(model, precision)
    return model


def int8_adamw(weights: Iterable[Tensor], **options: Any) -> torch.optim.Optimizer:
    """AdamW whose two moments of each weight are held in a byte each."""
    with warnings.catch_warnings(action="ignore"):  # of torch's older parts
        made = importlib.import_module("bitsandbytes.optim").AdamW8bit
    return made(weights, **options)


def quantisable(model: Any) -> Iterator[tuple[nn.Module, str, nn.Linear]]:
    """The linear layers that four bits can hold, each with its block and its name in there.

    Inputs of another width than a multiple of 64 are left out: bitsandbytes 0.50 gives wrong
    numbers for those on a CPU with AVX-512.
    """
    for block in structure.decoder_blocks(model):
        for name, layer in list(block.named_modules()):
            if type(layer) is nn.Linear and layer.in_features % BLOCK == 0:
                yield block, name, layer


def is_narrow(layer: nn.Module) -> bool:
    """Whether a layer is held in four bits."""
    return type(layer).__name__ == "Linear4bit"


@torch.no_grad()
def quantise(model: Any, precision: Precision) -> None:
    """Holds the blocks' linear layers as NF4, and all other weights in the type of `precision`.

    Raises ConfigError if there is no such layer.
    """
    # not at the top, nor by name: an extra
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    product = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    kind = type(model).__name__
    layers = list(quantisable(model))
    if not layers:
        raise ConfigError(
            f"model.quantization=nf4: the blocks of {kind} have no linear layer whose inputs are a "
            f"multiple of {BLOCK}; leave it out"
        )
    for block, name, layer in layers:
        with torch.device("meta"):
            narrow = bnb.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=product,
                quant_type="nf4",
            )
        # it would compute evaluations in bf16, and lay weights out anew with rounded scales
        narrow.support_avx512bf16_for_cpu = False
        narrow.weight = bnb.Params4bit(layer.weight.data, quant_type="nf4", module=narrow).to("cpu")
        narrow.weight.quant_state.dtype = product
        narrow.bias = layer.bias
        block.set_submodule(name, narrow.train(layer.training))
    for weight in model.parameters():
        if weight.is_floating_point():
            weight.data = weight.data.to(DTYPES[precision])
            weight.requires_grad = False
    model.config.dtype = DTYPES[precision]


# --- the way back ---


def open_base(folder: Path, trust_remote_code: bool = False) -> Any:
    """The base weights of an adapter folder alone, as they are in their file.

    Raises UserError as `open_adapter` does.
    """
    revision = storage.read_json(folder / "adapter_config.json", folders.AdapterSettings).revision
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    return whole_model(folders.adapter_base(folder), "auto", **options)


@torch.no_grad()
def dequantise(model: Any) -> None:
    """Puts plain linear layers in the place of those in four bits, of the numbers they stand for.

    Their type is the one that products are computed in.
    """
    for parent in list(model.modules()):
        for name, narrow in list(parent.named_children()):
            if is_narrow(narrow):
                with torch.device("meta"):
                    plain = nn.Linear(narrow.in_features, narrow.out_features, bias=False)
                plain.weight = nn.Parameter(weight_of(narrow), requires_grad=False)
                plain.bias = narrow.bias
                setattr(parent, name, plain.train(narrow.training))


def weight_of(narrow: Any) -> Tensor:
    """The numbers that a layer in four bits stands for, as [rows, columns]."""
    functional: Any = importlib.import_module("bitsandbytes.functional")
    return functional.dequantize_4bit(narrow.weight.data, narrow.weight.quant_state)


@torch.no_grad()
def rounding_errors(model: Any, whole: Any) -> list[float]:
    """How far each layer in four bits is from the same model's in full: ‖difference‖ / ‖weights‖.

    Layers are in the order of the blocks.
    """
    layers = structure.decoder_blocks(model).modules()
    narrow = [layer for layer in layers if is_narrow(layer)]
    full = [layer.weight.float() for _, _, layer in quantisable(whole)]
    pairs = zip(narrow, full, strict=True)
    return [float((weight_of(layer).float() - w).norm() / w.norm()) for layer, w in pairs]
