"""Passes over rows of unlike length that compute no padding and no token twice, on a CPU.

The rows of a batch lie one behind another in one sequence, and what all of them begin with, such as
a chat template's system turn, stands once before them. Attention alone sees them apart: as
products over a few rows of like length, which a CPU multiplies several times faster than torch's
fused kernel does backwards. On other devices, and for models of which this is not known to be
right, a batch stays padded.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface

from dcr.core import batching
from dcr.fast import fusing

ATTENTION = "dcr_rows"  # its name in transformers
QUERIES = 256  # of a row in one product
SCORES = 2**18  # of a head in one product
ALIKE = 4  # tokens; a prefix of fewer is not worth its own products
# What attention may depend on beyond a row's tokens, as transformers calls it.
UNKNOWN = ("softcap", "s_aux", "position_bias", "cache", "head_mask", "alibi")
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
# Of settings that let chance into a pass while training, and of heads that are not asked for.
CHANCE, OTHER_HEADS = ("drop", "jitter"), ("classifier", "summary")


class Packing(IntEnum):
    """How a batch may be laid out for a model."""

    padded = 0
    rows = 1  # behind one another
    prefix = 2  # the same, behind what they have in common


@dataclass(frozen=True, eq=False)
class Group:
    """Rows behind one another that attention takes together, padded to the longest.

    Attributes:
        start, stop: their tokens in the packed sequence.
        back: the place of each token in the padded group; None where no row is padded.
        before: tokens at the front of the sequence that each row goes on from.
    """

    start: int
    stop: int
    rows: int
    longest: int
    back: Int[Tensor, "tokens"] | None
    before: int = 0


@dataclass(frozen=True, eq=False)
class Layout:
    """A batch as a model is given it, and the way back.

    Attributes:
        inputs: what the model is called with.
        taken: the places of the padded batch behind the prefix, flat, in the order of the packed
            one; None where nothing was packed.
        prefix: the first tokens of every row that the packed batch has once, at its front.
    """

    inputs: dict[str, Any]
    shape: torch.Size
    taken: Int[Tensor, "tokens"] | None = None
    prefix: int = 0

    def padded(self, states: Float[Tensor, "..."]) -> Float[Tensor, "batch length width"]:
        """What the model gave, as of a padded batch; zero where it was not asked."""
        if self.taken is None:
            return states
        (rows, length), width = self.shape, states.shape[-1]
        own = states.new_zeros(rows * (length - self.prefix), width)
        own = own.index_copy(0, self.taken, states[0, self.prefix :]).view(rows, -1, width)
        return torch.cat([states[:, : self.prefix].expand(rows, -1, -1), own], 1)


def laid_out(
    module: nn.Module,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    packing: Packing,
) -> Layout:
    """A right-padded batch, if so told (`packs`) and where its rows allow it without padding.

    What every row begins with is laid out once, of which each row keeps a token of its own; not
    where dropout is on, since the rows would then share its draws.
    """
    config: Any = module.config
    text, longest = config.get_text_config(), ids.shape[1]
    if not packing or any((getattr(text, name, None) or longest) < longest for name in WINDOWS):
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
    taken = torch.cat([row * own.shape[1] + own_mask[row].nonzero()[:, 0] for row in order])
    places = [torch.arange(prefix), *(prefix + torch.arange(length) for length in lengths)]
    inputs = {
        "input_ids": torch.cat([ids[0, :prefix], own.flatten()[taken]])[None],
        # of four dimensions, or transformers would make one of tokens times tokens
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
        "rows": _groups(lengths, prefix),
    }
    inputs |= batching.placed(module, torch.cat(places)[None])
    return Layout(inputs, ids.shape, taken, prefix)


def _draws(module: nn.Module) -> bool:
    """Whether chance has a part in what a module computes as it is."""
    config: Any = module.config
    told = any(
        value and any(word in name for word in CHANCE) and not name.startswith(OTHER_HEADS)
        for name, value in vars(config.get_text_config()).items()
    )
    return any(
        part.training and (told or (isinstance(part, nn.Dropout) and part.p > 0))
        for part in module.modules()
    )


@contextmanager
def running(module: nn.Module, layout: Layout) -> Iterator[None]:
    """While open, a backbone or trunk, or blocks of it, take what was laid out."""
    with ExitStack() as stack:
        if layout.taken is not None:
            stack.enter_context(attending(module, ATTENTION))
            if torch.is_grad_enabled():
                stack.enter_context(fusing.fused(module))
        yield


def run(module: nn.Module, layout: Layout) -> Float[Tensor, "..."]:
    """The last hidden states of a backbone or trunk, laid out as its inputs are."""
    with running(module, layout):
        return module(**layout.inputs, use_cache=False).last_hidden_state


@torch.no_grad()
def packs(module: nn.Module, device: torch.device) -> Packing:
    """The furthest packing with which a backbone or trunk gives the same for two short rows.

    Always padded off the CPU, for weights that ranks share among them, and with gradient
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
        return Packing.padded
    ids = torch.arange(2 * (ALIKE + 2)).view(2, -1) * 7 % text.vocab_size
    ids[1, :ALIKE] = ids[0, :ALIKE]
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[0, -1] = False
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        theirs = run(module, Layout({"input_ids": ids, "attention_mask": mask}, ids.shape))[mask]
        for packing in (Packing.prefix, Packing.rows):
            layout = laid_out(module, ids, mask, packing)
            ours = layout.padded(run(module, layout))[mask]
            if (ours - theirs).abs().max() <= 0.03 * theirs.abs().max():
                return packing
    except (TypeError, ValueError, KeyError):  # a module that takes other arguments
        pass
    finally:
        for part, training in modes:
            part.training = training
    return Packing.padded


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


