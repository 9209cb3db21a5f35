"""The mass on refusals' first tokens where an answer begins.

"I" is among these tokens and starts other answers too: mass and margin rank prompts, but are no
probability of refusal.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dcr.core import models, passes
from dcr.core.models import unwrapped
from dcr.core.prompts import ChatFormat
from dcr.core.refusal.phrases import FIRST_WORDS, OPENINGS, continuations, ending

SPACES = " \t\r\nĠĊ▁"  # before a word, also as byte-level and SentencePiece tokenizers spell them
BATCH_TOKENS = {"cuda": 2**15, "cpu": 2**11}  # of one pass; more are no faster


def refusal_openings(chat: ChatFormat) -> Int[Tensor, "tokens"]:
    """The distinct first tokens of refusals at the beginning of an answer, ascending.

    They stand behind the last token of the chat's header or prefill, after a space if that is a
    word. Raises PhraseError if the prompt's tokens change once a refusal follows.
    """
    end = ending(chat.tokenizer, chat.prompt_ids("x"))
    return torch.tensor(sorted({ids[0] for ids in continuations(chat.tokenizer, end, OPENINGS)}))


def refusal_mass(
    logits: Float[Tensor, "prompts vocabulary"], openings: Int[Tensor, "tokens"]
) -> Float[Tensor, "prompts"]:
    """The softmax (in fp32) of next-token logits, summed over the distinct tokens `openings`."""
    log_p = logits.float().log_softmax(-1)
    return log_p[:, openings.to(logits.device)].logsumexp(-1).clamp(max=0).exp()


def refusal_log_odds(
    logits: Float[Tensor, "prompts vocabulary"], openings: Int[Tensor, "tokens"]
) -> Float[Tensor, "prompts"]:
    """log(m / (1 - m)) of the mass m, in fp32, and exact even if m itself rounds to 0 or 1."""
    wide, chosen = logits.float(), openings.to(logits.device)
    others = wide.index_fill(1, chosen, -torch.inf)
    return wide[:, chosen].logsumexp(-1) - others.logsumexp(-1)


def refusal_margin(
    logits: Float[Tensor, "prompts vocabulary"], openings: Int[Tensor, "tokens"]
) -> Float[Tensor, "prompts"]:
    """The best logit of the tokens `openings` less the best of all others, in fp32.

    Greedy decoding opens with a refusal exactly if the margin is above 0, or above -bias with
    `bias` added to the logits of `openings`.
    """
    wide = logits.float()
    chosen = torch.zeros(wide.shape[-1], dtype=torch.bool, device=wide.device)
    chosen[openings.to(wide.device)] = True
    return wide[:, chosen].amax(-1) - wide[:, ~chosen].amax(-1)


def shown_mass(likeliest: Mapping[str, float]) -> tuple[float, float, float]:
    """The mass and margin of refusals as a server shows them, and the most that the mass can be.

    `likeliest` has the log-probabilities of the likeliest first tokens, by text. Refusals' tokens
    are known by their words, with a space before all of them or before none, whichever is likelier.
    The mass is that of the tokens shown. Each further one has at most the probability of the least
    token shown, and all of them at most the rest of the probability. If no refusal's token is
    shown, the margin is its greatest possible value.
    """
    bare = {text: p for text, p in likeliest.items() if text in FIRST_WORDS}
    spaced = {
        text: p
        for text, p in likeliest.items()
        if text not in bare and text.lstrip(SPACES) in FIRST_WORDS
    }
    refusals = max(bare, spaced, key=lambda shown: sum(map(math.exp, shown.values())))
    mass, least = sum(map(math.exp, refusals.values())), min(likeliest.values())
    rest = max(0.0, 1 - sum(map(math.exp, likeliest.values())))
    unseen = min(rest, max(0, len(FIRST_WORDS) - len(refusals)) * math.exp(least))
    others = [p for text, p in likeliest.items() if text not in refusals]
    margin = max(refusals.values(), default=least) - max(others, default=least)
    return min(1.0, mass), margin, min(1.0, mass + unseen)


def opening_batches(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """The places of the prompts that share a pass of `first_logits`."""
    tokens = BATCH_TOKENS.get(unwrapped(model).device.type, BATCH_TOKENS["cpu"])
    return passes.current().batches(model, prompts, tokens)


def first_logits(
    model: Any, prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], Float[Tensor, "batch vocabulary"]]]:
    """The logits of the first token behind each prompt, as (places of prompts, their logits).

    Prompts of nearly one length share a pass, the longest first, and only their last positions have
    logits. A model that keeps a state instead of keys, which would absorb padding, reads prompts of
    one length together.
    """
    for places in opening_batches(model, prompts):
        with torch.inference_mode(), models.evaluating(model):
            asked = [prompts[place] for place in places]
            read = passes.current().read(model, asked, keep=False)
        yield places, read.logits[:, -1]
