"""Fused parts of a model for a CPU, which save less for the backward pass and read memory less.

They compute the same as PEFT and transformers, rounded less often.
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

from dcr.core import machine
from dcr.core.models import evaluating

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# The masks of the eight values that a byte of `dropout_bits` stands for, by the values' size; as
# complex numbers, the widest type that torch looks up.
MASKS = {
    size: (torch.arange(256)[:, None] >> torch.arange(8))
    .bitwise_and_(1)
    .neg_()
    .to(bits)
    .view(torch.complex128)
    .squeeze(1)
    for size, bits in BITS.items()
}
# In eight bytes as one number: the i-th bit of the i-th byte, and the lowest bit of each byte.
DIAGONAL, ONES = 0x8040201008040201 - 2**64, 0x0101010101010101
COPIES = 2**30  # bytes of weights; a larger model is not held twice
ROWS = 16  # the batch that packed weights are laid out for; other sizes work too
NARROW = 64  # a weight with a shorter side, such as LoRA's, is not packed


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Computes a model's LoRA layers, RMS norms and SwiGLU on a CPU in one step each while open."""
    changed: list[nn.Module] = []
    same: dict[type, bool] = {}
    try:
        for module in model.modules():
            kind = type(module)
            named = next((ours for ours in SAME if kind.__name__.endswith(ours)), None)
            if named and kind not in same:
                same[kind] = SAME[named][0](module)
            if kind is lora.Linear and _is_plain(module):
                module.forward = functools.partial(lora_linear, module)
            elif named and same[kind]:
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
    """Whether the layer has one adapter without variants on a frozen linear layer."""
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
    """A PEFT layer's x W' + b + s dropout(x) A' B', in autocast's dtype if it is on."""
    (name,) = layer.active_adapters
    base, dropout = layer.base_layer, layer.lora_dropout[name]
    dtype = base.weight.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    p = getattr(dropout, "p", 0.0) if dropout.training else 0.0
    weights = (base.weight, base.bias, layer.lora_A[name].weight, layer.lora_B[name].weight)
    parts = [None if w is None else w.to(dtype) for w in weights]
    flat = x.to(dtype).reshape(-1, x.shape[-1])
    bits = dropout_bits(flat.numel(), p) if p else None
    out: Any = _LoraLinear.apply(flat, *parts, layer.scaling[name] / (1 - p), bits)
    return out.view(*x.shape[:-1], -1)


def dropout_bits(count: int, p: float) -> UInt8[Tensor, "bytes"]:
    """A bit for each of `count` values, 1 if dropout with probability `p` keeps it.

    It draws a quarter of the numbers that `bernoulli_` draws from torch's generator, 15 bits for
    each value, so `p` is met to 2e-5.
    """
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    places = torch.zeros(-(-count // 8) * 8, dtype=torch.int8)
    below = drawn.view(torch.int16)[:count].bitwise_and_(2**15 - 1).sub_(round(p * 2**15))
    places[:count] = below.bitwise_right_shift_(15).bitwise_not_()  # -1 for a kept value
    packed = places.view(torch.int64).bitwise_and_(DIAGONAL).mul_(ONES).bitwise_right_shift_(56)
    return packed.bitwise_and_(255).to(torch.uint8)


def dropped_out(x: Float[Tensor, "*places"], bits: UInt8[Tensor, "bytes"] | None) -> Tensor:
    """The values whose bit is 1, and 0 for the others; None keeps all."""
    if bits is None:
        return x
    integer, masks = BITS[x.element_size()], MASKS[x.element_size()]
    mask = masks.index_select(0, bits.to(torch.int32)).view(integer).flatten()[: x.numel()]
    return mask.view(x.shape).bitwise_and_(x.view(integer)).view(x.dtype)


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
        bits: Tensor | None,
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            inner = dropped_out(x, bits) @ down.t()
            out = x @ weight.t() if bias is None else torch.addmm(bias, x, weight.t())
            out.addmm_(inner, up.t(), alpha=scale)
        ctx.save_for_backward(x, weight, down, up, bits, inner)
        ctx.scale = scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's stub
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = outputs
        x, weight, down, up, bits, inner = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            grad_inner = (grad @ up).mul_(ctx.scale)
            grad_up = (inner.t() @ grad).t() * ctx.scale
            grad_down = grad_inner.t() @ dropped_out(x, bits)
            grad_x = None
            if ctx.needs_input_grad[0]:
                grad_x = (grad @ weight).add_(dropped_out(grad_inner @ down, bits))
        return grad_x, None, None, grad_down, grad_up, None, None


# --- RMS norm ---


def rms_norm(module: Any, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """x / sqrt(mean x² + ε) times the module's weight, normalised in fp32."""
    out: Any = _RMSNorm.apply(x, module.weight, _epsilon(module))
    return out


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _is_rms_norm(module: Any) -> bool:
    """Whether a module of that name computes the same; Gemma's adds 1 to its weight, say."""
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
        grad, normal = outputs[0].to(torch.float32), x.to(torch.float32) * rate
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        along = (grad * normal).mean(-1, keepdim=True)
        return grad.addcmul_(normal, along, value=-1).mul_(rate).to(x.dtype), grad_weight, None


# --- SwiGLU ---


def swiglu(module: Any, x: Float[Tensor, "*rows width"]) -> Float[Tensor, "*rows width"]:
    """down(silu(gate(x)) up(x)), which saves gate(x), up(x) and down's input for the backward."""
    inner: Any = _SwiGLU.apply(module.gate_proj(x), module.up_proj(x))
    return module.down_proj(inner)


@torch.no_grad()
def _is_swiglu(module: Any) -> bool:
    """Whether a module of that name computes the same; it may scale its gate, say."""
    if not all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj")):
        return False
    kinds = [w.dtype for w in module.parameters() if w.is_floating_point()]
    dtype = kinds[0] if kinds else torch.float32  # of weights in four bits
    x = torch.linspace(-1, 1, module.gate_proj.in_features, dtype=dtype)[None]
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
        grad_up = F.silu(gate).mul_(outputs[0])
        return torch.ops.aten.silu_backward(outputs[0] * up, gate), grad_up


# By the end of a class's name: the test that it computes the same as ours, and ours.
SAME = {"RMSNorm": (_is_rms_norm, rms_norm), "MLP": (_is_swiglu, swiglu)}


# --- linear layers ---


@contextmanager
def prepacked(model: nn.Module) -> Iterator[None]:
    """Lets a model's linear layers on a CPU multiply by packed copies of their weights while open.

    oneDNN would lay weights out again for each product of few rows. No gradient passes. Nothing
    changes if the copies would take more than `COPIES` bytes.
    """
    layers = model.modules() if torch.backends.mkldnn.is_available() else ()
    kinds = {torch.float32, *([torch.bfloat16] if machine.cpu_unit() else [])}
    changed: list[Any] = [layer for layer in layers if _is_packable(layer, kinds)]
    if sum(layer.weight.nbytes for layer in changed) > COPIES:
        changed = []
    try:
        for layer in changed:
            weight = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), ROWS)
            product = functools.partial(torch.ops.mkldnn._linear_pointwise, W=weight, B=layer.bias)
            layer.forward = functools.partial(product, attr="none", scalars=[], algorithm="")
        yield
    finally:
        for layer in changed:
            del layer.forward


def _is_packable(layer: Any, kinds: set[torch.dtype]) -> bool:
    """Whether a layer is a plain, wide one of a type that oneDNN multiplies here."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        return False
    weight = layer.weight
    plain = type(weight.data) is Tensor and weight.device.type == "cpu" and weight.dtype in kinds
    return plain and min(weight.shape) >= NARROW