def _groups(lengths: Sequence[int], before: int) -> tuple[Group, ...]:
    """The prefix, if any, and rows behind it, the longest first, in groups of few enough scores."""
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
    """Causal attention inside each row and to its prefix, as transformers calls such functions.

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
                q = _apart(group, kept, query)
                keys, values = (_looked_at(group, kept, given) for given in (key, value))
                mixed = q.new_empty(*q.shape[:4], value.shape[-1])
                for part in _blocks(group.longest):
                    end = group.before + part.stop
                    shares = _shares(q[..., part, :], keys[:, :end], scale).to(values.dtype)
                    made = shares @ values[:, :end]
                    mixed[..., part, :] = made.view(*q.shape[:3], -1, value.shape[-1])
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
                q, given = (_apart(group, kept, t) for t in (query, outputs[0]))
                keys, values = (_looked_at(group, kept, t) for t in (key, value))
                dq, dk, dv = torch.empty_like(q), torch.zeros_like(keys), torch.zeros_like(values)
                for part in _blocks(group.longest):
                    end = group.before + part.stop
                    asked = q[..., part, :].reshape(len(keys), -1, q.shape[-1])
                    here = given[..., part, :].reshape(len(keys), -1, value.shape[-1])
                    shares = _shares(q[..., part, :], keys[:, :end], scale)
                    dv[:, :end] += shares.to(values.dtype).mT @ here
                    slope = (here @ values[:, :end].mT).to(shares.dtype)
                    slope = torch.ops.aten._softmax_backward_data(slope, shares, -1, shares.dtype)
                    slope = slope.mul_(scale).to(q.dtype)
                    dk[:, :end] += slope.mT @ asked
                    dq[..., part, :] = (slope @ keys[:, :end]).view(*q.shape[:3], -1, q.shape[-1])
                _put_back(found[0], group, dq)
                for whole, of_keys in zip(found[1:], (dk, dv), strict=True):
                    apart = of_keys.view(group.rows, kept, 1, -1, of_keys.shape[-1])
                    _put_back(whole, group, apart[..., group.before :, :])
                    # the prefix's own group came first and has written what this adds to
                    of_prefix = apart[..., : group.before, :].sum((0, 2))
                    whole[: group.before] += of_prefix.transpose(0, 1)
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


def _looked_at(group: Group, kept: int, given: Tensor) -> Tensor:
    """Keys or values of a group behind the prefix's, [rows * kept, before + longest, width]."""
    own, before = _apart(group, kept, given), given[: group.before].transpose(0, 1)[:, None]
    return torch.cat([before.expand(group.rows, -1, -1, -1, -1), own], 3).flatten(0, 2)


def _put_back(whole: Tensor, group: Group, part: Tensor) -> None:
    """Write what was apart to where its tokens are."""
    flat = part.permute(0, 3, 1, 2, 4).reshape(group.rows * group.longest, -1, part.shape[-1])
    whole[group.start : group.stop] = flat if group.back is None else flat[group.back]


def _shares(asked: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Softmax of the scores of some queries, [rows * kept, shared * queries, keys].

    The last query is at the place of the last key.
    """
    rows, kept, shared, queries, width = asked.shape
    wide, seen = torch.promote_types(asked.dtype, torch.float32), keys.shape[1]
    flat = asked.reshape(rows * kept, shared * queries, width).to(wide)
    scores = (flat * scale) @ keys.to(wide).mT
    later = torch.full((queries, seen), float("-inf"), dtype=wide).triu_(1 + seen - queries)
    scores.view(rows * kept, shared, queries, seen).add_(later)
    return scores.softmax(-1)
