"""The token that training responses end with, see `sft.terminator`."""

import logging
import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from dcr.core.config import Terminator

log = logging.getLogger(__name__)


def chosen_end(
    tokenizer: Tokenizer,
    terminator: Terminator,
    chat_end: int | None,
    stop: Sequence[int],
    output_rows: Float[Tensor, "vocabulary width"],
) -> int:
    """The token that training responses end with: the chat's end, or the base's end of text.

    `auto` takes the latter if the output row of the former looks untrained, since LoRA leaves the
    head alone and would never learn to emit it.
    """
    end = stop[0]
    # an instruct tokenizer names the chat end as its end of text: its base's own comes after it
    base = end if chat_end is None else next((token for token in stop if token != end), end)
    if terminator is Terminator.base_eos:
        return base
    if terminator is Terminator.chat_end or base == end:
        return end
    if looks_trained(output_rows, end, unused_tokens(tokenizer, len(output_rows))):
        return end
    log.warning(
        "the chat-end token %r looks untrained: responses end with %r instead "
        "(sft.terminator=chat_end keeps it)",
        tokenizer.convert_ids_to_tokens(end),
        tokenizer.convert_ids_to_tokens(base),
    )
    return base


def unused_tokens(tokenizer: Tokenizer, rows: int) -> list[int]:
    """The token ids that no training text can have held: padding rows and reserved names."""
    padding = list(range(len(tokenizer), rows))
    reserved = [
        index
        for index, token in tokenizer.added_tokens_decoder.items()
        if any(word in token.content.lower() for word in ("reserved", "unused", "<|extra_"))
    ]
    return sorted({*padding, *reserved} & set(range(rows)))


def looks_trained(rows: Float[Tensor, "vocabulary width"], token: int, unused: list[int]) -> bool:
    """Whether a token's output row differs from rows that training never touched.

    An untouched row either has hardly any norm, or lies as near to the mean of the unused rows as
    they do.
    """
    norms = rows.detach().float().norm(dim=1)
    if norms[token] < 0.25 * norms.median():
        return False
    others = [index for index in unused if index != token]
    if len(others) < 2:
        return True
    reference = rows[others].detach().float()
    centre = reference.mean(0)
    # in high dimension, rows of one random initialisation lie at nearly one distance from their
    # mean, and a row that is part of the mean lies nearer to it than one that is not
    part = math.sqrt((len(others) + 1) / (len(others) - 1))
    spread = part * (reference - centre).norm(dim=1).median()
    return bool((rows[token].detach().float() - centre).norm() > 1.25 * spread + 1e-6)
