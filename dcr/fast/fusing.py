"""Parts of a model as one step each, for a CPU: less kept while training, fewer passes.

What they compute is what PEFT and transformers compute, rounded less often.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, UInt8
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from dcr.core import precision
from dcr.core.models.structure import evaluating

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Of every byte of `kept_places` the masks of its eight values, by their size; as complex numbers,
# the widest that torch looks up.
MASKS = {
    size: (torch.arange(256)[:, None] >> torch.arange(8))
    .bitwise_and_(1)
    .neg_()
    .to(bits)
    .view(torch.complex128)
    .squeeze(1)
    for size, bits in BITS.items()
}
# Of eight bytes seen as one number: the i-th bit of the i-th byte, and the lowest bit of each.
DIAGONAL, ONES = 0x8040201008040201 - 2**64, 0x0101010101010101
COPIES = 2**30  # bytes, of a small model's weights; larger ones are not held twice
ROWS = 16  # that packed weights are laid out for; others are multiplied too
NARROW = 64  # what has a side below it, such as a LoRA weight, is not packed


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """While open, LoRA layers, RMS norms and SwiGLU of a model on a CPU run as one step each."""
    changed: list[nn.Module] = []
    alike: dict[type, bool] = {}
    try:
        for module in model.modules():
            kind = type(module)
            named = next((ours for ours in SAME if kind.__name__.endswith(ours)), None)
            if named and kind not in alike:
                alike[kind] = SAME[named][0](module)
            if kind is lora.Linear and _is_plain(module):
                module.forward = functools.partial(lora_linear, module)
            elif named and alike[kind]:
                module.forward = functools.partial(SAME[named][1], module)
            else:
                continue
            changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward


# --- LoRA ---


def _is_plain(layer: Any) -> bool:
    """One adapter without variants on a frozen linear layer."""
    base, active = layer.base_layer, layer.active_adapters
    return (
        type(base) is nn.Linear
        and not base.weight.requires_grad
        and base.weight.is_floating_point()
        and not (layer.disable_adapters or layer.merged or layer.fan_in_fan_out)
        and len(active) == 1
        and active[0] in layer.lora_A
        and active[0] not in layer.lora_variant
        and layer.lora_A[active[0]].bias is layer.lora_B[active[0]].bias is None
    )


def lora_linear(layer: Any, x: Float[Tensor, "*rows inside"]) -> Float[Tensor, "*rows outside"]:
    """x W' + b + s dropout(x) A' B', of a PEFT layer; in autocast's dtype, if on."""
    (name,) = layer.active_adapters
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    dtype = base.weight.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    chance = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    weights = (base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight)
    parts = [None if w is None else w.to(dtype) for w in weights]
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    kept = kept_places(flat.numel(), chance) if chance else None
    out: Any = _LoraLinear.apply(flat, *parts, layer.scaling[name] / (1 - chance), kept)
    return out.view(*x.shape[:-1], -1)


def kept_places(count: int, chance: float) -> UInt8[Tensor, "bytes"]:
    """A bit for each of `count` values, set where dropout leaves it, by torch's generator.

    A quarter of the draws that `bernoulli_` makes: 15 bits for each, so `chance` is met to 2e-5.
    """
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    places = torch.zeros(-(-count // 8) * 8, dtype=torch.int8)
    below = drawn.view(torch.int16)[:count].bitwise_and_(2**15 - 1).sub_(round(chance * 2**15))
    places[:count] = below.bitwise_right_shift_(15).bitwise_not_()  # -1 where it is left
    packed = places.view(torch.int64).bitwise_and_(DIAGONAL).mul_(ONES).bitwise_right_shift_(56)
    return packed.bitwise_and_(255).to(torch.uint8)


def left(x: Float[Tensor, "*places"], kept: UInt8[Tensor, "bytes"] | None) -> Tensor:
    """What dropout leaves of values, 0 for the others."""
    if kept is None:
        return x
    bits, masks = BITS[x.element_size()], MASKS[x.element_size()]
    mask = masks.index_select(0, kept.to(torch.int32)).view(bits).flatten()[: x.numel()]
    return mask.view(x.shape).bitwise_and_(x.view(bits)).view(x.dtype)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        kept: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            inner = left(x, kept) @ down.t()
            out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
            out.addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, kept, inner)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's stub
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (given,) = outputs
        x, weight, down, up, kept, inner = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            through = (given @ up).mul_(ctx.scale)
            of_up = (inner.t() @ given).t() * ctx.scale
            of_down = through.t() @ left(x, kept)
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = (given @ weight).add_(left(through @ down, kept))
        return of_x, None, None, of_down, of_up, None, None


# --- RMS norm ---


def rms_norm(module: Any, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """x / sqrt(mean x² + ε) times the module's weight, normalised in fp32."""
    out: Any = _RMSNorm.apply(x, module.weight, _epsilon(module))
    return out


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_rms_norm(module: Any) -> bool:
    """Whether one of that name does the same: Gemma's adds 1 to its weight, say."""
    if getattr(module, "weight", None) is None or not isinstance(_epsilon(module), float):
        return False
    x = torch.linspace(-0.01, 0.02, 4 * len(module.weight), dtype=module.weight.dtype)
    with torch.no_grad():
        x = x.view(4, -1)
        return bool(torch.equal(module.forward(x), rms_norm(module, x)))  # pyright: ignore


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = x.to(torch.float32)
        rate = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, rate)
        return weight * (wide * rate).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's stub
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, rate = ctx.saved_tensors
        given, normal = outputs[0].to(torch.float32), x.to(torch.float32) * rate
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (given * normal).flatten(0, -2).sum(0).to(weight.dtype)
        given = given * weight
        along = (given * normal).mean(-1, keepdim=True)
        return given.addcmul_(normal, along, value=-1).mul_(rate).to(x.dtype), of_weight, None


