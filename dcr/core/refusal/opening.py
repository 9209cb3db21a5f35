"""What the first token of an answer says of refusing: the mass on refusals' first tokens.

"I" is among these tokens and starts answers too: mass and margin rank prompts, they are no
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
BATCH_TOKENS = {"cuda": 2**15, "cpu": 2**11}  # of one pass: more at once are no faster


def refusal_openings(chat: ChatFormat) -> Int[Tensor, "tokens"]:
    """The distinct first tokens of refusals where an assistant's answer begins, ascending.

    Behind the last token of the chat's header, or of its prefill; after a space where that is a
    word. Raises PhraseError if the prompt's tokens change once a refusal follows.
    """
    end = ending(chat.tokenizer, chat.prompt_ids("x"))
    return torch.tensor(sorted({ids[0] for ids in continuations(chat.tokenizer, end, OPENINGS)}))


def refusal_mass(
    logits: Float[Tensor, "prompts vocabulary"], openings: Int[Tensor, "tokens"]
) -> Float[Tensor, "prompts"]:
    """Softmax (in fp32) of next-token logits, summed over the distinct tokens `openings`."""
    log_p = logits.float().log_softmax(-1)
    return log_p[:, openings.to(logits.device)].logsumexp(-1).clamp(max=0).exp()


def refusal_log_odds(
    logits: Float[Tensor, "prompts vocabulary"], openings: Int[Tensor, "tokens"]
) -> Float[Tensor, "prompts"]:
    """log(m / (1 - m)) of the mass m, in fp32 and exact where m itself rounds to 0 or 1."""
    wide, chosen = logits.float(), openings.to(logits.device)
    others = wide.index_fill(1, chosen, -torch.inf)
    return wide[:, chosen].logsumexp(-1) - others.logsumexp(-1)


def refusal_margin(
    logits: Float[Tensor, "prompts vocabulary"], openings: Int[Tensor, "tokens"]
) -> Float[Tensor, "prompts"]:
    """How far the best of the tokens `openings` lies above the best of all others, in fp32 logits.

    Greedy decoding opens with a refusal exactly where it is above 0, and with `bias` added to the
    logits of `openings` where it is above -bias.
    """
    wide = logits.float()
    among = torch.zeros(wide.shape[-1], dtype=torch.bool, device=wide.device)
    among[openings.to(wide.device)] = True
    return wide[:, among].amax(-1) - wide[:, ~among].amax(-1)


def shown_mass(likeliest: Mapping[str, float]) -> tuple[float, float, float]:
    """Mass and margin of refusals as a server shows them, and the most that the mass can be.

    `likeliest` has the log-probabilities of the likeliest first tokens, by text. Refusals' tokens
    are known by their words, with a space before all of them or before none, whichever is likelier.
    The mass is that of those shown; each further one has at most the probability of the least token
    shown, and all of them what the shown ones leave. Where no refusal's token is shown, the
    margin is the most that it can be.
    """
    bare = {text: p for text, p in likeliest.items() if text in FIRST_WORDS}
    spaced = {
        text: p
        for text, p in likeliest.items()
        if text not in bare and text.lstrip(SPACES) in FIRST_WORDS
    }
    found = max(bare, spaced, key=lambda shown: sum(map(math.exp, shown.values())))
    mass, least = sum(map(math.exp, found.values())), min(likeliest.values())
    left = max(0.0, 1 - sum(map(math.exp, likeliest.values())))
    unseen = min(left, max(0, len(FIRST_WORDS) - len(found)) * math.exp(least))
    others = [p for text, p in likeliest.items() if text not in found]
    margin = max(found.values(), default=least) - max(others, default=least)
    return min(1.0, mass), margin, min(1.0, mass + unseen)


def opening_batches(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of the prompts that share a pass of `first_logits`."""
    tokens = BATCH_TOKENS.get(unwrapped(model).device.type, BATCH_TOKENS["cpu"])
    return passes.current().batches(model, prompts, tokens)


def first_logits(
    model: Any, prompts: Sequence[Sequence[int]]
) -> Iterator[tuple[list[int], Float[Tensor, "batch vocabulary"]]]:
    """The logits of the first token behind each prompt: places of prompts, and theirs.

    Prompts of nearly one length share a pass, the longest first, and logits are made for their last
    positions alone. A model that keeps a state instead of keys, into which padding would blend,
    reads those of one length together.
    """
    for places in opening_batches(model, prompts):
        with torch.inference_mode(), models.evaluating(model):
            asked = [prompts[place] for place in places]
            read = passes.current().read(model, asked, keep=False)
        yield places, read.logits[:, -1]
