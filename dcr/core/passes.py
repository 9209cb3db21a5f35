"""Passes that read prompts and decode answers: all that measures a model asks `current()`.

`Plain` is transformers' own way: a padded batch, and `generate`. An entry point may hand in other
`Passes` (`use`) that give the same up to rounding and take less time, as `dcr.fast` does on a CPU.
Those of training are in `learning`.
"""

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from transformers import GenerationConfig

from dcr.core import machine
from dcr.core.config import ConfigError
from dcr.core.machine import attention_mask, padded
from dcr.core.models.structure import unwrapped

WINDOWED = {"sliding_attention", "chunked_attention"}
CACHES = ("past_key_values", "cache_params")  # arguments for keys and values, or for a state


def positions(
    mask: Shaped[Tensor, "batch length"],
) -> Int[Tensor, "batch length"]:
    """Each token's position in its row; the first token has 0 whatever the padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def placed(module: Any, places: Int[Tensor, "batch length"]) -> dict[str, Tensor]:
    """The positions as an argument of a module's `forward`, or nothing if it takes none."""
    takes = "position_ids" in inspect.signature(module.forward).parameters
    return {"position_ids": places} if takes else {}


@dataclass(frozen=True)
class Prefilled:
    """The cache of prompts that the model has read, and the logits at their last positions.

    The mask is the cache's, with 0 for padding.
    """

    cache: Any
    mask: Int[Tensor, "batch length"]
    logits: Float[Tensor, "batch 1 vocabulary"]


@runtime_checkable
class Passes(Protocol):
    """The ways of prompts through a model."""

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

    def continued(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        most: int,
        changed: Callable[[Tensor, Tensor], Tensor],
        score: Callable[[Tensor], Tensor],
        is_over: Callable[[Sequence[int]], bool],
        streamer: Any = None,
    ) -> tuple[list[list[int]], Tensor]:
        """The greedy new tokens of each prompt, at most `most`, and `score` of its first logits.

        `changed` maps the token ids so far, padded on the left, and the next one's logits to those
        that are decoded from. An answer ends with the first token at which it `is_over`.
        """
        ...


class Plain:
    """Padded batches, as transformers takes them."""

    def batches(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        return machine.by_tokens(prompts, tokens, even=recurrent(model))

    def read(
        self, model: Any, prompts: Sequence[Sequence[int]], keep: bool = True, cache: Any = None
    ) -> Prefilled:
        device = unwrapped(model).device
        ids = padded(prompts, 0, left=True).to(device)
        mask = attention_mask(prompts, left=True).long().to(device)
        return prefilled(model, ids, mask, keep, cache)

    def continued(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        most: int,
        changed: Callable[[Tensor, Tensor], Tensor],
        score: Callable[[Tensor], Tensor],
        is_over: Callable[[Sequence[int]], bool],
        streamer: Any = None,
    ) -> tuple[list[list[int]], Tensor]:
        found: dict[int, tuple[list[int], Tensor]] = {}
        for places in self.batches(model, prompts, sys.maxsize):
            rows = [prompts[place] for place in places]
            answers, scores = generated(model, rows, most, changed, score, is_over, streamer)
            found |= dict(zip(places, zip(answers, scores, strict=True), strict=True))
        in_order = [found[place] for place in range(len(prompts))]
        return [answer for answer, _ in in_order], torch.stack([score for _, score in in_order])


def generated(
    model: Any,
    prompts: Sequence[Sequence[int]],
    most: int,
    changed: Callable[[Tensor, Tensor], Tensor],
    score: Callable[[Tensor], Tensor],
    is_over: Callable[[Sequence[int]], bool],
    streamer: Any,
) -> tuple[list[list[int]], Tensor]:
    """`Passes.continued` by transformers' `generate`, whatever the checkpoint's own settings."""
    owner: Any = unwrapped(model)
    ids = padded(prompts, 0, left=True).to(owner.device)
    answers: list[list[int]] = [[] for _ in prompts]
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=owner.device)
    first: list[Tensor] = []

    def logits(seen: Tensor, given: Tensor) -> Tensor:
        now = changed(seen, given)
        if not first:
            first.append(score(now))
        return now

    def over(seen: Tensor, _: Any) -> Tensor:
        for row, token in enumerate(seen[:, -1].tolist()):
            if not ended[row]:
                answers[row].append(token)
                ended[row] = is_over(answers[row])
        return ended

    own, owner.generation_config = owner.generation_config, GenerationConfig()
    try:
        with torch.inference_mode(), contiguous_head(model):
            owner.generate(
                input_ids=ids,
                attention_mask=attention_mask(prompts, left=True).long().to(owner.device),
                max_new_tokens=most,
                do_sample=False,
                use_cache=not parameters(model).isdisjoint(CACHES),  # RWKV's own mixes up rows
                logits_processor=[logits],
                stopping_criteria=[over],
                streamer=streamer,
            )
    finally:
        owner.generation_config = own
    return answers, first[0]


_used: list[Passes] = [Plain()]


def current() -> Passes:
    """The passes that this process reads with: plain ones, unless `use` has set others."""
    return _used[0]


def use(passes: Passes) -> None:
    """Sets the passes of this process, and of those that it forks."""
    _used[0] = passes


# --- parts of a pass, for implementations of `Passes` ---------------------------------------------


def prefilled(
    model: Any,
    ids: Int[Tensor, "batch new"],
    mask: Int[Tensor, "batch length"],
    keep: bool,
    cache: Any,
) -> Prefilled:
    """Reads the last tokens of prompts, `ids` padded on the left, behind a cache's tokens."""
    options: dict[str, int] = {"use_cache": keep or cache is not None}
    if "logits_to_keep" in parameters(model):
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
    with contiguous_head(model):
        return model(input_ids=ids, attention_mask=mask, return_dict=True, **arguments)


@contextmanager
def contiguous_head(model: Any) -> Iterator[None]:
    """Hands the head the states of some positions as one block of memory while open.

    torch multiplies strided states by a copy of a frozen head for every row of the batch: gigabytes
    for a vocabulary of 50,000, and half of the time of reading short prompts.
    """
    layer = unwrapped(model).get_output_embeddings()
    if layer is None:
        yield
        return
    hook = layer.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()


# --- what a model can take ------------------------------------------------------------------------


def recurrent(model: Any) -> bool:
    """Whether some layer keeps a state instead of keys, which would absorb padding."""
    kinds = set(getattr(text_config(model), "layer_types", None) or ())
    stateful = getattr(unwrapped(model), "_is_stateful", False)
    keyless = CACHES[0] not in parameters(model)
    return stateful or bool(kinds - WINDOWED - {"full_attention"}) or keyless


def text_config(model: Any) -> Any:
    """The configuration of the text decoder."""
    return unwrapped(model).config.get_text_config(decoder=True)


def cache_name(model: Any) -> str:
    """The argument that takes a model's cache. Raises ConfigError if the model keeps none."""
    name = next((name for name in CACHES if name in parameters(model)), None)
    if name is None:
        kind = type(unwrapped(model)).__name__
        raise ConfigError(
            f"model.name: {kind} keeps no cache to continue a prompt from; drop refusal_probability"
        )
    return name


def parameters(model: Any) -> set[str]:
    """The arguments that a model's `forward` takes."""
    return set(inspect.signature(unwrapped(model).forward).parameters)
