"""Self-CD: greedy decoding against what a system prompt that stresses safety would add.

Shi et al. 2024, "Navigating the OverKill in Large Language Models" (arXiv 2401.17633). They start
from the logits y with the emphasis and, with y' without it, decode from softmax(y - a (y - y')).
Here the model as it is evaluated comes first: y' + weight (y' - y), the same for weight = a - 1,
so that 0 is the model itself and their a = 2.5 is 1.5. On log-probabilities instead of logits the
distribution would be the same, since the two differ by one constant a position.

The emphasis is in our own words, and stands behind the system prompt that the model has anyhow: the
user's, or the one that its template writes by itself.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from dcr import batching
from dcr.batching import attention_mask, padded
from dcr.config import ConfigError
from dcr.generation.completions import Encoded
from dcr.models import Policy, unwrapped
from dcr.prompts import ChatFormat

EMPHASIS = (
    "Safety comes before everything else. Before you answer, ask yourself whether the request or "
    "your reply could be harmful, illegal, unethical, hateful, dangerous or offensive in any way. "
    "If there is any risk, do not help."
)
NEEDED = ("attention_mask", "position_ids", "past_key_values", "logits_to_keep")


@dataclass(frozen=True)
class Context:
    """One of the two ways that a batch of prompts is read, up to the newest token."""

    mask: Bool[Tensor, "rows width"]
    cache: Cache
    logits: Float[Tensor, "rows vocabulary"]  # behind the newest token, in fp32


def stressed(chat: ChatFormat) -> ChatFormat:
    """The same chat with the emphasis in its system prompt; ConfigError where it cannot stand."""
    return chat.with_system(EMPHASIS, "gen.self_cd")


def emphasised(policy: Policy, chat: ChatFormat, encoded: Sequence[Encoded]) -> list[Encoded]:
    """The same prompts with the emphasis before them.

    Raises ConfigError for a template that cannot hold it, and for a model that does not keep what
    it has read in a key-value cache beside positions and a mask.
    """
    accepted = inspect.signature(unwrapped(policy.model).forward).parameters
    if lacking := [name for name in NEEDED if name not in accepted]:
        raise ConfigError(
            f"gen.self_cd: {policy.name} takes no {lacking[0]}, which contrasting needs; "
            "leave gen.self_cd out"
        )
    other = stressed(chat)
    return [(row, other.prompt_ids(row.prompt)) for row, _ in encoded]


def contrasted(
    plain: Float[Tensor, "rows vocabulary"],
    stressed: Float[Tensor, "rows vocabulary"],
    weight: float,
) -> Float[Tensor, "rows vocabulary"]:
    """plain + weight (plain - stressed): see the module's docstring."""
    return plain + weight * (plain - stressed)


@torch.inference_mode()
def continued(
    policy: Policy,
    chat: ChatFormat,
    prompts: Sequence[Sequence[int]],
    others: Sequence[Sequence[int]],
    max_new_tokens: int,
    score: Callable[[Tensor], Tensor],
    weight: float,
) -> tuple[list[list[int]], Tensor]:
    """Greedy new tokens of each prompt (padded behind its end), and `score` of its first logits.

    `others` are the same prompts with the emphasis; `score` is given the contrasted logits.
    """
    device, contexts = policy.model.device, []
    for read in (prompts, others):
        ids = padded(read, chat.stop[0], left=True).to(device)
        contexts.append(_heard(policy, ids, attention_mask(read, left=True).to(device), None))
    plain, other = contexts
    logits = contrasted(plain.logits, other.logits, weight)
    masses = score(logits)
    stop = torch.tensor(chat.stop, device=logits.device)
    tokens = [logits.argmax(1)]
    ended = torch.isin(tokens[0], stop)
    while len(tokens) < max_new_tokens and not bool(ended.all()):
        plain, other = (_stepped(policy, context, tokens[-1]) for context in (plain, other))
        tokens.append(contrasted(plain.logits, other.logits, weight).argmax(1))
        ended |= torch.isin(tokens[-1], stop)
    return torch.stack(tokens, 1).tolist(), masses


def _stepped(policy: Policy, context: Context, newest: Int[Tensor, "rows"]) -> Context:
    mask = torch.cat([context.mask, torch.ones_like(context.mask[:, :1])], 1)
    return _heard(policy, newest[:, None], mask, context.cache)


def _heard(
    policy: Policy,
    ids: Int[Tensor, "rows new"],
    mask: Bool[Tensor, "rows width"],
    cache: Cache | None,
) -> Context:
    """The context with these tokens behind it, in one forward pass."""
    positions = batching.positions(mask)[:, -ids.shape[1] :]
    output = policy.model(
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Context(mask, output.past_key_values, output.logits[:, -1].float())
