"""The exact kernel: inner products of factored gradients, module by module (A.6).

Rows of a batch do not interact, so one backward pass of the sum over a batch of one logit per
prompt gives each prompt's own δ = ∂z/∂(a module's output). The gradient of the module's matrix is
δᵀA, where A is the module's input. The scheme takes N·k backward passes and inner products per
module, and no forward loop. A sweep keeps A and δ of a group of modules for all prompts, adds their
inner products and drops them; the groups follow from the budget. Each sweep repeats the forward
pass and, per rank, a backward pass that ends at its first module. Every function adds to one matrix
[prompts, rank, prompts, rank], with the prompts in the order of lengths.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from dcr.analyses.ntk.subset import Layer, LayerKind, tied
from dcr.core import machine, passes
from dcr.core.config import ConfigError
from dcr.core.models import structure

GIB = 2**30

Gram = Float[Tensor, "prompts rank prompts rank"]


@dataclass(frozen=True)
class Batch:
    """Padded prompts; `start` is the place of the first in the order of lengths."""

    start: int
    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]

    @property
    def ends(self) -> Int[Tensor, "batch"]:
        """The place of each row's last token."""
        return self.mask.sum(1) - 1


@dataclass(frozen=True)
class Factors:
    """A and δ of one layer over a batch, without the positions before the first gradient."""

    inputs: Tensor  # [batch, length, d_in], of an embedding ids [batch, length]
    deltas: Float[Tensor, "batch rank length d_out"]


@dataclass
class Gradients:
    """One layer's gradients over all batches so far, in their order, factored if they can be."""

    factors: list[Factors] = field(default_factory=list)
    vectors: list[Tensor] = field(default_factory=list)  # whole gradients, [batch, rank, size]
    features: list[Tensor] = field(default_factory=list)  # of the head: [batch, width]
    scales: list[Tensor] = field(default_factory=list)  # ∂z_u/∂(head's output at u): [batch, rank]

    def to(self, device: torch.device) -> "Gradients":
        return Gradients(
            [Factors(f.inputs.to(device), f.deltas.to(device)) for f in self.factors],
            *(
                [tensor.to(device) for tensor in each]
                for each in (self.vectors, self.features, self.scales)
            ),
        )

    def extend(self, more: "Gradients") -> None:
        self.factors += more.factors
        self.vectors += more.vectors
        self.features += more.features
        self.scales += more.scales


@dataclass(frozen=True)
class LayerCall:
    """One call of a module."""

    input: Tensor
    output: Tensor
    version: int


def batches(sequences: Sequence[Sequence[int]], size: int, device: torch.device) -> list[Batch]:
    """Batches of prompts by length, so that little is padded, on the right.

    Padding on the right leaves no row of attention wholly masked, for which transformers' eager
    attention gives NaN in float64.
    """
    ordered = [sequences[place] for place in machine.by_length(sequences)]
    made = []
    for start in range(0, len(ordered), size):
        rows = ordered[start : start + size]
        ids, mask = passes.padded(rows, 0), passes.attention_mask(rows)
        made.append(Batch(start, ids.to(device), mask.to(device)))
    return made


def last_logits(model: Any, batch: Batch) -> Float[Tensor, "batch vocabulary"]:
    """Next-token logits after each prompt's last token."""
    inner: Any = structure.unwrapped(model)
    # row by row, so that learnt positions have a gradient of their own in each
    options: dict[str, Any] = passes.placed(inner, passes.positions(batch.mask))
    ends = batch.ends
    rows = torch.arange(len(ends), device=ends.device)

    def last(_module: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][rows, ends][:, None], *inputs[1:])

    # `logits_to_keep` would keep every place where some row ends
    handle = structure.head(model).register_forward_pre_hook(last)
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


def gradient(
    model: Any,
    parameters: Sequence[nn.Parameter],
    alone: Batch,
    of: Callable[[Float[Tensor, "vocabulary"]], Float[Tensor, ""]],
) -> tuple[float, list[Tensor]]:
    """The value of a function of one prompt's next-token logits, and its gradient.

    The parameters ask for gradients afterwards, until `still` sets them back.
    """
    for parameter in parameters:
        parameter.requires_grad_(True)
    value = of(last_logits(model, alone)[0])
    gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
    return float(value.detach()), list(gradients)


