"""The weights of a model that a stage trains, and the folder that its result is written as."""

import json
import os
from pathlib import Path

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from dcr.core import storage
from dcr.core.config import Quantization
from dcr.core.models import ORIGIN_FILE, Policy, structure
from dcr.core.storage import replaced_folder, weights_fingerprint


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


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every trainable weight by name, whole and detached; sharded ones on the CPU."""
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: structure.whole(weight).cpu() if isinstance(weight, DTensor) else weight
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
