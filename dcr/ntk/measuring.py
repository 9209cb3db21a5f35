"""The kernel of a model between prompts: measured, what it takes, and what is read off it."""

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dcr import batching, models
from dcr.config import ConfigError
from dcr.ntk import subset
from dcr.ntk.capture import batches
from dcr.ntk.schemes import SCRATCH, Found, exact, finite_differences
from dcr.ntk.subset import FORWARDS, Kind, Part, output_layer, tied
from dcr.statistics import Interval, percentiles, resampled_groups

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
    order = batching.by_length(sequences)
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
            graph = graph_bytes(model, settings.batch_size, max(lengths))
            return graph + 3 * sum(p.nbytes for p in moved)
        chosen = subset.parts(model, settings.params, settings.head)
        sweeps = _sweeps(model, chosen, padded, settings)
        size = needed(model, chosen, sweeps, padded, settings.batch_size, settings.top_k)
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
    budget = settings.budget_gib * GIB
    return groups(chosen, padded, settings.top_k, itemsize, budget)


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


GIB = 2**30


def groups(
    chosen: Sequence[Part], lengths: Sequence[int], top_k: int, itemsize: int, budget: float
) -> list[list[Part]]:
    """Modules whose A and δ for all prompts fit `budget` bytes together: one sweep for each.

    Raises ConfigError where one module alone does not fit.
    """
    found: list[list[Part]] = [[]]
    used = 0
    for part in _in_order(chosen):
        size = held_bytes(part, lengths, top_k, itemsize)
        if size > budget:
            raise ConfigError(
                f"budget_gib={budget / GIB:.3g}: {part.name} alone needs {size / GIB:.3g} for "
                f"{len(lengths)} prompts; raise it, or take fewer prompts or a smaller top_k"
            )
        if used + size > budget:
            found.append([])
            used = 0
        found[-1].append(part)
        used += size
    return found


def held_bytes(part: Part, lengths: Sequence[int], top_k: int, itemsize: int) -> int:
    """A and δ of one module for all prompts, at full length: an upper bound."""
    given, wide = _features(part)
    positions = sum(lengths) * itemsize
    match part.kind:
        case Kind.head:
            return len(lengths) * given * itemsize
        case Kind.norm:
            return 2 * len(lengths) * top_k * wide * itemsize
        case Kind.embedding:
            return sum(lengths) * 8 + positions * top_k * wide
    return positions * (given + top_k * wide)


def needed(
    model: Any,
    chosen: Sequence[Part],
    sweeps: Sequence[Sequence[Part]],
    lengths: Sequence[int],
    rows: int,
    top_k: int,
) -> int:
    """Bytes beside the model itself: an upper estimate, `lengths` padded and ascending."""
    itemsize = next(model.parameters()).dtype.itemsize
    wide = max((_features(part)[1] for part in chosen if part.kind is not Kind.head), default=0)
    last = lengths[-rows:]
    # δ of one batch as they come, stacked and masked; those of norms are then summed at once
    batch = sum(3 * sum(last) * top_k * _features(p)[1] for p in chosen if p.kind is Kind.norm)
    batch = batch * itemsize + max(
        sum(3 * held_bytes(p, last, top_k, itemsize) for p in sweep) for sweep in sweeps
    )
    held = max(sum(held_bytes(p, lengths, top_k, itemsize) for p in sweep) for sweep in sweeps)
    linear = [math.prod(_features(part)) for part in chosen if part.kind is Kind.linear]
    formed = len(lengths) * top_k * max(linear, default=0) * max(itemsize, 4)
    pair = 3 * sum(last) * top_k * wide * max(itemsize, 4)
    gram = 4 * (len(lengths) * top_k) ** 2 * max(itemsize, 4)
    graph = graph_bytes(model, len(last), last[-1])
    return held + graph + gram + max(batch, pair + 3 * min(SCRATCH, formed))


def graph_bytes(model: Any, rows: int, length: int) -> int:
    """What autograd keeps of one forward pass: twice what goes in and out of every projection.

    Attention probabilities are counted as if kept, as they are without a fused kernel; of the
    head, logits and their softmax in fp32.
    """
    config = models.unwrapped(model).config.get_text_config()
    blocks = models.decoder_blocks(model)
    features = sum(
        sum(parameter.shape)
        for module in blocks.modules()
        if FORWARDS.get(type(module).forward) is Kind.linear
        for name, parameter in module.named_parameters(recurse=False)
        if name == "weight"
    )
    itemsize = next(model.parameters()).dtype.itemsize
    attention = 3 * len(blocks) * config.num_attention_heads * rows * length**2
    logits = 4 * rows * max(output_layer(model).weight.shape) * max(itemsize, 4)
    return itemsize * (2 * rows * length * features + attention) + logits


