"""Passes of batches through a model: training, decoding and measurement all ask `current()`.

`Plain` is transformers' own way: a padded batch, a cache that grows token by token. An entry point
may hand in other `Passes` (`use`) that give the same up to rounding and take less time, as
`dcr.fast` does on a CPU.
"""

import inspect
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from dcr.core import losses, machine
from dcr.core.config import ConfigError, TrainConfig
from dcr.core.models import structure
from dcr.core.models.structure import unwrapped
from dcr.core.prompts import IGNORED

MASKABLE = {"sdpa", "eager"}  # attention that adds any mask
WINDOWED = {"sliding_attention", "chunked_attention"}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
CACHES = ("past_key_values", "cache_params")
# by one of these functions a model's code keeps padding out of its states
MASKING = {"apply_mask_to_padding_states", "create_recurrent_attention_mask"}


def padded(
    sequences: Sequence[Sequence[int]], value: int, left: bool = False
) -> Int[Tensor, "batch length"]:
    """Sequences as one tensor, filled up with `value` on the right (or left)."""
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, True, value, padding_side="left" if left else "right")


def attention_mask(
    sequences: Sequence[Sequence[int]], left: bool = False
) -> Bool[Tensor, "batch length"]:
    """True for a token, False for padding; not derived from ids, as a pad id can be a token."""
    return padded([[1] * len(s) for s in sequences], 0, left).bool()


def positions(
    mask: Shaped[Tensor, "batch length"],
) -> Int[Tensor, "batch length"]:
    """Each token's position in its row; the first token has 0 whatever the padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def placed(module: Any, places: Int[Tensor, "batch length"]) -> dict[str, Tensor]:
    """The positions as an argument of a module's `forward`, or nothing if it takes none."""
    takes = "position_ids" in inspect.signature(module.forward).parameters
    return {"position_ids": places} if takes else {}


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


@dataclass(frozen=True)
class Prefilled:
    """The cache of prompts that the model has read, and the logits at their last positions.

    The mask is the cache's, with 0 for padding.
    """

    cache: Any
    mask: Int[Tensor, "batch length"]
    logits: Float[Tensor, "batch 1 vocabulary"]


Rest = Callable[[], Float[Tensor, "batch length width"]]