def log_probabilities(
    logits: Float[Tensor, "batch vocabulary"], tokens: Int[Tensor, "batch rank"]
) -> Float[Tensor, "batch rank"]:
    """The log-softmax of the logits at `tokens`, in fp32 or wider."""
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return exact.log_softmax(1).gather(1, tokens)


Collected = tuple[dict[str, Gradients], Int[Tensor, "batch rank"], Float[Tensor, "batch rank"]]


def collect(
    model: Any,
    chosen: Sequence[Layer],
    batch: Batch,
    top_k: int,
    tokens: Int[Tensor, "prompts rank"] | None,
) -> Collected:
    """A and δ of the modules for the logits of each prompt's `tokens` (None: its top `top_k`).

    It takes one forward pass, and one backward pass per rank that ends at the first of the modules,
    and also returns the tokens and their log-probabilities. Raises ConfigError for a module without
    a gradient of its own.
    """
    with watched(model, chosen) as calls:
        logits = last_logits(model, batch)
    if tokens is not None:
        tokens = tokens[batch.start : batch.start + len(batch.ids)]
    else:
        tokens = logits.detach().topk(top_k, 1).indices
    absent = [layer.name for layer in chosen if layer.name not in calls]
    if absent:
        raise ConfigError(f"params: {absent[0]} takes no part in the forward pass")
    outputs = [calls[layer.name].output for layer in chosen]
    by_rank: list[list[Tensor]] = [[] for _ in chosen]
    for rank in range(tokens.shape[1]):
        total = logits.gather(1, tokens[:, rank : rank + 1]).sum()
        more = rank + 1 < tokens.shape[1]
        grads = torch.autograd.grad(total, outputs, retain_graph=more, allow_unused=True)
        for layer, own, grad in zip(chosen, by_rank, grads, strict=True):
            if grad is None or calls[layer.name].output._version != calls[layer.name].version:
                raise ConfigError(f"params: no gradient can be had at the output of {layer.name}")
            own.append(_at_tokens(grad, tokens[:, rank]) if layer.kind is LayerKind.head else grad)
    gradients = {}
    for index, layer in enumerate(chosen):
        deltas, by_rank[index] = torch.stack(by_rank[index], 1), []
        gradients[layer.name] = READERS[layer.kind](layer, calls[layer.name], deltas, batch)
    return gradients, tokens, log_probabilities(logits.detach(), tokens)


@contextmanager
def watched(model: Any, chosen: Sequence[Layer]) -> Iterator[dict[str, LayerCall]]:
    """Records every call of the modules while open; the graph begins at the first of them."""
    calls: dict[str, LayerCall] = {}
    with ExitStack() as stack:
        for layer in chosen:
            stack.callback(layer.module.register_forward_hook(_recorder(layer, calls)).remove)
        first = min(layer.block for layer in chosen)
        if first == 0 and not any(layer.kind is LayerKind.embedding for layer in chosen):
            embeddings: Any = structure.unwrapped(model).get_input_embeddings()
            stack.callback(embeddings.register_forward_hook(_leaf_output).remove)
        elif first > 0:
            blocks = structure.decoder_blocks(model)
            entry = blocks[min(first, len(blocks)) - 1]
            handle = entry.register_forward_pre_hook(_leaf_input, with_kwargs=True)
            stack.callback(handle.remove)
        yield calls


