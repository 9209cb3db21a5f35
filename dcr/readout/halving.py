"""A pass whose last blocks can be run again by themselves, by the weights of that time.

Whoever hands in other passes to train with (`learning.use`) may hand in a `Halving` with them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dcr.core import learning
from dcr.core.models import structure

Rest = Callable[[], Float[Tensor, "batch length width"]]


@runtime_checkable
class Halving(Protocol):
    """Passes that do this in less time, as `dcr.fast` does on a CPU."""

    def halved(
        self,
        model: Any,
        count: int,
        ids: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
    ) -> tuple[Float[Tensor, "batch length width"], Rest]:
        """Does what `halved` below does, for a batch that is padded on the right."""
        ...


def halved(
    model: Any,
    count: int,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
) -> tuple[Float[Tensor, "batch length width"], Rest]:
    """The final-normed states, without gradient, and a function for the last `count` blocks.

    The function gives their states before the final norm, by the weights at its call.
    """
    passes = learning.current()
    if isinstance(passes, Halving):
        return passes.halved(model, count, ids, mask)
    with recorded_calls(model, count) as calls, torch.no_grad():
        states = passes.states(structure.backbone(model), ids, mask)
    return states, partial(repeated_calls, model, calls)


Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@contextmanager
def recorded_calls(model: Any, count: int) -> Iterator[Calls]:
    """Records the arguments of each of the last `count` blocks, in their order, while open.

    Only the first call keeps its hidden states, since each later block takes the previous output.
    """
    calls: Calls = []

    def record(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        further = dict(kwargs)
        hidden = args[0] if args else further.pop("hidden_states")
        calls.append((args[1:] if calls else (hidden, *args[1:]), further))

    with ExitStack() as stack:
        for block in structure.decoder_blocks(model)[-count:]:
            stack.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
        yield calls


def repeated_calls(model: Any, calls: Calls) -> Float[Tensor, "..."]:
    """The output of the last blocks, called again with recorded arguments and present weights."""
    hidden: Any = ()
    for block, (args, kwargs) in zip(
        structure.decoder_blocks(model)[-len(calls) :], calls, strict=True
    ):
        output = block(*hidden, *args, **kwargs)
        hidden = (output[0] if isinstance(output, tuple) else output,)
    return hidden[0]
