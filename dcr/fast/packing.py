"""Passes over rows of unlike length that compute no padding and no token twice, on a CPU.

The rows of a batch lie one behind another in one sequence, after one copy of their common prefix,
such as a chat template's system turn. Only attention separates them: its products run over a few
rows of like length, which a CPU multiplies several times faster than torch's fused kernel does in
the backward pass. On other devices, and for models that fail a trial, a batch stays padded.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface

from dcr.core import passes
from dcr.core.models import evaluating
from dcr.decoding import WINDOWS
from dcr.fast import fusing

ATTENTION = "dcr_rows"  # its name in transformers
QUERIES = 256  # of a row in one product
SCORES = 2**18  # of a head in one product
ALIKE = 4  # tokens; a prefix of fewer is not worth its own products
# transformers' names of attention's arguments that this attention does not compute
UNKNOWN = ("softcap", "s_aux", "position_bias", "cache", "head_mask", "alibi")
# parts of names: settings that make a training pass random, and settings of other heads
RANDOM, OTHER_HEADS = ("drop", "jitter"), ("classifier", "summary")


class Packing(IntEnum):
    """The layouts of a batch that a model may take."""

    padded = 0
    rows = 1  # one behind another
    prefix = 2  # one behind another, after their common prefix


@dataclass(frozen=True, eq=False)
class Group:
    """Consecutive rows that attention takes together, padded to the longest."""

    start: int  # of their tokens in the packed sequence
    stop: int
    rows: int
    longest: int
    back: Int[Tensor, "tokens"] | None  # each token's place in the padded group; None: no padding
    before: int = 0  # tokens of the prefix at the front of the sequence


@dataclass(frozen=True, eq=False)
class Layout:
    """A model's inputs for a batch, and the way back from its outputs."""

    inputs: dict[str, Any]  # the model's arguments
    shape: torch.Size
    # the packed tokens' flat places in the padded batch without the prefix; None: nothing is packed
    places: Int[Tensor, "tokens"] | None = None
    prefix: int = 0  # first tokens of every row that the packed batch has once, in front

    def padded(self, states: Float[Tensor, "..."]) -> Float[Tensor, "batch length width"]:
        """The model's output as that of a padded batch, with zero for padding."""
        if self.places is None:
            return states
        (rows, length), width = self.shape, states.shape[-1]
        own = states.new_zeros(rows * (length - self.prefix), width)
        own = own.index_copy(0, self.places, states[0, self.prefix :]).view(rows, -1, width)
        return torch.cat([states[:, : self.prefix].expand(rows, -1, -1), own], 1)


def laid_out(
    module: nn.Module,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    packing: Packing,
) -> Layout:
    """The layout of a right-padded batch under the furthest `packing` that its rows allow.

    A common prefix is laid out once, of which each row keeps a last token of its own. It is not
    shared while dropout is on, since the rows would then share its draws.
    """
    config: Any = module.config
    text, longest = config.get_text_config(), ids.shape[1]
    windows = [getattr(text, name, None) or longest for name in WINDOWS]
    if not packing or min(windows) < longest:
        return Layout({"input_ids": ids, "attention_mask": mask}, ids.shape)
    prefix = 0
    if packing is Packing.prefix and len(ids) > 1 and not _draws(module):
        alike = ((ids == ids[0]) & mask).all(0).long().cumprod(0).sum()
        prefix = min(int(alike), int(mask.sum(1).min()) - 1)
        prefix = prefix if prefix >= ALIKE else 0
    lengths = (mask.sum(1) - prefix).tolist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    lengths = [lengths[row] for row in order]
    own, own_mask = ids[:, prefix:], mask[:, prefix:]
    places = torch.cat([row * own.shape[1] + own_mask[row].nonzero()[:, 0] for row in order])
    positions = [torch.arange(prefix), *(prefix + torch.arange(length) for length in lengths)]
    inputs = {
        "input_ids": torch.cat([ids[0, :prefix], own.flatten()[places]])[None],
        # of four dimensions, or transformers would make one of tokens times tokens
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "rows": _groups(lengths, prefix),
    }
    inputs |= passes.placed(module, torch.cat(positions)[None])
    return Layout(inputs, ids.shape, places, prefix)


def _draws(module: nn.Module) -> bool:
    """Whether a pass of the module in its present mode draws random numbers."""
    config: Any = module.config
    configured = any(
        value and any(word in name for word in RANDOM) and not name.startswith(OTHER_HEADS)
        for name, value in vars(config.get_text_config()).items()
    )
    return any(
        part.training and (configured or (isinstance(part, nn.Dropout) and part.p > 0))
        for part in module.modules()
    )