@runtime_checkable
class Passes(Protocol):
    """The ways of batches through a model. Batches for training are padded on the right."""

    def states(
        self,
        part: nn.Module,
        ids: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
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

    def halved(
        self,
        model: Any,
        count: int,
        ids: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
    ) -> tuple[Float[Tensor, "batch length width"], Rest]:
        """The final-normed states, without gradient, and a function for the last `count` blocks.

        The function gives their states before the final norm, by the weights at its call.
        """
        ...

    def shrink_frozen(
        self, model: Any, block: int, whole: bool, settings: TrainConfig | None = None
    ) -> bool:
        """Holds the weights that are frozen beyond `block` in less memory, only for training.

        It does so where `settings` allow it, if they are given, and says whether it has: the
        weights are then no result. Passes go through the `whole` model, or to the block.
        """
        ...

    def batches(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Groups of places of prompts, so that a pass computes at most so many tokens."""
        ...

    def read(
        self, model: Any, prompts: Sequence[Sequence[int]], keep: bool = True, cache: Any = None
    ) -> Prefilled:
        """Reads prompts, with logits only for their last positions.

        With `keep` it fills an empty `cache` to go on from; without, it makes none.
        """
        ...

    def decoding(self, model: Any) -> AbstractContextManager[Callable[[], DynamicCache | None]]:
        """A context around the decoding of a batch, with what makes its empty caches.

        A model that brings its own kind of cache gets None.
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
        nll = losses.token_nll(
            hidden[counted], targets=targets[counted], **structure.head_arguments(model)
        )
        return Labelled(*nll, outputs[0])

    def halved(
        self, model: Any, count: int, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        with recorded_calls(model, count) as calls, torch.no_grad():
            states = self.states(structure.backbone(model), ids, mask)
        return states, partial(repeated_calls, model, calls)

    def shrink_frozen(
        self, model: Any, block: int, whole: bool, settings: TrainConfig | None = None
    ) -> bool:
        return False

    def batches(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        return machine.by_tokens(prompts, tokens, even=recurrent(model))

    def read(
        self, model: Any, prompts: Sequence[Sequence[int]], keep: bool = True, cache: Any = None
    ) -> Prefilled:
        device = unwrapped(model).device
        ids = padded(prompts, 0, left=True).to(device)
        mask = attention_mask(prompts, left=True).long().to(device)
        return prefilled(model, ids, mask, keep, cache)

    def decoding(self, model: Any) -> AbstractContextManager[Callable[[], DynamicCache | None]]:
        return nullcontext(partial(empty_cache, model))


_used: list[Passes] = [Plain()]


def current() -> Passes:
    """The passes that this process uses: plain ones, unless `use` has set others."""
    return _used[0]


def use(passes: Passes) -> None:
    """Sets the passes of this process, and of those that it forks."""
    _used[0] = passes


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


def per_row(model: Any) -> bool:
    """Whether an open edit depends on the row or on what is its prompt.

    A prompt must then be read in one pass, and `keep_rows` be told of rows that leave the batch.
    """
    return bool(_by_row(model))


def keep_rows(model: Any, places: Int[Tensor, "rows"]) -> None:
    """Tells open edits that depend on the row which rows of the batch stay, in their new order."""
    for session in _by_row(model):
        session.keep_rows(places)


def _by_row(model: Any) -> list[Any]:
    hooks = structure.backbone(model)._forward_pre_hooks.values()
    return [session for session in hooks if getattr(session, "per_row", False)]


# --- parts of a pass, for implementations of `Passes` ---------------------------------------------


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


def empty_cache(model: Any) -> DynamicCache | None:
    """An empty cache of keys and values; None for a model that brings its own kind."""
    owner: Any = unwrapped(model)
    takes_any = getattr(owner, "_supports_default_dynamic_cache", bool)()
    if not takes_any or "mamba" in type(owner).__name__.lower():
        return None
    return DynamicCache(config=text_config(model))


def prefilled(
    model: Any,
    ids: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch length"],
    keep: bool,
    cache: Any,
) -> Prefilled:
    """Reads the last tokens of prompts, `ids` padded on the left, behind a cache's tokens."""
    options: dict[str, int] = {"use_cache": keep or cache is not None}
    if "logits_to_keep" in _parameters(model):
        options["logits_to_keep"] = 1
    places = positions(mask)[:, -ids.shape[1] :]
    output = forward(model, ids, mask, places, cache, options)
    return Prefilled(output[cache_name(model)] if keep else None, mask, output.logits[:, -1:])


def forward(
    model: Any, ids: Tensor, mask: Tensor, places: Tensor, cache: Any, options: dict[str, int]
) -> Any:
    """A model's output for new tokens at these places behind the tokens of the cache."""
    cached = {} if cache is None else {cache_name(model): cache}
    arguments = {"use_cache": True} | placed(unwrapped(model), places) | cached | options
    with structure.contiguous_head(model):
        return model(input_ids=ids, attention_mask=mask, return_dict=True, **arguments)


# --- what a model can take ------------------------------------------------------------------------


def obstacle(model: Any, tokens: int) -> str | None:
    """The reason why a model cannot take a tree mask over `tokens` positions; None if it can."""
    text = text_config(model)
    if recurrent(model):
        return "not all of its layers are attention over all keys"
    if text._attn_implementation not in MASKABLE:
        return f"its attention is {text._attn_implementation}"
    if "position_ids" not in _parameters(model) or getattr(text, "alibi", False):
        return "its positions cannot be set"
    kinds = getattr(text, "layer_types", None)
    windows = [getattr(text, name, None) for name in WINDOWS]
    windowed = kinds is None or bool(WINDOWED & set(kinds))
    if windowed and any(isinstance(window, int) and tokens >= window for window in windows):
        return f"{tokens} tokens do not fit its attention window"
    return None


def recurrent(model: Any) -> bool:
    """Whether some layer keeps a state instead of keys, which would absorb padding."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    stateful = getattr(unwrapped(model), "_is_stateful", False)
    keyless = CACHES[0] not in _parameters(model)
    return stateful or bool(kinds - WINDOWED - {"full_attention"}) or keyless


def together(model: Any, lengths: Sequence[Hashable]) -> list[list[int]]:
    """Groups of places of rows that one pass may pad on the left: all, or those of one length.

    Rows of one length need no padding, which the states of models without a mask absorb, as RWKV.
    """
    masks = MASKING & vars(sys.modules[type(unwrapped(model)).__module__]).keys()
    if masks or not recurrent(model):
        return [[*range(len(lengths))]]
    return [[i for i, own in enumerate(lengths) if own == each] for each in dict.fromkeys(lengths)]


def filled(arguments: Mapping[str, Any]) -> bool:
    """Whether a pass with these arguments goes on behind a cache of keys and values, or a state."""
    keys, state = map(arguments.get, CACHES)
    if keys is not None:
        return int(keys.get_seq_length()) > 0
    # transformers' `generate` begins with an empty one
    return state is not None and getattr(state, "has_previous_state", lambda: True)()


def text_config(model: Any) -> Any:
    """The configuration of the text decoder."""
    return unwrapped(model).config.get_text_config(decoder=True)


def cache_name(model: Any) -> str:
    """The argument that takes a model's cache. Raises ConfigError if the model keeps none."""
    name = next((name for name in CACHES if name in _parameters(model)), None)
    if name is None:
        kind = type(unwrapped(model)).__name__
        raise ConfigError(
            f"model.name: {kind} keeps no cache to continue a prompt from; drop refusal_probability"
        )
    return name


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(unwrapped(model).forward).parameters)
