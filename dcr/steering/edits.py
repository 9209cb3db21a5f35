"""Edits of the residual stream as data, and the one context manager that applies them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from dcr.activations import Site, hook
from dcr.core import passes
from dcr.core.config import ConfigError
from dcr.core.models import structure
from dcr.decoding import per_row


@dataclass(frozen=True, eq=False)
class Edit:
    """A change of the tensor x at one site of one block.

    x ← x − scale·(x·ablate)·ablate, then x ← x + scale·add; at least one of them is given.
    Computed in fp32 (or the model's own, wider type) and rounded once. A scale of 0 leaves x as it
    is to the bit.
    """

    site: Site
    block: int  # from 1
    add: Float[Tensor, " width"] | None = None
    ablate: Float[Tensor, " width"] | None = None  # a unit vector
    scale: float | Float[Tensor, " batch"] = 1.0  # a Tensor holds a factor for each row
    # in each row of the padded prompt the first position that is edited; None: all
    start: Int[Tensor, " batch"] | None = None
    once: bool = False  # only the prompt is edited, no position fed later behind its cache


Edits = Sequence[Edit]
# From the ids of a batch of prompts [batch, length] and its attention mask to the edits for that
# batch. The mask is None in a pass without mask and cache, which scores texts padded on the right.
Plan = Callable[[Tensor, Tensor | None], Edits]


@contextmanager
def edited(model: Any, edits: Edits | Plan) -> Iterator[None]:
    """While open, every forward pass of the model is edited, in the order of `edits`.

    A Plan is called at each prefill (a pass without cache or state, or an empty one) with that
    batch's ids and mask. The passes it makes itself are not edited by it and hold no gradient; its
    edits then also hold for the passes behind the batch's cache. Contexts can be nested, but none
    with a Plan inside one that depends on the row. All hooks are gone on leaving, also by an
    exception.

    Raises ConfigError where a block lacks the site.
    """
    if callable(edits) and per_row(model):
        raise ValueError("a plan's own passes would be edited as rows of another batch")
    session = _Session(model, edits if callable(edits) else None, per_row=callable(edits))
    try:
        if not callable(edits):
            session.install(edits)
        backbone = structure.backbone(model)
        session.opened = backbone.register_forward_pre_hook(session, with_kwargs=True)
        yield
    finally:
        session.uninstall()
        if session.opened is not None:
            session.opened.remove()


@dataclass(eq=False)
class _Session:
    """One open context; called before each pass of the backbone.

    Not before the model's own: PEFT calls the model's `forward` directly, past its hooks.
    """

    model: Any
    plan: Plan | None
    per_row: bool
    prefill: bool = True
    planning: bool = False
    opened: RemovableHandle | None = None
    edits: Edits = ()  # those that are installed
    handles: list[RemovableHandle] = field(default_factory=list)

    def __call__(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.planning:
            return
        self.prefill = not _filled(kwargs)
        if self.prefill and self.plan is not None:
            ids: Any = args[0] if args else kwargs.get("input_ids")
            mask = kwargs.get("attention_mask")
            # transformers' `generate` hands on no mask where nothing is padded
            cached = any(kwargs.get(name) is not None for name in passes.CACHES)
            if mask is None and cached and ids is not None:
                mask = torch.ones_like(ids)
            self.install(self._planned(self.plan, ids, mask))

    def _planned(self, plan: Plan, ids: Any, mask: Any) -> Edits:
        if ids is None or not (mask is None or mask.dim() == 2):
            kind = type(structure.unwrapped(self.model)).__name__
            raise ConfigError(
                f"model.name: {kind} does not hand token ids and a mask of [batch, length] to its "
                "blocks, which steering by the prompt needs; use steering=surgical or none"
            )
        self.uninstall()
        self.planning = True
        try:
            with torch.no_grad():
                return plan(ids, mask)
        finally:
            self.planning = False

    def keep_rows(self, places: Int[Tensor, "rows"]) -> None:
        """Goes on with these rows of the batch alone."""

        def kept(of_rows: Any) -> Any:
            return of_rows[places.to(of_rows.device)] if isinstance(of_rows, Tensor) else of_rows

        self.install([replace(e, scale=kept(e.scale), start=kept(e.start)) for e in self.edits])

    def install(self, edits: Edits) -> None:
        self.uninstall()
        self.edits = edits
        for edit in edits:
            if edit.once or isinstance(edit.scale, Tensor) or edit.start is not None:
                self.per_row = True
            elif edit.scale == 0:
                continue
            change = functools.partial(_applied, self, _placed(self.model, edit))
            self.handles.append(hook(self.model, edit.site, edit.block, change))

    def uninstall(self) -> None:
        while self.handles:
            self.handles.pop().remove()


def _filled(arguments: dict[str, Any]) -> bool:
    """Whether a pass with these arguments goes on behind a cache of keys and values, or a state."""
    keys, state = map(arguments.get, passes.CACHES)
    if keys is not None:
        return int(keys.get_seq_length()) > 0
    # transformers' `generate` begins with an empty one
    return state is not None and getattr(state, "has_previous_state", lambda: True)()


def _placed(model: Any, edit: Edit) -> Edit:
    """The edit with its vectors where the block's weights are, in the type it is computed in."""
    weight = next(structure.decoder_blocks(model)[edit.block - 1].parameters())
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32

    def moved(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector.detach().to(weight.device, kind)

    scale = edit.scale.to(weight.device, kind) if isinstance(edit.scale, Tensor) else edit.scale
    start = None if edit.start is None else edit.start.to(weight.device)
    return replace(edit, add=moved(edit.add), ablate=moved(edit.ablate), scale=scale, start=start)


def _applied(
    session: _Session, edit: Edit, hidden: Float[Tensor, "batch length width"]
) -> Float[Tensor, "batch length width"]:
    if edit.once and not session.prefill:
        return hidden
    for given in (edit.scale, edit.start):
        if isinstance(given, Tensor) and len(given) != len(hidden):
            raise ValueError(f"an edit of {len(given)} rows met a batch of {len(hidden)}")
    factor: Any = edit.scale[:, None, None] if isinstance(edit.scale, Tensor) else edit.scale
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    new = wide
    if edit.ablate is not None:
        new = new - factor * (wide @ edit.ablate)[..., None] * edit.ablate
    if edit.add is not None:
        new = new + factor * edit.add
    new = new.to(hidden.dtype)
    if isinstance(edit.scale, Tensor):
        new = torch.where(factor == 0, hidden, new)
    if session.prefill and edit.start is not None:
        places = torch.arange(hidden.shape[1], device=hidden.device)
        new = torch.where((places >= edit.start[:, None])[..., None], new, hidden)
    return new