@contextmanager
def running(module: nn.Module, layout: Layout) -> Iterator[None]:
    """Lets a backbone or trunk, or blocks of it, take the layout while open."""
    with ExitStack() as stack:
        if layout.places is not None:
            stack.enter_context(attending(module, ATTENTION))
            if torch.is_grad_enabled():
                stack.enter_context(fusing.fused(module))
        yield


def run(module: nn.Module, layout: Layout) -> Float[Tensor, "..."]:
    """The last hidden states of a backbone or trunk, in the layout of its inputs."""
    with running(module, layout):
        return module(**layout.inputs, use_cache=False).last_hidden_state


@torch.no_grad()
def packs(module: nn.Module, device: torch.device) -> Packing:
    """The furthest packing under which a backbone or trunk gives the same for two short rows.

    The same is what lies as near as the results of torch's own two kernels lie to each other.
    It is padded off the CPU, for sharded weights, and with gradient checkpointing, which calls
    blocks once more when the pass is over.
    """
    config: Any = module.config
    text = config.get_text_config()
    checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in module.modules())
    dropped = any(
        value and "drop" in name and ("attention" in name or "attn" in name)
        for name, value in vars(text).items()
    )
    sharded = any(hasattr(weight, "device_mesh") for weight in module.parameters())
    if device.type != "cpu" or checkpointing or dropped or sharded:
        return Packing.padded
    ids = torch.arange(2 * (ALIKE + 2)).view(2, -1) * 7 % text.vocab_size
    ids[1, :ALIKE] = ids[0, :ALIKE]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, -1] = False
    # of a module that takes other arguments
    with suppress(TypeError, ValueError, KeyError), evaluating(module):
        padded = Layout({"input_ids": ids, "attention_mask": mask}, ids.shape)
        expected = run(module, padded)[mask]
        with sdpa_kernel(SDPBackend.MATH):  # the same, rounded otherwise
            rounded = (run(module, padded)[mask] - expected).abs().max()
        near = torch.maximum(0.03 * expected.abs().max(), 2 * rounded)
        for packing in (Packing.prefix, Packing.rows):
            layout = laid_out(module, ids, mask, packing)
            states = layout.padded(run(module, layout))[mask]
            if (states - expected).abs().max() <= near:
                return packing
    return Packing.padded


@contextmanager
def attending(module: nn.Module, name: str) -> Iterator[None]:
    """Lets a model attend with transformers' function of that name while open."""
    configs = [part.config for part in module.modules() if hasattr(part, "config")]
    names = [config._attn_implementation_internal for config in configs]  # pyright: ignore
    try:
        for config in configs:
            config._attn_implementation_internal = name  # pyright: ignore
        yield
    finally:
        for config, before in zip(configs, names, strict=True):
            config._attn_implementation_internal = before  # pyright: ignore


