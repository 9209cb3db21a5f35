"""Passes of batches that training learns from: all of it asks `current()`.

`Plain` computes padded batches, as transformers does. An entry point may hand in another `Learning`
(`use`) that gives the same up to rounding in less time, as `dcr.fast` does on a CPU.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dcr.core import losses
from dcr.core.config.training import TrainConfig
from dcr.core.models import structure
from dcr.core.models.training import head_arguments
from dcr.core.prompts import IGNORED


class Labelled(NamedTuple):
    """The next-token NLL of a batch in nats, and the output of one block.

    Attributes:
        total: the sum over the tokens with a target, differentiable.
        each: the NLL of each of them, row by row, detached.
        states: the output of the block asked for, [batch, length, width].
    """

    total: Float[Tensor, ""]
    each: Float[Tensor, "tokens"]
    states: Float[Tensor, "batch length width"] | None


@runtime_checkable
class Learning(Protocol):
    """The ways of a batch, padded on the right, through a model that trains."""

    def states(
        self, part: nn.Module, ids: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
    ) -> Float[Tensor, "batch length width"]:
        """The last hidden states of a backbone or trunk; padding has no meaningful ones."""
        ...

    def nll(
        self,
        model: Any,
        ids: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
        targets: Int[Tensor, "batch length"],
        block: int | None = None,
    ) -> Labelled:
        """The NLL of the targets that are not IGNORED, and the states behind a block (from 1)."""
        ...

    def shrink_frozen(
        self, model: Any, block: int, whole: bool, settings: TrainConfig | None = None
    ) -> bool:
        """Holds the weights that are frozen beyond `block` in less memory, only for training.

        It does so where `settings` allow it, if they are given, and says whether it has: the
        weights are then no result. Passes go through the `whole` model, or to the block.
        """
        ...


class Plain:
    """Padded batches, as transformers takes them."""

    def states(self, part: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        return part(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def nll(
        self, model: Any, ids: Tensor, mask: Tensor, targets: Tensor, block: int | None = None
    ) -> Labelled:
        with captured(model, block) if block else nullcontext([None]) as outputs:
            hidden = self.states(structure.backbone(model), ids, mask)
        counted = targets != IGNORED
        nll = losses.token_nll(hidden[counted], targets=targets[counted], **head_arguments(model))
        return Labelled(*nll, outputs[0])

    def shrink_frozen(
        self, model: Any, block: int, whole: bool, settings: TrainConfig | None = None
    ) -> bool:
        return False


_used: list[Learning] = [Plain()]


def current() -> Learning:
    """The passes that this process trains with: plain ones, unless `use` has set others."""
    return _used[0]


def use(learning: Learning) -> None:
    """Sets the passes that this process trains with."""
    _used[0] = learning


# --- hidden states -------------------------------------------------------------------------------


@contextmanager
def captured(model: Any, block: int) -> Iterator[list[Tensor]]:
    """Gives a list to which every forward pass appends the output of `block` (from 1) while open.

    The outputs, [batch, length, width], stay in the autograd graph. They are before the final norm,
    also behind the last block. The hook goes at the end, also after an exception.
    """
    outputs: list[Tensor] = []

    def take(_module: Any, _inputs: Any, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = structure.decoder_blocks(model)[block - 1].register_forward_hook(take)
    try:
        yield outputs
    finally:
        handle.remove()


def pooled(
    hidden: Float[Tensor, "batch length width"], spans: Int[Tensor, "batch 2"]
) -> Float[Tensor, "batch width"]:
    """Mean over the positions `spans[i, 0]` up to but without `spans[i, 1]`, in fp32."""
    places = torch.arange(hidden.shape[1], device=hidden.device)
    inside: Bool[Tensor, "batch length"] = (places >= spans[:, :1]) & (places < spans[:, 1:])
    # where, not multiplication: a padded position may hold NaN and 0 * NaN is NaN
    kept = torch.where(inside[:, :, None], hidden.float(), 0.0)
    return kept.sum(1) / inside.sum(1, keepdim=True)
