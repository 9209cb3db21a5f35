"""The core's passes, packed, shared and fused if that is right for a model and a device."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import DynamicCache

from dcr.core import learning, machine, passes
from dcr.core.config.training import TrainConfig
from dcr.core.learning import Labelled
from dcr.core.machine import attention_mask, padded
from dcr.core.models import structure
from dcr.core.models.structure import unwrapped
from dcr.core.models.training import head_arguments
from dcr.core.passes import Prefilled
from dcr.core.prompts import IGNORED
from dcr.decoding import Context, decoded, obstacle, per_row
from dcr.fast import cache, frozen, fusing, packing
from dcr.fast.cache import PrefixLayer
from dcr.fast.frozen import token_nll
from dcr.fast.packing import Layout, Packing
from dcr.readout import halving

BY_LENGTH = {"dynamic", "longrope"}  # rotations that depend on the length of a pass
WORTHWHILE = 8  # tokens; a pass of one row for fewer of them costs what it saves

# the furthest packing of each backbone or trunk, tried once
_packs: "WeakKeyDictionary[nn.Module, dict[torch.device, Packing]]" = WeakKeyDictionary()


class Fast:
    """The fast implementation of `passes.Passes`, `learning.Learning` and `halving.Halving`.

    `measured` says of settings whether something is measured on the model while stage one trains,
    for which its frozen weights stay as they are.
    """

    def __init__(self, measured: Callable[[TrainConfig], bool] = lambda _: False) -> None:
        self.measured = measured

    def states(self, part: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        layout = laid_out(part, ids, mask)
        return layout.padded(packing.run(part, layout))

    def nll(
        self, model: Any, ids: Tensor, mask: Tensor, targets: Tensor, block: int | None = None
    ) -> Labelled:
        backbone = structure.backbone(model)
        layout = laid_out(backbone, ids, mask)
        with learning.captured(model, block) if block else nullcontext() as captured:
            hidden = layout.padded(packing.run(backbone, layout))
        states = layout.padded(captured[0]) if captured else None
        return Labelled(*nll_with_prefix(model, hidden, targets, layout.prefix), states)

    def halved(
        self, model: Any, count: int, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        backbone = structure.backbone(model)
        layout = laid_out(backbone, ids, mask)
        with halving.recorded_calls(model, count) as calls, torch.no_grad():
            states = layout.padded(packing.run(backbone, layout))

        def rest() -> Tensor:
            with packing.running(backbone, layout):
                return layout.padded(halving.repeated_calls(model, calls))

        return states, rest

    def shrinks_frozen(self, settings: TrainConfig) -> bool:
        """Whether stage one holds frozen weights light with these settings."""
        return frozen.shrinks_frozen(settings) and not self.measured(settings)

    def shrink_frozen(
        self, model: Any, block: int, whole: bool, settings: TrainConfig | None = None
    ) -> bool:
        light = settings is None or self.shrinks_frozen(settings)
        if light:
            frozen.shrink_frozen(model, block, whole)
        return light

    def batches(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        prefix = shared_prefix(model, prompts)
        rests = [ids[prefix:] for ids in prompts]
        return machine.by_tokens(rests, tokens, even=passes.recurrent(model))

    def read(
        self, model: Any, prompts: Sequence[Sequence[int]], keep: bool = True, cache: Any = None
    ) -> Prefilled:
        """Reads prompts, padded on the left, and their common prefix once, such as a template's.

        The prefix's keys and values serve every row; padding lies between them and the row's rest.
        """
        device, rows, prefix = unwrapped(model).device, len(prompts), shared_prefix(model, prompts)
        ids = padded(prompts, 0, left=True).to(device)
        mask = attention_mask([ids[prefix:] for ids in prompts], left=True).long().to(device)
        if prefix:
            cache = DynamicCache(config=passes.text_config(model)) if cache is None else cache
            if not keep:  # else the rest's keys and values of every block would be held
                cache.layers = [PrefixLayer() for _ in cache.layers]
            backbone = structure.backbone(model)
            first = torch.tensor([prompts[0][:prefix]], device=device)
            placed = passes.placed(backbone, torch.arange(prefix, device=device)[None])
            placed |= {"attention_mask": torch.ones_like(first), "past_key_values": cache}
            backbone(input_ids=first, use_cache=True, **placed)
            layers: list[Any] = cache.layers
            for layer in layers:
                pair = layer.keys, layer.values
                layer.keys, layer.values = (each.expand(rows, -1, -1, -1) for each in pair)
            mask = torch.cat([mask.new_ones(rows, prefix), mask], 1)
        # a shorter row has prefix tokens among these ids, masked as padding is
        return passes.prefilled(model, ids[:, prefix:], mask, keep, cache)

    @contextmanager
    def caching(self, model: Any) -> Iterator[Callable[[], DynamicCache | None]]:
        with cache.decoding_attention(model), fusing.prepacked(model):
            yield partial(cache.roomy_cache, model)

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
        def logits(contexts: Sequence[Context]) -> Tensor:
            return changed(contexts[0].ids, contexts[0].logits)

        readings = [(prompts, math.inf)]
        answers, scores = decoded(model, readings, most, logits, score, is_over, streamer)
        return answers, scores[:, 0]


def laid_out(
    part: nn.Module, ids: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
) -> Layout:
    """The batch in the furthest packing that the backbone or trunk allows on its device."""
    by_device = _packs.setdefault(part, {})
    if ids.device not in by_device:
        by_device[ids.device] = packing.packs(part, ids.device)
    return packing.laid_out(part, ids, mask, by_device[ids.device])


def nll_with_prefix(
    model: Any, hidden: Tensor, targets: Int[Tensor, "batch length"], prefix: int
) -> tuple[Tensor, Tensor]:
    """The NLL of the tokens with a target in rows whose first `prefix` states are the same.

    It is the sum and each, as in `learning.Labelled`. That of common targets is computed for the
    first row and multiplied by the rows.
    """
    rows = len(targets)
    alike = int((targets[:, :prefix] == targets[:1, :prefix]).all(0).long().cumprod(0).sum())
    total, each = _labelled(model, hidden[:, alike:], targets[:, alike:])
    counted = targets != IGNORED
    if not counted[0, :alike].any():
        return total, each
    row_total, row_each = _labelled(model, hidden[:1, :alike], targets[:1, :alike])
    placed = each.new_zeros(targets.shape)
    placed[:, :alike][counted[:, :alike]] = row_each.repeat(rows)
    placed[:, alike:][counted[:, alike:]] = each
    return total + rows * row_total, placed[counted]


def _labelled(model: Any, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    counted = targets != IGNORED
    return token_nll(hidden[counted], targets=targets[counted], **head_arguments(model))


# --- prompts --------------------------------------------------------------------------------------


def shared_prefix(model: Any, prompts: Sequence[Sequence[int]]) -> int:
    """The number of first tokens of these prompts that one pass reads for all; each keeps its last.

    It is 0 for a short prefix, for a model that keeps more than keys and values or has a window,
    which would count the padding, and under an edit that looks at rows or prompts as a whole.
    """
    if len(prompts) < 2:
        return 0
    least, greatest = min(map(tuple, prompts)), max(map(tuple, prompts))  # share what all share
    pairs = zip(least, greatest, strict=False)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(least))
    alike = min(alike, min(map(len, prompts)) - 1)
    rotated = getattr(passes.text_config(model), "rope_parameters", None) or {}
    unshared = (
        alike < WORTHWHILE
        or obstacle(model, structure.UNLIMITED) is not None
        or cache.roomy_cache(model) is None
        or rotated.get("rope_type") in BY_LENGTH
        or per_row(model)
    )
    return 0 if unshared else alike
