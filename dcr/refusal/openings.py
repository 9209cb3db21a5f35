"""The mass of next-token probability on the first tokens of refusals."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dcr.refusal.continuations import Ending, continuations, ending
from dcr.refusal.phrases import OPENINGS


def refusal_openings(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: list[int] | None = None
) -> Int[Tensor, "tokens"]:
    """The distinct first tokens of refusals at the start of an assistant turn, ascending.

    Without `prompt_ids` the turn is taken to follow a header that ends in a newline. With them
    it follows that prompt, after a space if the prompt ends in a word. "I" is among the tokens
    and starts answers too: the mass on these tokens ranks prompts, it is no probability of refusal.

    Raises PhraseError if the prompt's tokens change once a refusal follows.
    """
    if prompt_ids is None:
        newline = tuple(tokenizer.encode("\n", add_special_tokens=False))
        end = Ending(newline, "\n", spaced=False)
    else:
        end = ending(tokenizer, prompt_ids)
    return torch.tensor(sorted({ids[0] for ids in continuations(tokenizer, end, OPENINGS)}))


def refusal_mass(
    logits: Float[Tensor, "prompts vocabulary"], openings: Int[Tensor, "tokens"]
) -> Float[Tensor, "prompts"]:
    """Softmax (in fp32) of next-token logits, summed over the distinct tokens `openings`."""
    log_p = logits.float().log_softmax(-1)
    return log_p[:, openings.to(logits.device)].logsumexp(-1).clamp(max=0).exp()
