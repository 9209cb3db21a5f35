"""Candidate directions: differences of means at the template's tokens behind the instruction."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dcr.activations import Site
from dcr.config import ConfigError
from dcr.prompts import ChatFormat
from dcr.steering import vectors

Tokens = list[int]

PLACEHOLDER = "0x5f3759df"  # an instruction that no template holds
# A vector that is shorter than this share of those it is a difference of is their rounding.
ROUNDING = 1e-6


def tail(chat: ChatFormat, sequences: Sequence[Tokens]) -> Tokens:
    """The template's tokens behind the instruction, the assistant's header with them.

    Only those that every one of `sequences` ends with: some tokenizers join the end of an
    instruction with the beginning of what follows. Raises ConfigError where there is none.
    """
    text = chat.text(PLACEHOLDER).rpartition(PLACEHOLDER)[2]
    behind = chat.tokenizer.encode(text, add_special_tokens=False)
    shared = len(behind)
    while any(ids[len(ids) - shared :] != behind[len(behind) - shared :] for ids in sequences):
        shared -= 1
    if shared == 0:
        raise ConfigError(
            "model.template: no token of the chat template stands behind the instruction, where "
            "Surgical takes its vectors; give chatml, llama3 or a .jinja file with one"
        )
    return behind[len(behind) - shared :]


def directions(
    model: Any, kept: Mapping[str, Sequence[Tokens]], positions: int, blocks: int, batch_size: int
) -> tuple[Float[Tensor, "positions blocks width"], Float[Tensor, "positions blocks width"]]:
    """r = harmful − harmless and w = seemingly toxic − harmless, of the inputs of blocks.

    At the last `positions` tokens of each prompt and the first `blocks` blocks, in fp32 on the CPU
    (means in fp64). NaN where the kinds do not differ, as at the first block's input.
    """
    means = {}
    for kind, rows in kept.items():
        offsets = [list(range(-positions, 0))] * len(rows)
        states = vectors.read(model, rows, offsets, batch_size, Site.block_input, blocks)
        means[kind] = states.cpu().mean(1, dtype=torch.float64).transpose(0, 1)
    found = []
    for kind in ("harmful", "seemingly_toxic"):
        difference = means[kind] - means["harmless"]
        found.append(_or_nan(difference, means["harmless"]).float())
    return found[0], found[1]


def orthogonalised(
    false: Float[Tensor, "positions blocks width"],
    harmful: Float[Tensor, "positions blocks width"],
    share: float,
) -> Float[Tensor, "positions blocks width"]:
    """w' = w − λ(w·r / r·r)r of each place, then scaled to length 1; NaN where nothing is left."""
    w, r = false.double(), harmful.double()
    along = (w * r).sum(-1, keepdim=True) / (r * r).sum(-1, keepdim=True)
    left = _or_nan(w - share * along * r, w)
    return (left / left.norm(dim=-1, keepdim=True)).float()


def _or_nan(
    difference: Float[Tensor, "*places width"], of: Float[Tensor, "*places width"]
) -> Float[Tensor, "*places width"]:
    length = difference.norm(dim=-1, keepdim=True)
    real = length > ROUNDING * of.norm(dim=-1, keepdim=True)
    return torch.where(real, difference, torch.nan)
