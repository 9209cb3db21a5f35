"""The way back from a base in four bits: its layers in full, and how far rounding took them."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dcr.core import storage
from dcr.core.models import folders, structure, whole_model


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
            if structure.is_narrow(narrow):
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
    narrow = [layer for layer in layers if structure.is_narrow(layer)]
    full = [layer.weight.float() for _, _, layer in structure.quantisable(whole)]
    pairs = zip(narrow, full, strict=True)
    return [float((weight_of(layer).float() - w).norm() / w.norm()) for layer, w in pairs]