def _groups(lengths: Sequence[int], before: int) -> tuple[Group, ...]:
    """Groups of few enough scores: the prefix, if any, then the rows, the longest first."""
    groups, start, first = [], before, 0
    if before:
        groups.append(Group(0, before, 1, before, None))
    while first < len(lengths):
        longest = lengths[first]
        most = max(1, SCORES // ((before + longest) * min(longest, QUERIES)))
        part = lengths[first : first + most]
        stop, padded = start + sum(part), len(part) * longest
        back = None
        if stop - start < padded:
            back = torch.cat([row * longest + torch.arange(n) for row, n in enumerate(part)])
        groups.append(Group(start, stop, len(part), longest, back, before))
        start, first = stop, first + len(part)
    return tuple(groups)


def attention(
    module: nn.Module,
    query: Float[Tensor, "1 heads tokens width"],
    key: Float[Tensor, "1 kept tokens width"],
    value: Float[Tensor, "1 kept tokens other"],
    attention_mask: Any,
    *,
    rows: Sequence[Group],
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Float[Tensor, "1 tokens heads other"], None]:
    """Causal attention inside each row and to its prefix, with transformers' signature.

    Scores and their softmax are in fp32, products in the dtype of the query (autocast's, if on).
    Raises ValueError for an argument that it does not compute.
    """
    if dropout or any(options.get(name) is not None for name in UNKNOWN):
        raise ValueError("attention by rows knows neither dropout nor biases nor caps")
    kind, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    parts = (each[0].transpose(0, 1).to(dtype) for each in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Any = _RowAttention.apply(*parts, rows, scale)
    return output[None], None


AttentionInterface.register(ATTENTION, attention)


class _RowAttention(torch.autograd.Function):
    """Attention by groups, which saves only queries, keys and values for its backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.scale, heads = groups, scale, key.shape[1]
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        with torch.autocast(query.device.type, enabled=False), _exact_sums(query.dtype):
            for group in groups:
                q = _grouped(group, heads, query)
                keys, values = (_with_prefix(group, heads, each) for each in (key, value))
                mixed = q.new_empty(*q.shape[:4], value.shape[-1])
                for part in _blocks(group.longest):
                    end = group.before + part.stop
                    weights = _weights(q[..., part, :], keys[:, :end], scale).to(values.dtype)
                    product = weights @ values[:, :end]
                    mixed[..., part, :] = product.view(*q.shape[:3], -1, value.shape[-1])
                _ungroup(output, group, mixed)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's stub
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        grads = tuple(torch.empty_like(each) for each in (query, key, value))
        scale, heads = ctx.scale, key.shape[1]
        with torch.autocast(query.device.type, enabled=False), _exact_sums(query.dtype):
            for group in ctx.groups:
                q, grad = (_grouped(group, heads, t) for t in (query, outputs[0]))
                keys, values = (_with_prefix(group, heads, t) for t in (key, value))
                dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
                for part in _blocks(group.longest):
                    end = group.before + part.stop
                    queries = q[..., part, :].reshape(len(keys), -1, q.shape[-1])
                    here = grad[..., part, :].reshape(len(keys), -1, value.shape[-1])
                    weights = _weights(q[..., part, :], keys[:, :end], scale)
                    dv[:, :end] += weights.to(values.dtype).mT @ here
                    slope = (here @ values[:, :end].mT).to(weights.dtype)
                    slope = torch.ops.aten._softmax_backward_data(slope, weights, -1, weights.dtype)
                    slope = slope.mul_(scale).to(q.dtype)
                    dk[:, :end] += slope.mT @ queries
                    dq[..., part, :] = (slope @ keys[:, :end]).view(*q.shape[:3], -1, q.shape[-1])
                _ungroup(grads[0], group, dq)
                for whole, part_grad in zip(grads[1:], (dk, dv), strict=True):
                    by_row = part_grad.view(group.rows, heads, 1, -1, part_grad.shape[-1])
                    _ungroup(whole, group, by_row[..., group.before :, :])
                    # the prefix's own group came first and has written the rows this adds to
                    prefix_grad = by_row[..., : group.before, :].sum((0, 2))
                    whole[: group.before] += prefix_grad.transpose(0, 1)
        return *grads, None, None


@contextmanager
def _exact_sums(dtype: torch.dtype) -> Iterator[None]:
    """Lets oneDNN compute fp32 products of values that are bf16 anyway in bf16 while open.

    It multiplies them exactly and adds up in fp32, as it does without.
    """
    backend: Any = torch.backends.mkldnn
    settings = backend.matmul
    before = settings.fp32_precision
    if dtype == torch.bfloat16:
        settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


def _blocks(longest: int) -> list[slice]:
    ends = [*range(QUERIES, longest, QUERIES), longest]
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends])]


def _grouped(group: Group, heads: int, states: Tensor) -> Tensor:
    """A group's part of `states` [tokens, all heads, width], padded with 0.

    The result is [rows, heads, shared, longest, width]: `shared` query heads read each of the
    `heads` of keys.
    """
    part = states[group.start : group.stop]
    if group.back is not None:
        padded = part.new_zeros(group.rows * group.longest, *part.shape[1:])
        part = padded.index_copy_(0, group.back, part)
    return part.view(group.rows, group.longest, heads, -1, part.shape[-1]).permute(0, 2, 3, 1, 4)


def _with_prefix(group: Group, heads: int, states: Tensor) -> Tensor:
    """Keys or values of a group behind the prefix's, [rows * heads, before + longest, width]."""
    own, before = _grouped(group, heads, states), states[: group.before].transpose(0, 1)[:, None]
    return torch.cat([before.expand(group.rows, -1, -1, -1, -1), own], 3).flatten(0, 2)


def _ungroup(whole: Tensor, group: Group, part: Tensor) -> None:
    """Writes a group's part, as `_grouped` gives it, to its tokens in the packed sequence."""
    flat = part.permute(0, 3, 1, 2, 4).reshape(group.rows * group.longest, -1, part.shape[-1])
    whole[group.start : group.stop] = flat if group.back is None else flat[group.back]


def _weights(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """The attention weights of some queries, [rows * heads, shared * queries, keys].

    The last query is at the place of the last key.
    """
    rows, heads, shared, queries, width = query.shape
    wide, length = torch.promote_types(query.dtype, torch.float32), keys.shape[1]
    flat = query.reshape(rows * heads, shared * queries, width).to(wide)
    scores = (flat * scale) @ keys.to(wide).mT
    later = torch.full((queries, length), float("-inf"), dtype=wide).triu_(1 + length - queries)
    scores.view(rows * heads, shared, queries, length).add_(later)
    return scores.softmax(-1)