def _features(part: Part) -> tuple[int, int]:
    """What a module reads and gives per position."""
    shape = [int(size) for size in next(part.module.parameters(False)).shape]
    if part.kind is Kind.norm:
        return shape[0], shape[0]
    out_first = isinstance(part.module, torch.nn.Linear)
    return (shape[1], shape[0]) if out_first else (shape[0], shape[1])


def _in_order(chosen: Sequence[Part]) -> list[Part]:
    """A tied head right behind its embeddings: their cross terms need both in one sweep."""
    if not tied(list(chosen)):
        return list(chosen)
    head = next(part for part in chosen if part.kind is Kind.head)
    pair = [p for p in chosen if p.kind is Kind.embedding and p.module.weight is head.module.weight]
    rest = [part for part in chosen if part not in (*pair, head)]
    return [*pair, head, *rest]


def _observer(norms: Tensor) -> Tensor:
    return norms / norms.diagonal()[:, None]


def _symmetric(norms: Tensor) -> Tensor:
    own = norms.diagonal()
    return norms / (own[:, None] * own).sqrt()


def _none(norms: Tensor) -> Tensor:
    return norms


NORMALISERS = {"observer": _observer, "symmetric": _symmetric, "none": _none}


def normalised(
    norms: Float[Tensor, "observer trained"], how: str = "observer"
) -> Float[Tensor, "observer trained"]:
    """Norms divided by those of K(x',x').

    `observer` is the paper's ‖K(x',x)‖ / ‖K(x',x')‖, not bounded by 1, and all its asymmetry comes
    from the divisor; `symmetric` is ‖K(x',x)‖ / √(‖K(x',x')‖‖K(x,x)‖), in [0, 1]; `none` leaves
    them. Raises ValueError for another name.
    """
    if how not in NORMALISERS:
        raise ValueError(f"how={how!r}: choose one of {', '.join(NORMALISERS)}")
    return NORMALISERS[how](norms)


def mean_by_kind(
    matrix: Float[Tensor, "observer trained"],
    kinds: Sequence[str],
    self_pairs: bool = False,
    *,
    seed: int,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> Mapping[str, Mapping[str, Interval]]:
    """Mean over pairs of prompts by kind, `[observer kind][trained kind]`, as in Figure 6.

    With percentile bootstrap intervals over prompts: those of each kind are drawn anew, and a
    prompt drawn twice brings its whole row and column twice. A prompt's pair with itself counts
    only with `self_pairs`, also where it is drawn twice. The mean is linear, so that of a
    difference of two kernels over the same prompts is a paired comparison. Kinds stand in the
    order in which they appear; nan within unbounded ends where a kind has no pair.

    Raises ValueError where `kinds` is not one per prompt.
    """
    if len(kinds) != len(matrix):
        raise ValueError(f"{len(kinds)} kinds for {len(matrix)} prompts: give one each")
    values = matrix.double().numpy()
    generator = np.random.default_rng(seed)
    order = list(dict.fromkeys(kinds))
    places = {kind: [i for i, other in enumerate(kinds) if other == kind] for kind in order}
    # one draw for all cells: the same prompts observe and are trained on
    drawn = resampled_groups(kinds, generator, resamples)
    means: dict[str, dict[str, Interval]] = {kind: {} for kind in order}
    for seen in order:
        for trained in order:
            cell = values[np.ix_(places[seen], places[trained])]
            allowed = np.ones_like(cell)
            if seen == trained and not self_pairs:
                np.fill_diagonal(allowed, 0)
            means[seen][trained] = _mean(cell, allowed, drawn[seen], drawn[trained], confidence)
    return means


def log_probability_change(
    blocks: Float[Tensor, "observer rank rank"],
    log_probabilities: Float[Tensor, "observer rank"],
    residual: Float[Tensor, "rank"],
    rate: float,
) -> Float[Tensor, "observer rank"]:
    """Eq. 2 and 3: what one SGD step does to log-probabilities, -ηAKG to first order.

    `blocks` are K(x',x) of one trained prompt x, `Kernel.blocks[:, :, j]`; `residual` is G, the
    loss's gradient by the logits of x at its tokens, for a cross-entropy probability minus one-hot
    target. A is the softmax's Jacobian at x', I - 1πᵀ. Exact to first order only where the tokens
    are the whole vocabulary: others' part in G and in Aπ is left out.
    """
    logits = -rate * blocks @ residual
    mean = (log_probabilities.exp() * logits).sum(1, keepdim=True)
    return logits - mean


def _mean(
    cell: np.ndarray,
    allowed: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    confidence: float,
) -> Interval:
    if not allowed.any():
        return Interval(math.nan, -math.inf, math.inf)
    kept = np.where(allowed, cell, 0.0)
    totals = np.einsum("ri,ij,rj->r", rows, kept, columns, optimize=True)
    counts = np.einsum("ri,ij,rj->r", rows, allowed, columns, optimize=True)
    # a draw of one prompt alone has no pair of two
    drawn = totals[counts > 0] / counts[counts > 0]
    return Interval(float(kept.sum() / allowed.sum()), *percentiles(drawn, confidence))
