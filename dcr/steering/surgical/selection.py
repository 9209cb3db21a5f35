"""Each candidate is tried on validation prompts; the best that leaves harmless ones alone stays."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from dcr import models
from dcr.activations import Edit, Site, edited
from dcr.config import ConfigError
from dcr.steering.ablation import SITES
from dcr.steering.surgical.candidates import Tokens
from dcr.steering.surgical.scores import divergence, last_log_p, refusal_scores

# From a candidate and its block to (KL on harmless prompts, mean refusal score).
Trial = Callable[[Tensor, int], tuple[float, float]]


@dataclass(frozen=True)
class Held:
    """Validation prompts; `clean` is what the unedited model says to the harmless ones."""

    model: Any
    harmless: Sequence[Tokens]
    seemingly_toxic: Sequence[Tokens]
    clean: Float[Tensor, "prompts vocabulary"]
    refusals: Int[Tensor, " refusals"]
    batch_size: int


@dataclass(frozen=True)
class Choice:
    """A candidate: at `place` among the positions and the input of `block` (from 1)."""

    place: int
    block: int
    score: float
    kl: float
    candidates: int
    survivors: int

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """For a record of the run; `position` counts from the prompt's end (-1: last token)."""
        return {
            "block": self.block,
            "position": self.place - len(names),
            "token": names[self.place],
            "score": self.score,
            "kl": self.kl,
            "candidates": self.candidates,
            "survivors": self.survivors,
        }


def everywhere(depth: int, direction: Float[Tensor, " width"], share: float) -> list[Edit]:
    """x ← x − share·(x·w)w at block inputs, attention and MLP outputs of all blocks."""
    return [
        Edit(site, block, ablate=direction, scale=share)
        for block in range(1, depth + 1)
        for site in SITES
    ]


def select_ablation(
    held: Held, candidates: Float[Tensor, "positions blocks width"], bound: float
) -> Choice:
    """The lowest mean refusal score on seemingly toxic prompts, under full ablation.

    Of candidates whose ablation moves the answer to harmless prompts by no more than `bound`.
    """
    depth = len(models.decoder_blocks(held.model))

    def ablation(direction: Tensor, _block: int) -> tuple[float, float]:
        edits = everywhere(depth, direction, 1.0)
        with edited(held.model, edits):
            harmless = last_log_p(held.model, held.harmless, held.batch_size)
            kl = divergence(held.clean, harmless).mean().item()
            if not kl <= bound:  # one pass is saved
                return kl, nan
            toxic = last_log_p(held.model, held.seemingly_toxic, held.batch_size)
        return kl, refusal_scores(toxic, held.refusals).mean().item()

    return _select("ablation", candidates, ablation, bound, 1)


def select_addition(
    held: Held,
    candidates: Float[Tensor, "positions blocks width"],
    bound: float,
    coefficient: float,
) -> Choice:
    """The highest mean refusal score on harmless prompts, with coefficient·r at r's block input.

    Of candidates whose addition moves the answer to these prompts by no more than `bound`. At
    coefficient 0, as released, all are equal and the first stays.
    """

    def addition(direction: Tensor, block: int) -> tuple[float, float]:
        edit = Edit(Site.block_input, block, add=direction, scale=coefficient)
        with edited(held.model, [edit]):
            moved = last_log_p(held.model, held.harmless, held.batch_size)
        kl = divergence(held.clean, moved).mean().item()
        return kl, refusal_scores(moved, held.refusals).mean().item()

    return _select("addition", candidates, addition, bound, -1)


def _select(
    name: str,
    candidates: Float[Tensor, "positions blocks width"],
    trial: Trial,
    bound: float,
    sign: int,
) -> Choice:
    """The survivor with the lowest sign·score; of equal ones that of the first position and block.

    Raises ConfigError where none survives.
    """
    real = (~candidates.isnan().any(-1)).nonzero().tolist()
    tried = []
    # no bar where nobody watches
    for place, index in tqdm(real, unit="candidate", desc=f"surgical {name}", disable=None):
        kl, score = trial(candidates[place, index], index + 1)
        tried.append((place, index + 1, kl, score))
    alive = [entry for entry in tried if entry[2] <= bound and not isnan(entry[3])]
    if not alive:
        raise ConfigError(_nothing_left(name, [entry[2] for entry in tried], bound))
    place, block, kl, score = min(alive, key=lambda entry: sign * entry[3])
    return Choice(place, block, score, kl, candidates[..., 0].numel(), len(alive))


def _nothing_left(name: str, tried: Sequence[float], bound: float) -> str:
    if not tried:
        return (
            "data.extraction: harmful, seemingly toxic and harmless prompts leave no direction to "
            f"choose for {name}; name other sources"
        )
    measured = [kl for kl in tried if not isnan(kl)]
    if not measured:
        return f"precision: the model's logits are NaN under each {name}; give precision=fp32"
    return (
        f"steering.surgical.{name}_kl={bound}: each of {len(tried)} candidates moves the answers "
        f"to harmless prompts farther, the nearest by {min(measured):.3g} nats; raise it"
    )
