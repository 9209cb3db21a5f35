"""Batches through a model, behind one seam: all that trains, decodes or measures asks `current()`.

`Plain` is transformers' own way: a padded batch, a cache that grows token by token. An entry point
may hand in other `Passes` (`use`) that give the same up to rounding and take less time, as
`dcr.fast` does on a CPU.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from dcr.core import activations, batching, grouping, losses, models
from dcr.core.batching import attention_mask, padded
from dcr.core.config import ConfigError, TrainConfig
from dcr.core.models import unwrapped
from dcr.core.prompts import IGNORED

MASKABLE = {"sdpa", "eager"}  # attention that adds whatever mask it is given
WINDOWED = {"sliding_attention", "chunked_attention"}
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
CACHES = ("past_key_values", "cache_params")


class Labelled(NamedTuple):
    """The next-token NLL of a batch in nats, and what one block gave on the way.

    Attributes:
        total: the sum over the tokens that have a target, differentiable.
        each: the NLL of each of them, row by row, detached.
        states: the output of the block that was asked for, [batch, length, width].
    """

    total: Float[Tensor, ""]
    each: Float[Tensor, "tokens"]
    states: Float[Tensor, "batch length width"] | None


@dataclass(frozen=True)
class Prefilled:
    """Prompts as the model has read them: their cache and the logits at their last positions.

    The mask is the cache's: 0 where it holds padding.
    """

    cache: Any
    mask: Int[Tensor, "batch length"]
    logits: Float[Tensor, "batch 1 vocabulary"]


Rest = Callable[[], Float[Tensor, "batch length width"]]


@runtime_checkable
class Passes(Protocol):
    """How batches go through a model. Batches for training are padded on the right."""

    def states(
        self,
        part: nn.Module,
        ids: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length width"]:
        """The last hidden states of a backbone or trunk; those of padding mean nothing."""
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
        """The final-normed states, without gradient, and the pass's last `count` blocks.

        The latter give their states, before the final norm, by the weights of the time they are
        called.
        """
        ...

    def shrinks_frozen(self, settings: TrainConfig) -> bool:
        """Whether `shrink_frozen` is to be called before stage one trains with these settings."""
        ...

    def shrink_frozen(self, model: Any, block: int, whole: bool) -> None:
        """Hold the weights that are frozen beyond `block` in less memory, for training alone.

        They are then no result; passes go through the `whole` model, or to the block.
        """
        ...

    def batches(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        """Places of prompts that are read together, which computes at most so many tokens."""
        ...

    def read(
        self, model: Any, prompts: Sequence[Sequence[int]], keep: bool = True, cache: Any = None
    ) -> Prefilled:
        """Reads prompts, with logits for their last positions alone.

        Without `keep` no cache is made for those who go no further; else an empty `cache` is
        filled.
        """
        ...

    def cache(self, model: Any) -> DynamicCache | None:
        """An empty cache of keys and values; None for a model that brings its own kind."""
        ...

    def decoding(self, model: Any) -> AbstractContextManager[None]:
        """Open while a batch is decoded; its cache is made inside."""
        ...


class Plain:
    """Padded batches, as transformers takes them."""

    def states(self, part: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        return part(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    def nll(
        self, model: Any, ids: Tensor, mask: Tensor, targets: Tensor, block: int | None = None
    ) -> Labelled:
        with activations.captured(model, block) if block else nullcontext([None]) as taken:
            hidden = self.states(models.backbone(model), ids, mask)
        return Labelled(*labelled(model, hidden, targets), taken[0])

    def halved(
        self, model: Any, count: int, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        with noted(model, count) as calls, torch.no_grad():
            states = self.states(models.backbone(model), ids, mask)
        return states, partial(called, model, calls)

    def shrinks_frozen(self, settings: TrainConfig) -> bool:
        return False

    def shrink_frozen(self, model: Any, block: int, whole: bool) -> None:
        pass

    def batches(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        return grouping.by_tokens(prompts, tokens, even=recurrent(model))

    def read(
        self, model: Any, prompts: Sequence[Sequence[int]], keep: bool = True, cache: Any = None
    ) -> Prefilled:
        device = unwrapped(model).device
        ids = padded(prompts, 0, left=True).to(device)
        mask = attention_mask(prompts, left=True).long().to(device)
        return prefilled(model, ids, mask, keep, cache)

    def cache(self, model: Any) -> DynamicCache | None:
        owner: Any = unwrapped(model)
        takes_any = getattr(owner, "_supports_default_dynamic_cache", bool)()
        if not takes_any or "mamba" in type(owner).__name__.lower():
            return None
        return DynamicCache(config=text_config(model))

    def decoding(self, model: Any) -> AbstractContextManager[None]:
        return nullcontext()


_used: list[Passes] = [Plain()]


def current() -> Passes:
    """The passes that this process uses: plain ones, unless `use` was told others."""
    return _used[0]


def use(passes: Passes) -> None:
    """From now on all passes of this process, and of those that it forks, are these."""
    _used[0] = passes


@contextmanager
def using(passes: Passes) -> Iterator[None]:
    """While open, passes are these."""
    before = current()
    use(passes)
    try:
        yield
    finally:
        use(before)


# --- parts of a pass, for whoever implements `Passes` ---------------------------------------------


def labelled(
    model: Any, hidden: Float[Tensor, "batch length width"], targets: Int[Tensor, "batch length"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "tokens"]]:
    """The NLL at final-normed states with a target: the sum, and each without gradient."""
    where = targets != IGNORED
    return losses.token_nll(hidden[where], targets=targets[where], **models.readout(model))


Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


@contextmanager
def noted(model: Any, count: int) -> Iterator[Calls]:
    """While open, notes what each of the last `count` blocks is called with, in their order.

    The hidden states are those of the first alone; each of the others is given what one gives.
    """
    calls: Calls = []

    def note(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        further = dict(kwargs)
        hidden = args[0] if args else further.pop("hidden_states")
        calls.append((args[1:] if calls else (hidden, *args[1:]), further))

    with ExitStack() as stack:
        for block in models.decoder_blocks(model)[-count:]:
            stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield calls


def called(model: Any, calls: Calls) -> Float[Tensor, "..."]:
    """The last blocks called once more as `noted`, by the weights of now."""
    given: Any = ()
    for block, (args, kwargs) in zip(
        models.decoder_blocks(model)[-len(calls) :], calls, strict=True
    ):
        output = block(*given, *args, **kwargs)
        given = (output[0] if isinstance(output, tuple) else output,)
    return given[0]


def prefilled(
    model: Any,
    ids: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch length"],
    keep: bool,
    cache: Any,
) -> Prefilled:
    """Prompts once their last tokens, `ids` padded on the left, are read behind a cache's."""
    options: dict[str, int] = {"use_cache": keep or cache is not None}
    if "logits_to_keep" in _parameters(model):
        options["logits_to_keep"] = 1
    places = batching.positions(mask)[:, -ids.shape[1] :]
    output = forward(model, ids, mask, places, cache, options)
    return Prefilled(output[cache_name(model)] if keep else None, mask, output.logits[:, -1:])