# --- SwiGLU ---


def swiglu(module: Any, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """down(silu(gate(x)) up(x)), of which gate(x), up(x) and what down is given are kept."""
    inner: Any = _SwiGLU.apply(module.gate_proj(x), module.up_proj(x))
    return module.down_proj(inner)


@torch.no_grad()
def _is_swiglu(module: Any) -> bool:
    """Whether one of that name does the same: it may scale its gate, or use another function."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    weight = next(module.parameters())
    x = torch.linspace(-1, 1, module.gate_proj.in_features, dtype=weight.dtype)[None]
    with evaluating(module):
        return bool(torch.equal(module.forward(x), swiglu(module, x)))


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's stub
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_up = F.silu(gate).mul_(outputs[0])
        return torch.ops.aten.silu_backward(outputs[0] * up, gate), of_up


# Modules by the end of their class's name: whether one does the same as ours, and ours.
SAME = {"RMSNorm": (_is_rms_norm, rms_norm), "MLP": (_is_swiglu, swiglu)}


# --- linear layers ---


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """While open, linear layers of a model on a CPU multiply by copies of their weights.

    oneDNN lays weights out anew for each product of few rows, which here it does once. No gradient
    passes. Nothing changes where the copies would take more than `COPIES` bytes.
    """
    layers = model.modules() if torch.backends.mkldnn.is_available() else ()
    kinds = {torch.float32, *([torch.bfloat16] if precision.cpu_unit() else [])}
    changed: list[Any] = [layer for layer in layers if _is_packable(layer, kinds)]
    if sum(layer.weight.nbytes for layer in changed) > COPIES:
        changed = []
    try:
        for layer in changed:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
            layer.forward = functools.partial(_product, weight, layer.bias)
        yield
    finally:
        for layer in changed:
            del layer.forward


def _is_packable(layer: Any, kinds: set[torch.dtype]) -> bool:
    """A plain one that is worth it, of a type that oneDNN multiplies here."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    plain = type(weight.data) is Tensor and weight.device.type == "cpu" and weight.dtype in kinds
    return plain and min(weight.shape) >= NARROW


def _product(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
