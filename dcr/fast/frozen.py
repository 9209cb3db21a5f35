"""Frozen weights: a head whose NLL finds the gradient in its forward pass, and bf16 in stage one.

Passes under autocast read weights in bf16, so that frozen ones can be held so.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dcr.core import losses
from dcr.core.config import Precision
from dcr.core.config.training import FSDP, TrainConfig
from dcr.core.models.structure import decoder_blocks, final_norm, head


def token_nll(
    hidden: Float[Tensor, "tokens width"],
    head_weight: Float[Tensor, "vocabulary width"],
    targets: Int[Tensor, "tokens"],
    *,
    bias: Float[Tensor, "vocabulary"] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk: int = 256,
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens"]]:
    """The result of `losses.token_nll`, with two products with a frozen head and no stored logits.

    Without gradients there is one product; a trainable head takes the core's way.
    """
    trainable = head_weight.requires_grad or (bias is not None and bias.requires_grad)
    differentiated = torch.is_grad_enabled() and (trainable or hidden.requires_grad)
    if trainable and differentiated:
        shape = {"softcap": softcap, "logit_scale": logit_scale, "chunk": chunk}
        return losses.token_nll(hidden, head_weight, targets, bias=bias, **shape)
    dtype = losses.product_dtype(head_weight)
    # cast once, since autocast would cast the head for every chunk
    head = _Head(
        head_weight.to(dtype), None if bias is None else bias.to(dtype), softcap, logit_scale
    )
    with torch.autocast(hidden.device.type, enabled=False):
        if differentiated:
            return _FrozenHeadNLL.apply(hidden, head, targets, chunk)
        per_token, _ = _nll_and_gradient(hidden, head, targets, chunk, with_gradient=False)
        return per_token.sum(), per_token


@dataclass(frozen=True)
class _Head:
    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    scale: float


class _FrozenHeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: _Head, targets: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        per_token, gradient = _nll_and_gradient(hidden, head, targets, chunk, with_gradient=True)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(per_token)
        return per_token.sum(), per_token

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the decorator's stub
        ctx: Any, *outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * outputs[0], None, None, None


def _nll_and_gradient(
    hidden: Tensor, head: _Head, targets: Tensor, chunk: int, *, with_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """The NLL per token and, if asked, d(sum)/d(hidden) = (softmax - onehot) @ W; no autograd."""
    rows = min(chunk, len(hidden))
    # fresh logits for every chunk would cost more in page faults on a CPU than the softmax does
    product = head.weight.new_empty(rows, len(head.weight))
    wide_dtype = torch.promote_types(product.dtype, torch.float32)
    wide = product if product.dtype == wide_dtype else torch.empty_like(product, dtype=wide_dtype)
    per_token = wide.new_empty(len(hidden))
    gradient = torch.empty_like(hidden) if with_gradient else None
    for start in range(0, len(hidden), chunk):
        part = slice(start, start + chunk)
        inputs, target = hidden[part].to(product.dtype), targets[part].long()[:, None]
        logits, raw = wide[: len(inputs)], product[: len(inputs)]
        torch.mm(inputs, head.weight.t(), out=raw)
        if head.bias is not None:
            raw.add_(head.bias)
        if logits is not raw:
            logits.copy_(raw)
        slope = _scale_and_cap_(logits, head, with_slope=with_gradient)
        logits.sub_(logits.amax(1, keepdim=True))
        target_logit = logits.gather(1, target)
        normaliser = logits.exp_().sum(1, keepdim=True)
        nll = normaliser.log() - target_logit
        per_token[part] = nll[:, 0]
        if gradient is not None:
            residual = logits.div_(normaliser).scatter_(1, target, torch.expm1(-nll))
            if slope is not None:
                residual.mul_(slope)
            raw.copy_(residual)  # back to the head's dtype; free if both are one buffer
            gradient[part] = (raw @ head.weight).mul_(head.scale)
    return per_token, gradient


def _scale_and_cap_(logits: Tensor, head: _Head, *, with_slope: bool) -> Tensor | None:
    """Scales and caps in place; returns the slope of the cap at each logit, if asked and capped."""
    if head.scale != 1:
        logits.mul_(head.scale)
    if head.softcap is None:
        return None
    logits.div_(head.softcap).tanh_()
    slope = logits.square().neg_().add_(1) if with_slope else None
    logits.mul_(head.softcap)
    return slope


# --- stage one ------------------------------------------------------------------------------------


def shrinks_frozen(settings: TrainConfig) -> bool:
    """Whether one process trains stage one under autocast, so that frozen weights need less."""
    trainer = settings.trainer
    alone = trainer.devices * trainer.num_nodes == 1 and trainer.strategy != FSDP
    return alone and settings.dcr.precision is Precision.mixed


@torch.no_grad()
def shrink_frozen(model: Any, block: int, whole: bool) -> None:
    """Holds frozen weights as training with autocast to bf16 reads them: products stay the same.

    Frozen projections become bf16, and weights beyond `block` become empty unless passes go through
    the `whole` model. On a CPU the other weights of a whole model are copied, so that no page of
    their memory-mapped file stays.
    """
    embeddings, norm = model.get_input_embeddings().weight, final_norm(model)
    projections = (part for part in model.modules() if isinstance(part, nn.Linear))
    products = {id(part.weight) for part in projections if part.weight is not embeddings}
    beyond = [*decoder_blocks(model)[block:], head(model), *([norm[1]] if norm else [])]
    beyond = [weight for part in beyond for weight in part.parameters() if weight is not embeddings]
    unread = set() if whole else {id(weight) for weight in beyond}
    for weight in model.parameters():
        if id(weight) in unread:
            weight.data = weight.new_empty(0)
        elif not weight.is_floating_point():  # in four bits
            continue
        elif id(weight) in products and not weight.requires_grad:
            weight.data = weight.to(torch.bfloat16)
        elif whole and weight.device.type == "cpu":
            weight.data = weight.clone()
