"""The negative log-likelihood of tokens under a model, without logits where no loss looks."""

from typing import Any

from torch import Tensor

from dcr import losses, models


def head_nll(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed NLL of the targets and each token's own, from final-normed hidden states alone.

    `hidden` [tokens, width], `targets` [tokens]; logits exist for one chunk at a time. Soft caps
    and logit scales of the model's configuration are applied.
    """
    layer, text = models.head(model), models.unwrapped(model).config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    return losses.token_nll(
        hidden,
        layer.weight,
        targets,
        bias=layer.bias,
        softcap=getattr(text, "final_logit_softcapping", None),
        logit_scale=scale / (getattr(text, "logits_scaling", None) or 1.0),
    )
