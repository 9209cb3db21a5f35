"""How strongly a model is about to refuse, and how far an edit moves what it is about to say."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcr.config import ConfigError
from dcr.prompts import ChatFormat
from dcr.refusal.phrases import PhraseError, checked, continuations, ending
from dcr.refusal.probability import prefill


def openings(chat: ChatFormat, words: Sequence[str]) -> Int[Tensor, " refusals"]:
    """The distinct first tokens of `words` where the assistant begins to speak, ascending.

    A word that the tokenizer splits counts by its first part. Raises ConfigError for no word or an
    empty one, and where the template's own tokens change once a word follows.
    """
    end = ending(chat.tokenizer, chat.prompt_ids("x"))
    try:
        found = continuations(chat.tokenizer, end, checked(words))
    except PhraseError as error:
        raise ConfigError(f"steering.surgical.refusal_tokens: {error}") from error
    return torch.tensor(sorted({ids[0] for ids in found}))


def last_log_p(
    model: Any, sequences: Sequence[Sequence[int]], batch_size: int
) -> Float[Tensor, "prompts vocabulary"]:
    """Log-probabilities (in fp32 or wider) of the token that follows each sequence."""
    parts = []
    with torch.no_grad():
        for start in range(0, len(sequences), batch_size):
            batch = [tuple(ids) for ids in sequences[start : start + batch_size]]
            logits = prefill(model, batch).logits[:, -1]
            wide = torch.promote_types(logits.dtype, torch.float32)
            parts.append(logits.to(wide).log_softmax(-1))
    return torch.cat(parts)


def refusal_scores(
    log_p: Float[Tensor, "prompts vocabulary"], refusals: Int[Tensor, " refusals"]
) -> Float[Tensor, " prompts"]:
    """log p_R − log(1 − p_R), p_R the probability of all refusal tokens.

    Both are sums of exponentials, so neither underflows and nothing is subtracted from 1.
    """
    chosen = torch.zeros(log_p.shape[-1], dtype=torch.bool, device=log_p.device)
    chosen[refusals] = True
    return log_p[:, chosen].logsumexp(-1) - log_p[:, ~chosen].logsumexp(-1)


def divergence(
    clean: Float[Tensor, "prompts vocabulary"], edited: Float[Tensor, "prompts vocabulary"]
) -> Float[Tensor, " prompts"]:
    """KL(clean ‖ edited) in nats of log-probabilities."""
    return (clean.exp() * (clean - edited)).sum(-1)
