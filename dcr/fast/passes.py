"""The core's passes, laid out, shared and fused where that is right for a model and a device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import DynamicCache

from dcr.core import activations, batching, grouping, models, passes
from dcr.core.batching import attention_mask, padded
from dcr.core.config import TrainConfig
from dcr.core.models import unwrapped
from dcr.core.passes import Labelled, Prefilled
from dcr.core.prompts import IGNORED
from dcr.fast import cache, fusing, holding, packing
from dcr.fast.packing import Layout, Packing

BY_LENGTH = {"dynamic", "longrope"}  # rotations that depend on how much a pass reads
WORTHWHILE = 8  # tokens; a pass of one row for fewer of them costs what it saves

# How a backbone or trunk may be given its batches, found once for each.
_packs: "WeakKeyDictionary[nn.Module, dict[torch.device, Packing]]" = WeakKeyDictionary()


class Fast:
    """See `dcr.core.passes.Passes`, whose contract this keeps."""

    def states(self, part: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        layout = laid_out(part, ids, mask)
        return layout.padded(packing.run(part, layout))

    def nll(
        self, model: Any, ids: Tensor, mask: Tensor, targets: Tensor, block: int | None = None
    ) -> Labelled:
        backbone = models.backbone(model)
        layout = laid_out(backbone, ids, mask)
        with activations.captured(model, block) if block else nullcontext() as taken:
            hidden = layout.padded(packing.run(backbone, layout))
        states = layout.padded(taken[0]) if taken else None
        return Labelled(*counted_once(model, hidden, targets, layout.prefix), states)

    def halved(
        self, model: Any, count: int, ids: Tensor, mask: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        backbone = models.backbone(model)
        layout = laid_out(backbone, ids, mask)
        with passes.noted(model, count) as calls, torch.no_grad():
            states = layout.padded(packing.run(backbone, layout))

        def rest() -> Tensor:
            with packing.running(backbone, layout):
                return layout.padded(passes.called(model, calls))

        return states, rest

    def lightens(self, settings: TrainConfig) -> bool:
        return holding.lightens(settings)

    def lighten(self, model: Any, block: int, whole: bool) -> None:
        holding.lighten(model, block, whole)

    def batches(self, model: Any, prompts: Sequence[Sequence[int]], tokens: int) -> list[list[int]]:
        once = shared(model, prompts)
        rests = [ids[once:] for ids in prompts]
        return grouping.by_tokens(rests, tokens, even=passes.recurrent(model))

    def read(
        self, model: Any, prompts: Sequence[Sequence[int]], keep: bool = True, cache: Any = None
    ) -> Prefilled:
        return prefill(model, prompts, keep, cache)

    def cache(self, model: Any) -> DynamicCache | None:
        return cache.roomy_cache(model)

    @contextmanager
    def decoding(self, model: Any) -> Iterator[None]:
        with cache.stepping(model), fusing.prepacked(model):
            yield


def laid_out(
    part: nn.Module, ids: Int[Tensor, "batch length"], mask: Bool[Tensor, "batch length"]
) -> Layout:
    """The batch as a backbone or trunk is best given it."""
    found = _packs.setdefault(part, {})
    if ids.device not in found:
        found[ids.device] = packing.packs(part, ids.device)
    return packing.laid_out(part, ids, mask, found[ids.device])


def counted_once(
    model: Any, hidden: Tensor, targets: Int[Tensor, "batch length"], prefix: int
) -> tuple[Tensor, Tensor]:
    """`passes.labelled` where all rows have their first `prefix` states in common.

    Where their targets are the same as well, the first row's NLL is multiplied by the rows.
    """
    rows = len(targets)
    alike = int((targets[:, :prefix] == targets[:1, :prefix]).all(0).long().cumprod(0).sum())
    total, each = passes.labelled(model, hidden[:, alike:], targets[:, alike:])
    where = targets != IGNORED
    if not where[0, :alike].any():
        return total, each
    once, of_one = passes.labelled(model, hidden[:1, :alike], targets[:1, :alike])
    placed = each.new_zeros(targets.shape)
    placed[:, :alike][where[:, :alike]] = of_one.repeat(rows)
    placed[:, alike:][where[:, alike:]] = each
    return total + rows * once, placed[where]


# --- prompts --------------------------------------------------------------------------------------


def shared(model: Any, prompts: Sequence[Sequence[int]]) -> int:
    """How many first tokens of these prompts are read once, so that each keeps one of its own.

    0 where they are few, where a model keeps more than keys and values or has a window, which
    would count the padding, and where an edit looks at rows or prompts as a whole.
    """
    if len(prompts) < 2:
        return 0
    least, greatest = min(map(tuple, prompts)), max(map(tuple, prompts))  # alike as all are
    pairs = zip(least, greatest, strict=False)
    alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(least))
    alike = min(alike, min(map(len, prompts)) - 1)
    rotated = getattr(passes.text_config(model), "rope_parameters", None) or {}
    apart = (
        alike < WORTHWHILE
        or passes.obstacle(model, batching.UNLIMITED) is not None
        or cache.roomy_cache(model) is None
        or rotated.get("rope_type") in BY_LENGTH
        or activations.per_row(model)
    )
    return 0 if apart else alike


def prefill(
    model: Any, prompts: Sequence[Sequence[int]], keep: bool = True, filled: Any = None
) -> Prefilled:
    """Reads prompts, padded on the left; what all of them begin with, such as a template's first
    tokens, is read once.

    Its keys and values are those of each row; padding lies between them and the row's rest.
    """
    device, rows, once = unwrapped(model).device, len(prompts), shared(model, prompts)
    ids = padded(prompts, 0, left=True).to(device)
    mask = attention_mask([ids[once:] for ids in prompts], left=True).long().to(device)
    if once:
        filled = DynamicCache(config=passes.text_config(model)) if filled is None else filled
        if not keep:  # or those who go no further would hold keys and values of every block
            filled.layers = [cache.FirstLayer() for _ in filled.layers]
        backbone, first = models.backbone(model), torch.tensor([prompts[0][:once]], device=device)
        placed = batching.placed(backbone, torch.arange(once, device=device)[None])
        seen = torch.ones_like(first)
        backbone(
            input_ids=first, attention_mask=seen, past_key_values=filled, use_cache=True, **placed
        )
        layers: list[Any] = filled.layers
        for layer in layers:
            of_one = layer.keys, layer.values
            layer.keys, layer.values = (kept.expand(rows, -1, -1, -1) for kept in of_one)
        mask = torch.cat([mask.new_ones(rows, once), mask], 1)
    # of a shorter row these ids are what it shares, masked as padding is
    return passes.prefilled(model, ids[:, once:], mask, keep, filled)
