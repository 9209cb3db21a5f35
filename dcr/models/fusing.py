"""Parts of a model as one step of autograd each, for training on a CPU: less kept, fewer passes.

What they compute is what PEFT and transformers compute, rounded less often.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners import lora
from torch import Tensor, nn

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """While open, LoRA layers and RMS norms of a model on a CPU run as one step each."""
    changed: list[nn.Module] = []
    norms: dict[type, bool] = {}
    try:
        for module in model.modules():
            kind = type(module)
            if kind.__name__.endswith("RMSNorm") and kind not in norms:
                norms[kind] = _is_rms_norm(module)
            if kind is lora.Linear and _is_plain(module):
                module.forward = functools.partial(lora_linear, module)
            elif norms.get(kind):
                module.forward = functools.partial(rms_norm, module)
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
    kept = kept_places(flat.shape, chance) if chance else None
    out: Any = _LoraLinear.apply(flat, *parts, layer.scaling[name] / (1 - chance), kept)
    return out.view(*x.shape[:-1], -1)


def kept_places(shape: torch.Size, chance: float) -> Int[Tensor, "..."]:
    """-1 where dropout leaves a value and 0 where it drops it, by torch's generator.

    A quarter of the draws that `bernoulli_` makes: 15 bits for each, so `chance` is met to 2e-5.
    """
    count = shape.numel()
    drawn = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    places = drawn.view(torch.int16)[:count].bitwise_and_(2**15 - 1)
    below = places.sub_(round(chance * 2**15)).bitwise_right_shift_(15)
    return below.bitwise_not_().to(torch.int8).view(shape)


def _left(x: Tensor, kept: Tensor | None) -> Tensor:
    if kept is None:
        return x
    bits = BITS[x.element_size()]
    return (x.view(bits) & kept.to(bits)).view(x.dtype)


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
            inner = _left(x, kept) @ down.t()
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
            of_down = through.t() @ _left(x, kept)
            of_x = None
            if ctx.needs_input_grad[0]:
                of_x = (given @ weight).add_(_left(through @ down, kept))
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
        return bool(torch.equal(module(x), rms_norm(module, x)))  # pyright: ignore


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