def _recorder(layer: Layer, calls: dict[str, LayerCall]) -> Any:
    def record(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if layer.name in calls:
            raise ConfigError(f"params: {layer.name} is called more than once in a forward pass")
        leaf = output.detach().requires_grad_() if layer.kind is LayerKind.embedding else output
        calls[layer.name] = LayerCall(inputs[0].detach(), leaf, leaf._version)
        return leaf if layer.kind is LayerKind.embedding else None

    return record


def _leaf_output(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
    return output.detach().requires_grad_()


def _leaf_input(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if args:
        return (args[0].detach().requires_grad_(), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}


def _at_tokens(grad: Tensor, tokens: Int[Tensor, "batch"]) -> Float[Tensor, "batch"]:
    """The head's δ at its token, the only place that is not 0: softcaps and scales are elementwise.

    Raises ConfigError for a head whose δ is not zero elsewhere.
    """
    scales = grad[:, 0].gather(1, tokens[:, None])[:, 0]
    if (grad != 0).sum() != (scales != 0).sum():
        raise ConfigError("params: a logit depends on more than its own row of the head")
    return scales


# --- one reader per kind ------------------------------------------------------------------------


def _linear(layer: Layer, call: LayerCall, deltas: Tensor, batch: Batch) -> Gradients:
    _check_shape(layer, call.output, batch)
    factor = _trimmed(call.input, deltas, batch)
    biased = getattr(layer.module, "bias", None) is not None
    return Gradients(factors=[factor], vectors=[factor.deltas.sum(2)] if biased else [])


def _embedding(layer: Layer, call: LayerCall, deltas: Tensor, batch: Batch) -> Gradients:
    _check_shape(layer, call.output, batch)
    scale = getattr(layer.module, "embed_scale", 1.0)
    rows = nn.functional.embedding(call.input, layer.module.weight) * scale
    if not torch.allclose(rows.to(call.output), call.output.detach(), rtol=1e-2, atol=1e-6):
        raise ConfigError(f"params: {layer.name} is no table of rows with one scale")
    deltas = deltas * scale
    if layer.module.padding_idx is not None:  # a row that torch never gives a gradient
        unmoved = call.input == layer.module.padding_idx
        deltas = torch.where(unmoved[:, None, :, None], 0, deltas)
    return Gradients(factors=[_trimmed(call.input, deltas, batch)])


def _norm(layer: Layer, call: LayerCall, deltas: Tensor, batch: Batch) -> Gradients:
    """Σ_t δ∘x̂ and Σ_t δ, over positions and heads; x̂ is the output per unit of gain."""
    own = dict(layer.module.named_parameters(recurse=False))
    output, width = call.output, call.output.shape[-1]
    if output.shape[0] != len(batch.ids) or any(len(p) != width for p in own.values()):
        raise ConfigError(
            f"params: the gradients of {layer.name} are not known to the exact kernel"
        )
    normed = _unit_gain(layer, call, own) if "weight" in own else None
    if output.shape[1:2] == batch.mask.shape[1:]:
        real = batch.mask.view(len(output), 1, -1, *[1] * (output.dim() - 2))
        deltas = torch.where(real, deltas, 0)
    flat = deltas.flatten(2, -2)
    gains = [] if normed is None else [torch.einsum("bktd,btd->bkd", flat, normed.flatten(1, -2))]
    return Gradients(vectors=[torch.cat([*gains, *([flat.sum(2)] if "bias" in own else [])], 2)])


def _unit_gain(layer: Layer, call: LayerCall, own: dict[str, nn.Parameter]) -> Tensor:
    """x̂, as the module's own output with gain 1 less its output with gain 0."""

    def output(gain: Tensor | float, bias: Tensor | float) -> Tensor:
        values = {"weight": gain, "bias": bias}
        parameters = {name: torch.ones_like(p) * values[name] for name, p in own.items()}
        return functional_call(layer.module, parameters, (call.input,))

    with torch.no_grad():
        normed = output(1.0, 0.0) - output(0.0, 0.0)
        bias = own.get("bias")
        affine = output(0.0, 0.0 if bias is None else bias) + own["weight"] * normed
        error = (affine - call.output).norm() / call.output.norm().clamp(min=1e-30)
    # the bound lies between rounding (in fp32 or bf16) and another function of the gain
    if error > (1e-4 if call.output.dtype.itemsize >= 4 else 2e-2):
        kind = type(layer.module).__name__
        raise ConfigError(f"params: {layer.name} ({kind}) is no elementwise gain and bias")
    return normed


def _head(_part: Layer, call: LayerCall, scales: Tensor, _batch: Batch) -> Gradients:
    return Gradients(features=[call.input[:, 0]], scales=[scales])


READERS = {
    LayerKind.linear: _linear,
    LayerKind.embedding: _embedding,
    LayerKind.norm: _norm,
    LayerKind.head: _head,
}


def _check_shape(layer: Layer, output: Tensor, batch: Batch) -> None:
    if output.shape[:-1] != batch.ids.shape:
        raise ConfigError(
            f"params: {layer.name} returns {list(output.shape)}, not a row per prompt and "
            "position; choose a subset without it, or method=finite_difference"
        )


def _trimmed(inputs: Tensor, deltas: Tensor, batch: Batch) -> Factors:
    """A and δ aligned at the ends, without the positions before the first gradient.

    Those add nothing: in the last block, most modules have a gradient at the end alone.
    """
    inputs, deltas = _aligned(inputs, batch, 1), _aligned(deltas, batch, 2)
    places = (deltas != 0).any(3).any(1).any(0).nonzero()[:, 0]
    first = int(places[0]) if len(places) else deltas.shape[2] - 1
    return Factors(inputs[:, first:].contiguous(), deltas[:, :, first:].contiguous())


def _aligned(values: Tensor, batch: Batch, axis: int) -> Tensor:
    """Values with each row's last token at the end of `axis`, and zeros in place of padding."""
    length = batch.mask.shape[1]
    sources = torch.arange(length, device=values.device) - (length - 1 - batch.ends)[:, None]
    shape = [len(sources), *[1] * (values.dim() - 1)]
    shape[axis] = length
    index = sources.clamp(min=0).view(shape).expand(values.shape)
    # where, not multiplication: a padded position may hold NaN
    return torch.where((sources >= 0).view(shape), values.gather(axis, index), 0)


def add(
    gram: Gram, layer: Layer, gradients: Gradients, tokens: Int[Tensor, "prompts rank"]
) -> None:
    """Adds the inner products of one module's gradients."""
    if layer.kind is LayerKind.head:
        _add_head(gram, gradients, tokens, layer.module.bias is not None)
    if gradients.vectors:
        vectors = torch.cat(gradients.vectors).flatten(0, 1).to(gram.dtype)
        gram += (vectors @ vectors.T).view_as(gram)
    if gradients.factors:
        _add_factored(gram, gradients.factors)


def add_tied(
    gram: Gram, embedding: Gradients, head: Gradients, tokens: Int[Tensor, "prompts rank"]
) -> None:
    """Cross terms of a matrix that is embedding and head: Σ_t [id(x)_t = o]⟨f(x'), δ_t(x)⟩."""
    features, scales = (torch.cat(each).to(gram.dtype) for each in (head.features, head.scales))
    rows = []
    for factor in embedding.factors:
        along = factor.deltas.to(gram.dtype) @ features.T  # [batch, rank, length, prompts]
        for ids, products in zip(factor.inputs, along, strict=True):
            named = ids[:, None, None] == tokens  # [length, prompts, rank]
            rows.append(torch.einsum("utn,tno->uno", products, named.to(gram.dtype)) * scales)
    crossed = torch.stack(rows)
    gram += crossed + crossed.permute(2, 3, 0, 1)


def _add_head(
    gram: Gram, gradients: Gradients, tokens: Int[Tensor, "prompts rank"], bias: bool
) -> None:
    """[o=u]·⟨f(x'), f(x)⟩, in closed form."""
    features, scales = (
        torch.cat(each).to(gram.dtype) for each in (gradients.features, gradients.scales)
    )
    products = features @ features.T + bias
    same = tokens[:, :, None, None] == tokens
    gram += same * products[:, None, :, None] * scales[:, :, None, None] * scales


def _add_factored(gram: Gram, factors: Sequence[Factors]) -> None:
    """Σ_{t,t'} (δ₁δ₂ᵀ)∘(A₁A₂ᵀ), as ⟨δ₁, (A₁A₂ᵀ)δ₂⟩: AAᵀ is shared by all tokens of a prompt."""
    starts = [0]
    for factor in factors:
        starts.append(starts[-1] + len(factor.inputs))
    for i, left in enumerate(factors):
        for j in range(i, len(factors)):
            block = _pair(left, factors[j], gram.dtype)
            rows, columns = slice(starts[i], starts[i + 1]), slice(starts[j], starts[j + 1])
            gram[rows, :, columns] += block
            if i != j:
                gram[columns, :, rows] += block.permute(2, 3, 0, 1)


def _pair(
    left: Factors, right: Factors, dtype: torch.dtype
) -> Float[Tensor, "left rank right rank"]:
    deltas, rows = right.deltas.to(dtype), []
    for inputs, own in zip(left.inputs, left.deltas.to(dtype), strict=True):
        if inputs.is_floating_point():
            overlap = inputs.to(dtype) @ right.inputs.to(dtype).mT  # A₁A₂ᵀ with each of the others
        else:  # an id stands for its row of the identity
            overlap = (inputs[:, None] == right.inputs[:, None, :]).to(dtype)
        mixed = overlap[:, None] @ deltas
        rows.append(own.flatten(1) @ mixed.flatten(2).flatten(0, 1).T)
    return torch.stack(rows).view(len(rows), -1, *deltas.shape[:2])


Blocks = tuple[
    Float[Tensor, "prompts rank prompts rank"],
    Int[Tensor, "prompts rank"],
    Float[Tensor, "prompts rank"],
]


def exact(
    sweeps: Sequence[Sequence[Layer]],
    passes: Callable[[int, Tensor | None], Iterable[Collected]],
    tokens: Int[Tensor, "prompts rank"] | None,
) -> Blocks:
    """Blocks K(x',x)[o,u] as [x', o, x, u], the tokens, and their log-probabilities.

    `passes` takes the number of a sweep and the tokens of all prompts, once known, and gives the
    results of `collect` for every batch. Prompts stand in the order of the batches. Sums are in
    fp32 or wider.
    """
    gram: Tensor | None = None
    log_p: Tensor | None = None
    for number, sweep in enumerate(sweeps):
        gradients: dict[str, Gradients] = {layer.name: Gradients() for layer in sweep}
        by_batch: list[list[Tensor]] = []
        for batch_gradients, *tokens_and_log_p in passes(number, tokens):
            by_batch.append(tokens_and_log_p)
            for name, one in batch_gradients.items():
                gradients[name].extend(one)
        if gram is None:
            tokens, log_p = (torch.cat(each) for each in zip(*by_batch, strict=True))
            gram = torch.zeros(*tokens.shape, *tokens.shape).to(log_p)
        assert tokens is not None
        if pair := tied(sweep):
            embedding, head = (gradients[layer.name] for layer in pair)
            add_tied(gram, embedding, head, tokens)
        for layer in sweep:
            add(gram, layer, gradients.pop(layer.name), tokens)
    assert gram is not None
    assert tokens is not None
    assert log_p is not None
    return (gram + gram.permute(2, 3, 0, 1)) / 2, tokens, log_p


def groups(
    chosen: Sequence[Layer], lengths: Sequence[int], top_k: int, itemsize: int, budget: float
) -> list[list[Layer]]:
    """Groups of modules whose A and δ for all prompts fit `budget` bytes: one sweep for each.

    Raises ConfigError if one module alone does not fit.
    """
    sweeps: list[list[Layer]] = [[]]
    used, pair = 0, tied(chosen)  # the cross terms of a tied head and its embeddings need both
    for layer in [*pair, *(layer for layer in chosen if layer not in pair)]:
        size = gradient_bytes(layer, lengths, top_k, itemsize)
        if size > budget:
            raise ConfigError(
                f"budget_gib={budget / GIB:.3g}: {layer.name} alone needs {size / GIB:.3g} for "
                f"{len(lengths)} prompts; raise it, or take fewer prompts or a smaller top_k"
            )
        if used + size > budget:
            sweeps.append([])
            used = 0
        sweeps[-1].append(layer)
        used += size
    return sweeps


def gradient_bytes(layer: Layer, lengths: Sequence[int], top_k: int, itemsize: int) -> int:
    """An upper bound of A and δ of one module for all prompts, at full length."""
    inner, wide = _features(layer)
    positions = sum(lengths) * itemsize
    match layer.kind:
        case LayerKind.head:
            return len(lengths) * inner * itemsize
        case LayerKind.norm:
            return 2 * len(lengths) * top_k * wide * itemsize
        case LayerKind.embedding:
            return sum(lengths) * 8 + positions * top_k * wide
    return positions * (inner + top_k * wide)


def _features(layer: Layer) -> tuple[int, int]:
    """The widths of a module's input and output per position."""
    shape = [int(size) for size in next(layer.module.parameters(False)).shape]
    if layer.kind is LayerKind.norm:
        return shape[0], shape[0]
    out_first = isinstance(layer.module, torch.nn.Linear)
    return (shape[1], shape[0]) if out_first else (shape[0], shape[1])
