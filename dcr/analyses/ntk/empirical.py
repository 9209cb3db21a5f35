"""Measures the kernel of a model between prompts, and takes means and predictions from it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dcr.analyses.ntk import subset
from dcr.analyses.ntk.exact import (
    GIB,
    Batch,
    Blocks,
    Collected,
    batches,
    collect,
    exact,
    gradient,
    groups,
    last_logits,
    log_probabilities,
)
from dcr.core import machine
from dcr.core.config import ConfigError
from dcr.core.models import structure
from dcr.core.statistics import Interval, percentiles, ratio
from dcr.core.text import messages
from dcr.inference import resampled_groups


@dataclass(frozen=True)
class Settings:
    """The parameters and logits of a kernel, and the way to compute it.

    A tied matrix is one parameter that acts as embedding and as head, as training moves it.
    `batch_size` and `budget_gib` (of A and δ held at once) change no value; `epsilon` is the
    paper's step, for finite differences alone.
    """

    top_k: int = 10
    params: str = "tail:2"
    head: bool = True
    method: str = "exact"
    batch_size: int = 8
    budget_gib: float = 8.0
    epsilon: float = 1e-3


Job = tuple[Sequence[Sequence[int]], Settings, int, int, Tensor | None]  # of `collected`


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


def label(params: str, head: bool) -> str:
    """The name of a choice of parameters in files and metrics: `tail-2`, `tail-2-headless`."""
    return params.replace(":", "-") + ("" if head else "-headless")


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
    share: Callable[[list[Job]], Iterable[Collected]] | None = None,
) -> Kernel:
    """The kernel between prompts given as token ids.

    `tokens` fixes the tokens of each prompt, in place of its own top k, so that kernels before
    and after a change of the model are of the same logits. `share` calls `collected` in other
    processes, with their own copy of the model and each of these tuples, and gives the results in
    that order; finite differences are always taken in this process. Raises ConfigError for a
    setting or a model that cannot be.
    """
    vocabulary = structure.unwrapped(model).config.get_text_config().vocab_size
    if not 1 <= settings.top_k <= vocabulary:
        raise ConfigError(f"top_k={settings.top_k}: choose 1 to {vocabulary}, the vocabulary")
    if not sequences:
        raise ConfigError("prompts: there are none; give at least one")
    order = machine.by_length(sequences)
    back = torch.tensor(order).argsort()
    with subset.still(model):
        device = next(model.parameters()).device
        fixed = None if tokens is None else tokens[order].to(device)
        rows = batches(sequences, settings.batch_size, device)
        if settings.method == "finite_difference":
            moved = subset.parameters(model, settings.params, settings.head)
            top_k, epsilon = settings.top_k, settings.epsilon
            blocks, chosen, log_p = finite_differences(model, moved, rows, top_k, fixed, epsilon)
        else:
            blocks, chosen, log_p = _exact(model, sequences, rows, settings, fixed, share)
    blocks = blocks.cpu()[back][:, :, back]
    norms = blocks.square().sum((1, 3)).sqrt()
    names = tuple(ids) if ids is not None else tuple(str(i) for i in range(len(sequences)))
    settings = replace(settings, top_k=chosen.shape[1])
    return Kernel(norms, blocks, chosen.cpu()[back], log_p.cpu()[back], names, settings)


def _exact(
    model: Any,
    sequences: Sequence[Sequence[int]],
    rows: Sequence[Batch],
    settings: Settings,
    tokens: Int[Tensor, "prompts rank"] | None,
    share: Callable[[list[Job]], Iterable[Collected]] | None,
) -> Blocks:
    """`exact` over all batches, whose gradients this process or those behind `share` compute."""
    sweeps = _sweeps(model, [len(ids) for ids in sequences], settings)
    device = next(model.parameters()).device

    def passes(number: int, known: Tensor | None) -> Iterator[Collected]:
        if share is None:
            for batch in rows:
                yield collect(model, sweeps[number], batch, settings.top_k, known)
            return
        fixed = None if known is None else known.cpu()
        jobs = [(sequences, settings, number, place, fixed) for place in range(len(rows))]
        for gradients, own, log_p in share(jobs):
            moved = {name: one.to(device) for name, one in gradients.items()}
            yield moved, own.to(device), log_p.to(device)

    return exact(sweeps, passes, tokens)


def collected(
    model: Any,
    sequences: Sequence[Sequence[int]],
    settings: Settings,
    sweep: int,
    place: int,
    tokens: Int[Tensor, "prompts rank"] | None,
) -> Collected:
    """The gradients of one batch of prompts for one sweep of `measure`, on the CPU.

    `tokens` stand in the order of lengths.
    """
    with subset.still(model):
        device = next(model.parameters()).device
        batch = batches(sequences, settings.batch_size, device)[place]
        layers = _sweeps(model, [len(ids) for ids in sequences], settings)[sweep]
        known = None if tokens is None else tokens.to(device)
        gradients, chosen, log_p = collect(model, layers, batch, settings.top_k, known)
        cpu = torch.device("cpu")
        return {name: one.to(cpu) for name, one in gradients.items()}, chosen.cpu(), log_p.cpu()


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The tokens of a prompt in the chat template, with the header of the answer."""
    if not tokenizer.chat_template:
        return list(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(
        messages(prompt), tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _sweeps(model: Any, lengths: Sequence[int], settings: Settings) -> list[list[subset.Layer]]:
    chosen = subset.layers(model, settings.params, settings.head)
    itemsize, size = next(model.parameters()).dtype.itemsize, settings.batch_size
    ordered = sorted(lengths)
    padded = [max(ordered[i - i % size :][:size]) for i in range(len(ordered))]
    return groups(chosen, padded, settings.top_k, itemsize, settings.budget_gib * GIB)


def normalised(
    norms: Float[Tensor, "observer trained"], how: str = "observer"
) -> Float[Tensor, "observer trained"]:
    """Norms divided by those of K(x',x').

    `observer` is the paper's ‖K(x',x)‖ / ‖K(x',x')‖, not bounded by 1, and all its asymmetry comes
    from the divisor; `symmetric` is ‖K(x',x)‖ / √(‖K(x',x')‖‖K(x,x)‖), in [0, 1]; `none` leaves
    them.
    """
    own = norms.diagonal()
    if how == "none":
        return norms
    return norms / (own[:, None] if how == "observer" else (own[:, None] * own).sqrt())


def mean_by_kind(
    matrix: Float[Tensor, "observer trained"],
    kinds: Sequence[str],
    self_pairs: bool = False,
    *,
    seed: int,
) -> Mapping[str, Mapping[str, Interval]]:
    """Mean over pairs of prompts by kind, `[observer kind][trained kind]`, as in Figure 6.

    The intervals are percentile bootstraps over prompts within their kind; a prompt drawn twice
    brings its whole row and column twice. A prompt's pair with itself counts only with
    `self_pairs`, also if the prompt is drawn twice. The mean is linear, so the mean of a difference
    of two kernels over the same prompts is a paired comparison. Kinds stand in the order in which
    they appear; a kind without a pair gives nan within unbounded ends.
    """
    values = matrix.double().numpy()
    # one draw for all cells: the same prompts observe and are trained on
    drawn = resampled_groups(kinds, np.random.default_rng(seed))
    means: dict[str, dict[str, Interval]] = {}
    for observer in drawn:
        means[observer] = {}
        for trained in drawn:
            mean, redrawn = kind_mean(values, kinds, (observer, trained), drawn, self_pairs)
            means[observer][trained] = Interval(mean, *percentiles(redrawn))
    return means


def kind_mean(
    matrix: Float[np.ndarray, "observer trained"],
    kinds: Sequence[str],
    cell: tuple[str, str],
    drawn: Mapping[str, Int[np.ndarray, "draws own"]],
    self_pairs: bool = False,
) -> tuple[float, Float[np.ndarray, "draws"]]:
    """The mean over pairs of (observer kind, trained kind), and the mean of every draw.

    `drawn` comes from `inference.resampled_groups`. A draw without a pair gives nan.
    """
    rows, columns = ([i for i, kind in enumerate(kinds) if kind == wanted] for wanted in cell)
    values, allowed = matrix[np.ix_(rows, columns)], np.ones((len(rows), len(columns)))
    if cell[0] == cell[1] and not self_pairs:
        np.fill_diagonal(allowed, 0)
    if not allowed.any():
        return math.nan, np.full(len(drawn[cell[0]]), math.nan)
    summed = np.where(allowed, values, 0.0)
    totals, counts = (
        ((drawn[cell[0]] @ part) * drawn[cell[1]]).sum(1) for part in (summed, allowed)
    )
    return float(summed.sum() / allowed.sum()), ratio(totals, counts)


def log_probability_change(
    blocks: Float[Tensor, "observer rank rank"],
    log_probabilities: Float[Tensor, "observer rank"],
    residual: Float[Tensor, "rank"],
    rate: float,
) -> Float[Tensor, "observer rank"]:
    """The change of log-probabilities by one SGD step, -ηAKG to first order (Eq. 2 and 3).

    `blocks` are K(x',x) of one trained prompt x, `Kernel.blocks[:, :, j]`; `residual` is G, the
    loss's gradient by the logits of x at its tokens, for a cross-entropy probability minus one-hot
    target. A is the softmax's Jacobian at x', I - 1πᵀ. The result is exact to first order only if
    the tokens are the whole vocabulary: the part of others in G and in Aπ is left out.
    """
    logits = -rate * blocks @ residual
    mean = (log_probabilities.exp() * logits).sum(1, keepdim=True)
    return logits - mean


def finite_differences(
    model: Any,
    parameters: Sequence[nn.Parameter],
    rows: Sequence[Batch],
    top_k: int,
    tokens: Int[Tensor, "prompts rank"] | None,
    step: float,
) -> Blocks:
    """The result of `exact` from columns (z(x';θ+εw) - z(x';θ-εw)) / 2ε with w = ∇z_u(x).

    This takes N·k backward passes and 2N²k forward passes, the latter batched. Parameters are
    moved in place and restored bitwise, also after an exception. w is not normalised, so the true
    step is ε‖w‖: too large a step is biased, too small a one is rounding noise; repeat with another
    ε to tell. Raises ConfigError below fp32.
    """
    if any(p.dtype.itemsize < 4 for p in parameters):
        raise ConfigError(
            f"method=finite_difference: the model is in {parameters[0].dtype}; a step of {step} "
            "needs fp32 at least, or take method=exact"
        )
    with torch.no_grad():
        logits = [last_logits(model, batch) for batch in rows]
        firsts = [each.topk(top_k, 1).indices for each in logits]
        chosen = torch.cat(firsts) if tokens is None else tokens
        log_p = log_probabilities(torch.cat(logits), chosen)
    columns = []
    for batch in rows:
        for place in range(len(batch.ids)):
            alone = Batch(0, batch.ids[place, None], batch.mask[place, None])
            for token in chosen[batch.start + place].tolist():
                _, along = gradient(model, parameters, alone, lambda z, token=token: z[token])
                moved = []
                with subset.restored(parameters) as saved, torch.no_grad():
                    for by in (step, -step):
                        subset.move(parameters, saved, along, by)
                        ends = torch.cat([last_logits(model, each) for each in rows])
                        moved.append(ends.gather(1, chosen))
                columns.append((moved[0] - moved[1]) / (2 * step))
    return torch.stack(columns, 2).view(*chosen.shape, *chosen.shape), chosen, log_p
