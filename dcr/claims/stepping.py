"""One small SGD step on one prompt, and what it does to the next token of every other.

Log-probabilities are taken in float64 on the CPU: where a model refuses almost surely, the rest of
the probability is lost in fp32's rounding of the sum.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dcr import activations, batching
from dcr.config import ConfigError
from dcr.ntk import Batch, batches, last_logits, parameters, still

BATCH_SIZE = 8


@dataclass(frozen=True)
class Before:
    """Of every prompt before any step: its tokens, their log-probabilities, and its state.

    The tokens are the most likely ones, most likely first, with the target among them; the state
    is the output of one block at the prompt's last token.
    """

    tokens: Int[Tensor, "prompts rank"]
    log_probabilities: Float[Tensor, "prompts rank"]
    states: Float[Tensor, "prompts width"]


@dataclass(frozen=True)
class Steps:
    """Changes of log-probabilities by one step on each trained prompt alone, from the same weights.

    `changes` are log p at θ - (η/2)∇L less log p at θ + (η/2)∇L, in which the second order cancels;
    `plain` are those of the step itself, log p at θ - η∇L less log p at θ.
    """

    changes: Float[Tensor, "prompts rank trained"]
    plain: Float[Tensor, "prompts rank trained"]
    rates: Float[Tensor, "trained"]  # η


def before(
    model: Any, sequences: Sequence[Sequence[int]], target: int, top_k: int, layer: int
) -> Before:
    """`top_k` + 1 tokens of each prompt: its top k and the target, or its top k + 1 with it."""
    tokens, log_p, states = [], [], []
    with still(model), torch.no_grad():
        rows, order = _rows(model, sequences)
        for batch in rows:
            with activations.captured(model, layer) as taken:
                every = _log_softmax(last_logits(model, batch))
            (hidden,) = taken
            ends = batch.mask.sum(1).to(hidden.device) - 1  # padded on the right
            places = torch.arange(len(ends), device=hidden.device)
            states.append(hidden[places, ends].cpu().double())
            chosen = every.topk(top_k + 1, 1).indices
            chosen[~(chosen == target).any(1), -1] = target
            tokens.append(chosen)
            log_p.append(every.gather(1, chosen))
    back = order.argsort()
    return Before(*(torch.cat(each)[back] for each in (tokens, log_p, states)))


def steps(
    model: Any,
    sequences: Sequence[Sequence[int]],
    trained: Sequence[int],
    start: Before,
    target: int,
    drop: float,
) -> Steps:
    """One step of plain SGD on the cross-entropy of `target` behind each of the `trained` prompts.

    It moves all base weights, a tied matrix once and an adapter not at all: the set that the kernel
    over `all` is of. The rate is such that to first order the pair's own loss falls by `drop` nats,
    or where that loss L is below one nat by L·`drop`, since a loss cannot fall by more than it is.
    Takes two copies of the weights beside the model, and for each trained prompt a backward pass
    and three forward passes over all prompts. Weights are restored to the bit, also after an
    exception; modes, flags and gradients are left as they were. Raises ConfigError below fp32 and
    where a loss has no gradient.
    """
    changes, plain, rates = [], [], []
    with still(model):
        moved = parameters(model, "all", True)
        _check_precision(moved)
        rows, order = _rows(model, sequences)
        for place in trained:
            (alone,), _ = _rows(model, [sequences[place]])
            loss, slope = _gradient(model, moved, alone, target)
            rate = _rate(loss, slope, drop)
            with _restored(moved) as saved:
                found = []
                for share in (0.5, -0.5, 1.0):
                    _move(moved, saved, slope, -share * rate)
                    found.append(_log_probabilities(model, rows, start.tokens, order))
            changes.append(found[0] - found[1])
            plain.append(found[2] - start.log_probabilities)
            rates.append(rate)
    all_rates = torch.tensor(rates, dtype=torch.float64)
    return Steps(torch.stack(changes, 2), torch.stack(plain, 2), all_rates)


def _rows(model: Any, sequences: Sequence[Sequence[int]]) -> tuple[list[Batch], Tensor]:
    """Batches by length, padded on the right, and that order."""
    device = next(model.parameters()).device
    return batches(sequences, BATCH_SIZE, False, device), torch.tensor(
        batching.by_length(sequences)
    )


def _log_softmax(logits: Float[Tensor, "batch vocabulary"]) -> Float[Tensor, "batch vocabulary"]:
    return logits.cpu().double().log_softmax(1)


@torch.no_grad()
def _log_probabilities(
    model: Any,
    rows: Sequence[Batch],
    tokens: Int[Tensor, "prompts rank"],
    order: Int[Tensor, "prompts"],
) -> Float[Tensor, "prompts rank"]:
    """In the order of `tokens`."""
    found = torch.empty(tokens.shape, dtype=torch.float64)
    for batch in rows:
        own = order[batch.start : batch.start + len(batch.ids)]
        found[own] = _log_softmax(last_logits(model, batch)).gather(1, tokens[own])
    return found


def _gradient(
    model: Any, moved: Sequence[nn.Parameter], alone: Batch, target: int
) -> tuple[float, list[Tensor]]:
    """The loss and its gradient; `still` takes the flags back."""
    for parameter in moved:
        parameter.requires_grad_(True)
    loss = -_log_softmax(last_logits(model, alone))[0, target]
    slope = torch.autograd.grad(loss, moved, materialize_grads=True)
    return float(loss.detach()), list(slope)


def _rate(loss: float, slope: Sequence[Tensor], drop: float) -> float:
    squared = sum(float(part.square().sum()) for part in slope)
    if not squared > 0:
        raise ConfigError(
            f"claims: a refusal's loss of {loss:.3g} nats has no gradient, so no step on it can be "
            "measured; choose other pairs"
        )
    return drop * min(1.0, loss) / squared


@contextmanager
def _restored(moved: Sequence[nn.Parameter]) -> Iterator[list[Tensor]]:
    """A copy of the weights, which are set back to it on leaving."""
    saved = [parameter.detach().clone() for parameter in moved]
    try:
        yield saved
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, saved, strict=True):
                parameter.copy_(value)


@torch.no_grad()
def _move(
    moved: Sequence[nn.Parameter], saved: Sequence[Tensor], along: Sequence[Tensor], by: float
) -> None:
    for parameter, value, direction in zip(moved, saved, along, strict=True):
        parameter.copy_(value).add_(direction, alpha=by)


def _check_precision(moved: Sequence[nn.Parameter]) -> None:
    if any(parameter.dtype.itemsize < 4 for parameter in moved):
        raise ConfigError(
            f"claims: the model is in {moved[0].dtype}, in which a small step is lost to "
            "rounding; open it with precision=fp32"
        )