def forward(
    model: Any, ids: Tensor, mask: Tensor, places: Tensor, cache: Any, options: dict[str, int]
) -> Any:
    """A model's output for new tokens at these places behind what the cache holds."""
    placed = batching.placed(unwrapped(model), places)
    kept = {} if cache is None else {cache_name(model): cache}
    given = {"use_cache": True} | placed | kept | options
    return model(input_ids=ids, attention_mask=mask, return_dict=True, **given)


# --- what a model can take ------------------------------------------------------------------------


def obstacle(model: Any, tokens: int) -> str | None:
    """Why a model cannot take a tree mask over `tokens` positions; None where it can."""
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
    """Whether some layer keeps a state instead of keys, into which padding would blend."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    stateful = getattr(unwrapped(model), "_is_stateful", False)
    keyless = CACHES[0] not in _parameters(model)
    return stateful or bool(kinds - WINDOWED - {"full_attention"}) or keyless


def text_config(model: Any) -> Any:
    """The configuration of the decoder of text."""
    return unwrapped(model).config.get_text_config(decoder=True)


def cache_name(model: Any) -> str:
    """The argument by which a model is given its cache; ConfigError where it keeps none."""
    name = next((name for name in CACHES if name in _parameters(model)), None)
    if name is None:
        kind = type(unwrapped(model)).__name__
        raise ConfigError(
            f"model.name: {kind} keeps no cache to continue a prompt from; drop refusal_probability"
        )
    return name


def _parameters(model: Any) -> set[str]:
    return set(inspect.signature(unwrapped(model).forward).parameters)
