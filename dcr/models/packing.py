"""Passes over rows of unlike length that compute no padding, on a CPU.

The rows of a batch lie one behind another in one sequence. Attention alone sees them apart: as
products over a few rows of like length, which a CPU multiplies several times faster than torch's
fused kernel does backwards. On other devices, and for models of which this is not known to be
right, a batch stays padded.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from dcr import batching
from dcr.models import fusing

ATTENTION = "dcr_rows"  # its name in transformers
QUERIES = 256  # of a row in one product
SCORES = 2**18  # of a head in one product
# What attention may depend on beyond a row's tokens, as transformers calls it.
UNKNOWN = ("softcap", "s_aux", "position_bias", "cache", "head_mask", "alibi")
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")


@dataclass(frozen=True, eq=False)
class Group:
    """Rows behind one another that attention takes together, padded to the longest.

    Attributes:
        start, stop: their tokens in the packed sequence.
        back: the place of each token in the padded group; None where no row is padded.
    """

    start: int
    stop: int
    rows: int
    longest: int
    back: Int[Tensor, "tokens"] | None


@dataclass(frozen=True, eq=False)
class Layout:
    """A batch as a model is given it, and the way back.

    Attributes:
        inputs: what the model is called with.
        taken: the places of the padded batch, flat, in the order of the packed one; None where
            nothing was packed.
    """

    inputs: dict[str, Any]
    shape: torch.Size
    taken: Int[Tensor, "tokens"] | None = None

    def padded(self, states: Float[Tensor, "..."]) -> Float[Tensor, "batch length width"]:
        """What the model gave, as of a padded batch; zero where it was not asked."""
        if self.taken is None:
            return states
        width = states.shape[-1]
        whole = states.new_zeros(self.shape.numel(), width)
        return whole.index_copy(0, self.taken, states[0]).view(*self.shape, width)


def laid_out(
    module: nn.Module,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    packed: bool,
) -> Layout:
    """A right-padded batch, if so told (`packs`) and where its rows allow it without padding."""
    config: Any = module.config
    text, longest = config.get_text_config(), ids.shape[1]
    if not packed or any((getattr(text, name, None) or longest) < longest for name in WINDOWS):
        return Layout({"input_ids": ids, "attention_mask": mask}, ids.shape)
    lengths = mask.sum(1).tolist()
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    lengths = [lengths[row] for row in order]
    taken = torch.cat([row * ids.shape[1] + mask[row].nonzero()[:, 0] for row in order])
    places = torch.cat([torch.arange(length) for length in lengths])
    inputs = {
        "input_ids": ids.flatten()[taken][None],
        # of four dimensions, or transformers would make one of tokens times tokens
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "rows": _groups(lengths),
    }
    return Layout(inputs | batching.placed(module, places[None]), ids.shape, taken)


def run(module: nn.Module, layout: Layout) -> Float[Tensor, "..."]:
    """The last hidden states of a backbone or trunk, laid out as its inputs are."""
    with ExitStack() as stack:
        if layout.taken is not None:
            stack.enter_context(attending(module, ATTENTION))
            if torch.is_grad_enabled():
                stack.enter_context(fusing.fused(module))
        return module(**layout.inputs, use_cache=False).last_hidden_state


@torch.no_grad()
def packs(module: nn.Module, device: torch.device) -> bool:
    """Whether a backbone or trunk gives the same for two short rows packed and padded.

    Always False off the CPU, for weights that ranks share among them, and with gradient
    checkpointing, which calls blocks once more when the pass is over.
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
        return False
    ids = torch.arange(10).view(2, 5) * 7 % text.vocab_size
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[0, 3:] = False
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        layout = laid_out(module, ids, mask, packed=True)
        ours = layout.padded(run(module, layout))[mask]
        theirs = run(module, Layout({"input_ids": ids, "attention_mask": mask}, ids.shape))[mask]
    except (TypeError, ValueError, KeyError):  # a module that takes other arguments
        return False
    finally:
        for part, training in modes:
            part.training = training
    return bool((ours - theirs).abs().max() <= 0.03 * theirs.abs().max())


@contextmanager
def attending(module: nn.Module, name: str) -> Iterator[None]:
    """While open, a model attends with the function of that name in transformers."""
    configs = [part.config for part in module.modules() if hasattr(part, "config")]
    kept = [config._attn_implementation_internal for config in configs]  # pyright: ignore
    try:
        for config in configs:
            config._attn_implementation_internal = name  # pyright: ignore
        yield
    finally:
        for config, before in zip(configs, kept, strict=True):
            config._attn_implementation_internal = before  # pyright: ignore


