"""Code that the methods share: hidden states of prompts, unit directions, and stored vectors."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dcr import activations
from dcr.activations import Site
from dcr.core import storage
from dcr.core.config import ConfigError, DataError
from dcr.core.machine import attention_mask, padded
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.sources import Example

Info = dict[str, Any]  # JSON
Vectors = tuple[dict[str, Tensor], Info]  # tensors by name, and their record
BATCH_SIZE = 8  # prompts of one pass
PLACEHOLDER = "0x5f3759df"  # a prompt that no template holds


def encoded(chat: ChatFormat, rows: Sequence[Example]) -> list[list[int]]:
    """The token ids of the templated prompts, with the header of the answer."""
    return [chat.prompt_ids(row.prompt) for row in rows]


def tokens_after_prompt(chat: ChatFormat) -> list[int]:
    """The template's tokens behind the user's words, including the assistant's header."""
    text = chat.text(PLACEHOLDER).rpartition(PLACEHOLDER)[2]
    return chat.tokenizer.encode(text, add_special_tokens=False)


def read_states(
    model: Any,
    sequences: Sequence[Sequence[int]],
    offsets: Sequence[Sequence[int]],
    site: Site = Site.block_output,
    until: int | None = None,
    size: int = BATCH_SIZE,
) -> Float[Tensor, "blocks rows places width"]:
    """Hidden states of each sequence at `offsets[row]`, counted from its end (-1: last token).

    One pass a batch reads blocks 1 to `until` (None: all); the result is fp32 on the model's
    device.
    """
    parts = []
    for start in range(0, len(sequences), size):
        batch = sequences[start : start + size]
        ids = padded(batch, 0, left=True).to(model.device)
        mask = attention_mask(batch, left=True).to(ids.device)
        places = torch.tensor(offsets[start : start + size], device=ids.device) + ids.shape[1]
        parts.append(activations.states(model, ids, mask, places, site, until))
    return torch.cat(parts, 1)


def unit(vectors: Float[Tensor, "*places width"], what: str) -> Float[Tensor, "*places width"]:
    """Each vector scaled to length 1. Raises ConfigError if one has no direction."""
    norms = vectors.norm(dim=-1, keepdim=True)
    if not bool((norms > 0).all() and norms.isfinite().all()):
        raise ConfigError(
            f"data.extraction: {what} do not differ in every block, so there is no direction; "
            "name other sources"
        )
    return vectors / norms


def cached(folder: Path | None, key: Mapping[str, object], find: Callable[[], Vectors]) -> Vectors:
    """The vectors that `folder` holds under `key`, or those of `find`, which it then stores.

    `key` is everything that the tensors depend on. Without a folder nothing is stored. Raises
    DataError for a damaged file.
    """
    if folder is None:
        return find()
    file = folder / f"{key['method']}-{storage.fingerprint(key)}.safetensors"
    if not file.is_file():
        tensors, info = find()
        plain = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        recorded = json.dumps(info)
        sha256 = _checksum(plain, json.loads(recorded))
        storage.write_bytes(file, save(plain, metadata={"info": recorded, "sha256": sha256}))
    try:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        info = json.loads(metadata["info"])
        if metadata["sha256"] != _checksum(tensors, info):
            raise ValueError("another checksum")
    except (OSError, SafetensorError, TypeError, KeyError, ValueError) as error:
        raise DataError(
            f"{file}: damaged; delete it, and the same command computes it again"
        ) from error
    return tensors, info


def _checksum(tensors: Mapping[str, Tensor], info: Info) -> str:
    """The SHA-256 of a file's tensors and record."""
    digest = hashlib.sha256(json.dumps(info, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(
            name.encode() + tensors[name].contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()


def trace(policy: Policy) -> str:
    """Tells one set of weights from another by the ends of every tensor (12 hex digits).

    No proof of equality, but training moves nearly every weight, and this takes milliseconds.
    """
    digest = hashlib.sha256()
    for name, weight in policy.model.named_parameters():
        ends = torch.cat(
            [weight.detach().flatten()[part] for part in (slice(64), slice(-64, None))]
        )
        digest.update(name.encode() + ends.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
