"""A stage takes the parts of a model that it trains and runs, and saves its result as a folder."""

import copy
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dcr.core import storage
from dcr.core.config import Quantization
from dcr.core.models import ORIGIN_FILE, Policy, structure
from dcr.core.storage import replaced_folder, weights_fingerprint


def trunk(model: Any, block: int) -> nn.Module:
    """The backbone cut after the `block`-th block (1-based), sharing its parameters.

    Called like the backbone; `last_hidden_state` is then HF's `hidden_states[block]`: no later
    block and no final norm runs.
    """
    blocks, parent = structure.decoder_blocks(model), structure.backbone(model)
    name = next(name for name, child in parent.named_children() if child is blocks)
    cut = copy.copy(parent)
    cut._modules = dict(parent._modules)
    cut._modules[name] = blocks[:block]
    norm = structure.final_norm(model)
    if norm is not None:
        cut._modules[norm[0]] = nn.Identity()
    config: Any = copy.deepcopy(parent.config)
    config.get_text_config().num_hidden_layers = block
    cut.config = config
    return cut


def freeze_beyond(model: PreTrainedModel, block: int, train_embeddings: bool | None) -> None:
    """Leaves only blocks 1 to `block` trainable (Section 5), and the input embeddings if asked.

    `train_embeddings=None` trains untied embeddings and freezes tied ones, since the tied matrix is
    the head, which is part of the frozen tail.
    """
    model.requires_grad_(False)
    structure.decoder_blocks(model)[:block].requires_grad_(True)
    embeddings = model.get_input_embeddings()
    tied = structure.head(model).weight is embeddings.weight
    if (not tied) if train_embeddings is None else train_embeddings:
        embeddings.requires_grad_(True)


def head_arguments(model: Any) -> dict[str, Any]:
    """The head's arguments of `losses.token_nll`, by name, for final-normed hidden states.

    They include the soft cap and the logit scale of the model's configuration.
    """
    layer, text = structure.head(model), structure.unwrapped(model).config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    return {
        "head_weight": gathered(layer.weight),
        "bias": None if layer.bias is None else gathered(layer.bias),
        "softcap": getattr(text, "final_logit_softcapping", None),
        "logit_scale": scale / (getattr(text, "logits_scaling", None) or 1.0),
    }


def gathered(tensor: Tensor) -> Tensor:
    """The tensor itself, or the gathered whole of a sharded one, which every process must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable weight by name, whole and detached; sharded ones on the CPU."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: gathered(weight).cpu() if isinstance(weight, DTensor) else weight
        for name, weight in weights.items()
    }


def is_sharded(module: nn.Module) -> bool:
    """Whether this process holds only parts of the weights."""
    return any(isinstance(weight, DTensor) for weight in module.parameters())


def save_full(policy: Policy, folder: Path) -> None:
    """Writes weights and tokenizer as a Hugging Face folder with checksums, whole or not at all."""
    with replaced_folder(folder) as staging:
        policy.model.save_pretrained(staging)
        policy.tokenizer.save_pretrained(staging)
        storage.write_checksums(staging)


def save_adapter(
    policy: Policy, folder: Path, base: Path | str, weights: dict[str, Tensor] | None = None
) -> None:
    """Writes a PEFT adapter folder with checksums that names its base weights.

    `weights` are those that `trained_weights` gathers from a sharded model. `adapter_config.json`
    holds the absolute path, which `peft` opens, and `dcr.json` the relative one with a fingerprint,
    which survives a move of the run folder.
    """
    local = Path(base).is_dir()
    name = str(Path(base).resolve()) if local else str(base)
    told = {
        "base": os.path.relpath(name, folder.resolve()) if local else name,
        "fingerprint": weights_fingerprint(Path(base)) if local else None,
    }
    if structure.is_quantised(policy.model):  # else the file is as in older adapters
        told["quantization"] = Quantization.nf4.value
    with replaced_folder(folder) as staging:
        for settings in policy.model.peft_config.values():
            settings.base_model_name_or_path = name
            # the order of a set changes from process to process
            settings.target_modules = sorted(settings.target_modules)
        # no embedding was resized, for which PEFT would ask the hub for the base
        policy.model.save_pretrained(staging, save_embedding_layers=False, state_dict=weights)
        policy.tokenizer.save_pretrained(staging)
        (staging / ORIGIN_FILE).write_text(json.dumps(told, indent=1) + "\n")
        storage.write_checksums(staging)
