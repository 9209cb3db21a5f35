"""The kernel of a model between prompts, from one set of settings."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dcr import models
from dcr.config import ConfigError
from dcr.ntk import memory, subset
from dcr.ntk.capture import batches, by_length
from dcr.ntk.exact import Found, exact
from dcr.ntk.finite import finite_differences

METHODS = ("exact", "finite_difference")
TIED = ("whole", "head")


@dataclass(frozen=True)
class Settings:
    """What a kernel is of, and how it is computed.

    `tied` says what a tied matrix counts as: `whole`, one parameter that acts as embedding and as
    head, as training moves it; `head`, a matrix of the head's own, so that `tail:N` needs no
    gradient below its blocks. `batch_size` and `budget_gib` (what is held of A and δ at once)
    change no value; `epsilon` is the paper's step, for finite differences alone.
    """

    top_k: int = 10
    params: str = "tail:2"
    head: bool = True
    tied: str = "whole"
    method: str = "exact"
    batch_size: int = 8
    budget_gib: float = 8.0
    epsilon: float = 1e-3


@dataclass(frozen=True)
class Kernel:
    """K(x',x)[o,u] = ⟨∇z_o(x'), ∇z_u(x)⟩ of next-token logits z at each prompt's last position.

    `norms[i, j]` is ‖K(x'=i, x=j)‖_F, un-normalised: row the observer, column the trained prompt.
    `blocks` are the signed values, K(x'=i, x=j)[o,u] at [i, o, j, u], ranks as in `tokens`, which
    are each prompt's most likely first and `log_probabilities` theirs. All on the CPU.
    """

    norms: Float[Tensor, "observer trained"]
    blocks: Float[Tensor, "observer rank trained rank"]
    tokens: Int[Tensor, "prompts rank"]
    log_probabilities: Float[Tensor, "prompts rank"]
    ids: tuple[str, ...]
    settings: Settings


def kernel(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    top_k: int = 10,
    params: str = "tail:2",
    head: bool = True,
    method: str = "exact",
) -> Float[Tensor, "observer trained"]:
    """‖K(x',x)‖_F between prompts (A.6), un-normalised: row the observer x', column the trained x.

    `model` is any causal language model of transformers, or a PEFT one: then the kernel is over
    the base weights with the adapter in effect. Prompts go through the tokenizer's chat template,
    with the generation prompt, where it has one, and bare where not. `params` is `tail:N` (the
    last N blocks, the final norm and the head), `trunk:ℓ` (the first ℓ blocks alone) or `all`; a
    tied matrix counts once, with all it does. `head=False` leaves the head's matrix out.
    `method` is `exact` or `finite_difference`. Weights, gradients, modes and flags are left as
    they were. Raises ConfigError for a setting or a model that cannot be.
    """
    chosen = Settings(top_k=top_k, params=params, head=head, method=method)
    return measure(model, [prompt_ids(tokenizer, prompt) for prompt in prompts], chosen).norms


def measure(
    model: Any,
    sequences: Sequence[Sequence[int]],
    settings: Settings,
    *,
    ids: Sequence[str] | None = None,
    tokens: Int[Tensor, "prompts rank"] | None = None,
    left: bool = False,
) -> Kernel:
    """The kernel between prompts given as token ids.

    `tokens` fixes the tokens of each prompt, in place of its own top k, so that kernels before
    and after a change of the model are of the same logits. `left` is the side of the padding.
    """
    _check(model, sequences, settings, ids, tokens)
    order = by_length(sequences)
    back = torch.tensor(order).argsort()
    with ExitStack() as stack:
        stack.enter_context(subset.still(model))
        if settings.tied == "head":
            stack.enter_context(subset.untied(model))
        device = next(model.parameters()).device
        given = None if tokens is None else tokens[order].to(device)
        blocks, found, log_p = _measured(model, sequences, settings, given, left, device)
    blocks, found, log_p = blocks.cpu(), found.cpu(), log_p.cpu()
    blocks = blocks[back][:, :, back]
    norms = blocks.square().sum((1, 3)).sqrt()
    names = tuple(ids) if ids is not None else tuple(str(i) for i in range(len(sequences)))
    if tokens is not None:
        settings = replace(settings, top_k=tokens.shape[1])
    return Kernel(norms, blocks, found[back], log_p[back], names, settings)


def memory_needed(model: Any, lengths: Sequence[int], settings: Settings) -> int:
    """Bytes that `measure` takes beside the model, for prompts of so many tokens: an upper bound.

    For the exact method held A and δ (at most `budget_gib`), the graph of one batch and scratch;
    for finite differences the graph and three copies of the subset. Raises ConfigError where one
    module alone exceeds the budget.
    """
    with ExitStack() as stack:
        if settings.tied == "head":
            stack.enter_context(subset.untied(model))
        padded = _padded_lengths(lengths, settings.batch_size)
        if settings.method == "finite_difference":
            moved = subset.parameters(model, settings.params, settings.head)
            graph = memory.graph_bytes(model, settings.batch_size, max(lengths))
            return graph + 3 * sum(p.nbytes for p in moved)
        chosen = subset.parts(model, settings.params, settings.head)
        sweeps = _sweeps(model, chosen, padded, settings)
        size = memory.needed(model, chosen, sweeps, padded, settings.batch_size, settings.top_k)
        copied = subset.output_layer(model).weight.nbytes if settings.tied == "head" else 0
        return size + copied


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """A prompt's tokens up to where the assistant begins to speak."""
    if not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    turns = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _measured(
    model: Any,
    sequences: Sequence[Sequence[int]],
    settings: Settings,
    tokens: Tensor | None,
    left: bool,
    device: torch.device,
) -> Found:
    """In the order of lengths."""
    rows = batches(sequences, settings.batch_size, left, device)
    if settings.method == "finite_difference":
        moved = subset.parameters(model, settings.params, settings.head)
        step = settings.epsilon
        return finite_differences(model, moved, rows, settings.top_k, tokens, step)
    chosen = subset.parts(model, settings.params, settings.head)
    padded = _padded_lengths([len(s) for s in sequences], settings.batch_size)
    sweeps = _sweeps(model, chosen, padded, settings)
    return exact(model, sweeps, rows, settings.top_k, tokens)


def _sweeps(
    model: Any, chosen: list[subset.Part], padded: list[int], settings: Settings
) -> list[list[subset.Part]]:
    itemsize = next(model.parameters()).dtype.itemsize
    budget = settings.budget_gib * memory.GIB
    return memory.groups(chosen, padded, settings.top_k, itemsize, budget)


def _padded_lengths(lengths: Sequence[int], size: int) -> list[int]:
    """Each prompt's length in its batch, ascending."""
    ordered = sorted(lengths)
    groups = [ordered[start : start + size] for start in range(0, len(ordered), size)]
    return [group[-1] for group in groups for _ in group]


def _check(
    model: Any,
    sequences: Sequence[Sequence[int]],
    settings: Settings,
    ids: Sequence[str] | None,
    tokens: Tensor | None,
) -> None:
    vocabulary = models.unwrapped(model).config.get_text_config().vocab_size
    if settings.method not in METHODS:
        raise ConfigError(f"method={settings.method}: choose {' or '.join(METHODS)}")
    if settings.tied not in TIED:
        raise ConfigError(f"tied={settings.tied}: choose {' or '.join(TIED)}")
    if not 1 <= settings.top_k <= vocabulary:
        raise ConfigError(f"top_k={settings.top_k}: choose 1 to {vocabulary}, the vocabulary")
    if settings.batch_size < 1:
        raise ConfigError(f"batch_size={settings.batch_size}: must be at least 1")
    if not sequences:
        raise ConfigError("prompts: there are none; give at least one")
    for i, sequence in enumerate(sequences):
        if not sequence:
            raise ConfigError(f"prompts: number {i + 1} has no tokens; drop it")
    if ids is not None and len(ids) != len(sequences):
        raise ConfigError(f"ids: {len(ids)} for {len(sequences)} prompts; give one each")
    if tokens is not None and len(tokens) != len(sequences):
        raise ConfigError(f"tokens: {len(tokens)} rows for {len(sequences)} prompts; give one each")
