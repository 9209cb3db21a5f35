"""What the inner products need: the inputs A and output gradients δ of modules, batch by batch.

Rows of a batch do not interact, so one backward pass of the sum over a batch of one logit per
prompt gives each prompt's own δ. No gradient of a parameter is ever formed here.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from dcr import batching, models, prompts
from dcr.config import ConfigError
from dcr.ntk.subset import Kind, Part


@dataclass(frozen=True)
class Batch:
    """Padded prompts; `start` is the place of the first in the order of lengths."""

    start: int
    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]


@dataclass(frozen=True)
class Tile:
    """One module over one batch, without the positions before the first that has a gradient."""

    inputs: Tensor  # [batch, length, d_in], of an embedding ids [batch, length]
    deltas: Float[Tensor, "batch rank length d_out"]


@dataclass
class Held:
    """One module over all batches so far, in their order."""

    tiles: list[Tile] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)  # whole gradients, [batch, rank, size]
    features: list[Tensor] = field(default_factory=list)  # of the head: [batch, width]
    factors: list[Tensor] = field(default_factory=list)  # ∂z_u/∂(head's output at u): [batch, rank]


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    given: Tensor
    output: Tensor
    version: int


def batches(
    sequences: Sequence[Sequence[int]], size: int, left: bool, device: torch.device
) -> list[Batch]:
    """Prompts by length, so that little is padded, on the right unless `left`.

    On the right, since no row of attention is then wholly masked: in float64, transformers' eager
    attention gives NaN for such rows.
    """
    order = batching.by_length(sequences)
    found = []
    for start in range(0, len(order), size):
        rows = [sequences[i] for i in order[start : start + size]]
        ids = prompts.padded(rows, 0, left).to(device)
        found.append(Batch(start, ids, prompts.attention_mask(rows, left).to(device)))
    return found


def last_logits(model: Any, batch: Batch) -> Float[Tensor, "batch vocabulary"]:
    """Next-token logits after each prompt's last token."""
    inner: Any = models.unwrapped(model)
    options: dict[str, Any] = batching.placed(inner, batching.positions(batch.mask))
    ends = _ends(batch)
    rows = torch.arange(len(ends), device=ends.device)

    def last(_module: Any, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (given[0][rows, ends][:, None], *given[1:])

    # `logits_to_keep` would keep every place where some row ends
    handle = models.head(model).register_forward_pre_hook(last)
    try:
        output = inner(batch.ids, attention_mask=batch.mask.long(), use_cache=False, **options)
    finally:
        handle.remove()
    logits = output.logits[:, 0]
    if not logits.isfinite().all():
        raise ConfigError(
            "logits are not finite; where they are without padding (batch_size=1), give the model "
            "attn_implementation=sdpa, or fp32: eager attention has no mask for float64"
        )
    return logits


def _ends(batch: Batch) -> Int[Tensor, "batch"]:
    """Where each row's last token stands: at the first of the largest counts."""
    return batch.mask.long().cumsum(1).argmax(1)


def log_probabilities(
    logits: Float[Tensor, "batch vocabulary"], tokens: Int[Tensor, "batch rank"]
) -> Float[Tensor, "batch rank"]:
    """In fp32 at least."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact.log_softmax(1).gather(1, tokens)


def collect(
    model: Any, chosen: Sequence[Part], batch: Batch, top_k: int, tokens: Tensor | None
) -> tuple[dict[str, Held], Int[Tensor, "batch rank"], Float[Tensor, "batch rank"]]:
    """A and δ of the modules for the logits of each prompt's `tokens`, None: its top `top_k`.

    One forward pass and one backward pass per rank, which ends at the first of the modules. Also
    returns the tokens and their log-probabilities.
    """
    with watched(model, chosen) as calls:
        logits = last_logits(model, batch)
    if tokens is None:
        tokens = logits.detach().topk(top_k, 1).indices
    absent = [part.name for part in chosen if part.name not in calls]
    if absent:
        raise ConfigError(f"params: {absent[0]} takes no part in the forward pass")
    outputs = [calls[part.name].output for part in chosen]
    found: list[list[Tensor]] = [[] for _ in chosen]
    for rank in range(tokens.shape[1]):
        total = logits.gather(1, tokens[:, rank : rank + 1]).sum()
        more = rank + 1 < tokens.shape[1]
        grads = torch.autograd.grad(total, outputs, retain_graph=more, allow_unused=True)
        for part, kept, grad in zip(chosen, found, grads, strict=True):
            if grad is None or calls[part.name].output._version != calls[part.name].version:
                raise ConfigError(f"params: no gradient can be had at the output of {part.name}")
            kept.append(_at_tokens(grad, tokens[:, rank]) if part.kind is Kind.head else grad)
    held = {}
    for index, part in enumerate(chosen):
        deltas, found[index] = torch.stack(found[index], 1), []
        held[part.name] = READERS[part.kind](part, calls[part.name], deltas, batch)
    return held, tokens, log_probabilities(logits.detach(), tokens)


@contextmanager
def watched(model: Any, chosen: Sequence[Part]) -> Iterator[dict[str, Call]]:
    """While open, every call of the modules is noted, in a graph that begins at the first."""
    calls: dict[str, Call] = {}
    with ExitStack() as stack:
        for part in chosen:
            stack.callback(part.module.register_forward_hook(_noting(part, calls)).remove)
        first = min(part.block for part in chosen)
        if first == 0 and not any(part.kind is Kind.embedding for part in chosen):
            embeddings: Any = models.unwrapped(model).get_input_embeddings()
            stack.callback(embeddings.register_forward_hook(_leaf_output).remove)
        elif first > 0:
            blocks = models.decoder_blocks(model)
            entry = blocks[min(first, len(blocks)) - 1]
            handle = entry.register_forward_pre_hook(_leaf_input, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def _noting(part: Part, calls: dict[str, Call]) -> Any:
    def note(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if part.name in calls:
            raise ConfigError(f"params: {part.name} is called more than once in a forward pass")
        leaf = output.detach().requires_grad_() if part.kind is Kind.embedding else output
        calls[part.name] = Call(inputs[0].detach(), leaf, leaf._version)
        return leaf if part.kind is Kind.embedding else None

    return note


def _leaf_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _leaf_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _at_tokens(grad: Tensor, tokens: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """The head's δ is zero but where its token stands: softcaps and scales act elementwise."""
    factors = grad[:, 0].gather(1, tokens[:, None])[:, 0]
    if (grad != 0).sum() != (factors != 0).sum():
        raise ConfigError("params: a logit depends on more than its own row of the head")
    return factors


# --- one reader per kind ------------------------------------------------------------------------


def _linear(part: Part, call: Call, deltas: Tensor, batch: Batch) -> Held:
    _check_shape(part, call.output, batch)
    tile = _trimmed(call.given, deltas, batch)
    biased = getattr(part.module, "bias", None) is not None
    return Held(tiles=[tile], vectors=[tile.deltas.sum(2)] if biased else [])


def _embedding(part: Part, call: Call, deltas: Tensor, batch: Batch) -> Held:
    _check_shape(part, call.output, batch)
    scale = getattr(part.module, "embed_scale", 1.0)
    rows = nn.functional.embedding(call.given, part.module.weight) * scale
    if not torch.allclose(rows.to(call.output), call.output.detach(), rtol=1e-2, atol=1e-6):
        raise ConfigError(f"params: {part.name} is no table of rows with one scale")
    deltas = deltas * scale
    if part.module.padding_idx is not None:  # a row that torch never gives a gradient
        unmoved = call.given == part.module.padding_idx
        deltas = torch.where(unmoved[:, None, :, None], 0, deltas)
    return Held(tiles=[_trimmed(call.given, deltas, batch)])


def _norm(part: Part, call: Call, deltas: Tensor, batch: Batch) -> Held:
    """Σ_t δ∘x̂ and Σ_t δ, over positions and heads; x̂ is what one unit of gain adds."""
    own = dict(part.module.named_parameters(recurse=False))
    output, width = call.output, call.output.shape[-1]
    if output.shape[0] != len(batch.ids) or any(len(p) != width for p in own.values()):
        raise ConfigError(f"params: the gradients of {part.name} are not known to the exact kernel")
    normed = _unit_gain(part, call, own) if "weight" in own else None
    if output.shape[1:2] == batch.mask.shape[1:]:
        kept = batch.mask.view(len(output), 1, -1, *[1] * (output.dim() - 2))
        deltas = torch.where(kept, deltas, 0)
    flat = deltas.flatten(2, -2)
    gains = [] if normed is None else [torch.einsum("bktd,btd->bkd", flat, normed.flatten(1, -2))]
    return Held(vectors=[torch.cat([*gains, *([flat.sum(2)] if "bias" in own else [])], 2)])


def _unit_gain(part: Part, call: Call, own: dict[str, nn.Parameter]) -> Tensor:
    """x̂, out of the module itself: its output with gain one less that with gain zero."""

    def output(gain: Tensor | float, bias: Tensor | float) -> Tensor:
        values = {"weight": gain, "bias": bias}
        given = {name: torch.ones_like(p) * values[name] for name, p in own.items()}
        return functional_call(part.module, given, (call.given,))

    with torch.no_grad():
        normed = output(1.0, 0.0) - output(0.0, 0.0)
        bias = own.get("bias")
        affine = output(0.0, 0.0 if bias is None else bias) + own["weight"] * normed
        error = (affine - call.output).norm() / call.output.norm().clamp(min=1e-30)
    # between rounding, of norms that compute in fp32 or of bf16, and another function of the gain
    if error > (1e-4 if call.output.dtype.itemsize >= 4 else 2e-2):
        kind = type(part.module).__name__
        raise ConfigError(f"params: {part.name} ({kind}) is no elementwise gain and bias")
    return normed


def _head(_part: Part, call: Call, factors: Tensor, _batch: Batch) -> Held:
    return Held(features=[call.given[:, 0]], factors=[factors])


READERS = {Kind.linear: _linear, Kind.embedding: _embedding, Kind.norm: _norm, Kind.head: _head}


def _check_shape(part: Part, output: Tensor, batch: Batch) -> None:
    if output.shape[:-1] != batch.ids.shape:
        raise ConfigError(
            f"params: {part.name} returns {list(output.shape)}, not a row per prompt and position; "
            "choose a subset without it, or method=finite_difference"
        )


def _trimmed(inputs: Tensor, deltas: Tensor, batch: Batch) -> Tile:
    """Aligned at the ends, without the positions before the first gradient.

    They would add nothing: in the last block, most modules have a gradient at the end alone.
    """
    inputs, deltas = _aligned(inputs, batch, 1), _aligned(deltas, batch, 2)
    places = (deltas != 0).any(3).any(1).any(0).nonzero()[:, 0]
    first = int(places[0]) if len(places) else deltas.shape[2] - 1
    return Tile(inputs[:, first:].contiguous(), deltas[:, :, first:].contiguous())


def _aligned(values: Tensor, batch: Batch, axis: int) -> Tensor:
    """Values with each row's last token at the end of `axis`, and zeros where none stands."""
    length = batch.mask.shape[1]
    ends = _ends(batch)
    sources = torch.arange(length, device=values.device) - (length - 1 - ends)[:, None]
    real = batch.mask.gather(1, sources.clamp(min=0)) & (sources >= 0)
    shape = [len(ends), *[1] * (values.dim() - 1)]
    shape[axis] = length
    index = sources.clamp(min=0).view(shape).expand(values.shape)
    # where, not multiplication: a padded position may hold NaN
    return torch.where(real.view(shape), values.gather(axis, index), 0)