def _groups(lengths: Sequence[int]) -> tuple[Group, ...]:
    """Rows, the longest first, in groups of few enough scores."""
    groups, start, first = [], 0, 0
    while first < len(lengths):
        longest = lengths[first]
        most = max(1, SCORES // (longest * min(longest, QUERIES)))
        part = lengths[first : first + most]
        stop, padded = start + sum(part), len(part) * longest
        back = None
        if stop - start < padded:
            back = torch.cat([row * longest + torch.arange(n) for row, n in enumerate(part)])
        groups.append(Group(start, stop, len(part), longest, back))
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
    """Causal attention inside each row, as transformers calls its attention functions.

    Scores and their softmax are in fp32, products in the dtype of the query (autocast's, if on).
    Raises ValueError for what it does not know.
    """
    if dropout or any(options.get(name) is not None for name in UNKNOWN):
        raise ValueError("attention by rows knows neither dropout nor biases nor caps")
    kind, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    parts = (given[0].transpose(0, 1).to(dtype) for given in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    output: Any = _RowAttention.apply(*parts, rows, scale)
    return output[None], None


AttentionInterface.register(ATTENTION, attention)


class _RowAttention(torch.autograd.Function):
    """Of queries, keys and values alone it keeps what its backward pass needs."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: Sequence[Group], scale: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.scale, kept = groups, scale, key.shape[1]
        output = query.new_empty(*query.shape[:2], value.shape[-1])
        with torch.autocast(query.device.type, enabled=False), _exact_sums(query.dtype):
            for group in groups:
                q, k, v = (_apart(group, kept, given) for given in (query, key, value))
                keys, values, mixed = (
                    k.flatten(0, 2),
                    v.flatten(0, 2),
                    q.new_empty(*q.shape[:4], v.shape[-1]),
                )
                for part in _blocks(group.longest):
                    shares = _shares(q[..., part, :], keys, part, scale).to(v.dtype)
                    made = shares @ values[:, : part.stop]
                    mixed[..., part, :] = made.view(*q.shape[:3], -1, v.shape[-1])
                _put_back(output, group, mixed)
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's stub
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        found = tuple(torch.empty_like(given) for given in (query, key, value))
        scale, kept = ctx.scale, key.shape[1]
        with torch.autocast(query.device.type, enabled=False), _exact_sums(query.dtype):
            for group in ctx.groups:
                q, k, v, given = (_apart(group, kept, t) for t in (query, key, value, outputs[0]))
                keys, values = k.flatten(0, 2), v.flatten(0, 2)
                dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
                for part in _blocks(group.longest):
                    end, asked = part.stop, q[..., part, :].reshape(len(keys), -1, q.shape[-1])
                    here = given[..., part, :].reshape(len(keys), -1, v.shape[-1])
                    shares = _shares(q[..., part, :], keys, part, scale)
                    dv[:, :end] += shares.to(v.dtype).mT @ here
                    slope = (here @ values[:, :end].mT).to(shares.dtype)
                    slope = torch.ops.aten._softmax_backward_data(slope, shares, -1, shares.dtype)
                    slope = slope.mul_(scale).to(q.dtype)
                    dk[:, :end] += slope.mT @ asked
                    dq[..., part, :] = (slope @ keys[:, :end]).view(*q.shape[:3], -1, q.shape[-1])
                for whole, own in zip(found, (dq, dk.view_as(k), dv.view_as(v)), strict=True):
                    _put_back(whole, group, own)
        return *found, None, None


@contextmanager
def _exact_sums(dtype: torch.dtype) -> Iterator[None]:
    """While open, fp32 products of values that are bf16 anyway are made by bf16's faster way.

    It multiplies them exactly and adds up in fp32, as ever.
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


def _apart(group: Group, kept: int, given: Tensor) -> Tensor:
    """Of [tokens, heads, width] a group's as [rows, kept, shared, longest, width], 0 as padding."""
    part = given[group.start : group.stop]
    if group.back is not None:
        padded = part.new_zeros(group.rows * group.longest, *part.shape[1:])
        part = padded.index_copy_(0, group.back, part)
    return part.view(group.rows, group.longest, kept, -1, part.shape[-1]).permute(0, 2, 3, 1, 4)


def _put_back(whole: Tensor, group: Group, part: Tensor) -> None:
    """Write what was apart to where its tokens are."""
    flat = part.permute(0, 3, 1, 2, 4).reshape(group.rows * group.longest, -1, part.shape[-1])
    whole[group.start : group.stop] = flat if group.back is None else flat[group.back]


def _shares(asked: Tensor, keys: Tensor, part: slice, scale: float) -> Tensor:
    """Softmax of the scores of some queries, [rows * kept, shared * queries, keys]."""
    rows, kept, shared, queries, width = asked.shape
    wide = torch.promote_types(asked.dtype, torch.float32)
    flat = asked.reshape(rows * kept, shared * queries, width).to(wide)
    scores = (flat * scale) @ keys[:, : part.stop].to(wide).mT
    later = torch.full((queries, part.stop), float("-inf"), dtype=wide).triu_(1 + part.start)
    scores.view(rows * kept, shared, queries, part.stop).add_(later)
    return scores.softmax(-1)
