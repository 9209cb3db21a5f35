"""Surgical (Wang et al., ICLR 2025): the false-refusal direction taken out, the harmful one put in.

`scores` says how strongly a model is about to refuse, `candidates` takes directions from every
block and template position, `selection` tries each of them on validation prompts.

Departures from the released code: scores and divergences are computed from log-probabilities
without its 1e-8 and 1e-6, and the share of a direction that is ablated is a setting for both.
"""

import logging
import math
from collections.abc import Mapping, Sequence

from jaxtyping import Float, Int
from torch import Tensor, nn

from dcr import models
from dcr.activations import Edit, Edits, Site
from dcr.config import ConfigError, SteeringConfig, SurgicalConfig
from dcr.models import Policy
from dcr.prompts import ChatFormat
from dcr.steering import vectors
from dcr.steering.prompts import Extraction
from dcr.steering.surgical.candidates import Tokens, directions, orthogonalised, tail
from dcr.steering.surgical.scores import last_log_p, openings, refusal_scores
from dcr.steering.surgical.selection import (
    Choice,
    Held,
    everywhere,
    select_ablation,
    select_addition,
)
from dcr.steering.vectors import Found

KINDS = ("harmful", "seemingly_toxic", "harmless")
FEWEST = 8  # prompts of a kind: with fewer, the mean says more about them than about the kind

log = logging.getLogger(__name__)


def find(
    policy: Policy,
    chat: ChatFormat,
    extraction: Extraction,
    settings: SteeringConfig,
    batch_size: int,
) -> Found:
    """Tensors `ablated` (w', of length 1) and `added` (r, as it was measured), both [width].

    Of each kind the first `train` prompts give the means and the next `validation` choose among
    candidates: (template tokens behind the instruction) × ⌊`prune_layers`·depth⌋ for either
    vector. Two passes over the former, and for each candidate up to three over the latter.

    Raises ConfigError where fewer than FEWEST training prompts of a kind pass the filter, no
    candidate survives, the template has no token behind the instruction, or the words for refusals
    cannot follow it.
    """
    told, model = settings.surgical, policy.model
    blocks = _blocks(len(models.decoder_blocks(model)), told.prune_layers)
    refusals = openings(chat, told.refusal_tokens).to(model.device)
    train, held = _split(chat, extraction, told)
    behind = tail(chat, [ids for part in (train, held) for rows in part.values() for ids in rows])
    kept = _filtered(model, train, refusals, told, batch_size)
    harmful, false = directions(model, kept, len(behind), blocks, batch_size)
    clean = {kind: last_log_p(model, rows, batch_size) for kind, rows in held.items()}
    bench = Held(
        model, held["harmless"], held["seemingly_toxic"], clean["harmless"], refusals, batch_size
    )
    log.info(
        "surgical: %d positions × %d blocks are tried, for either vector on %d prompts or fewer",
        *(len(behind), blocks, sum(map(len, held.values()))),
    )
    tensors, ablated, added = _chosen(bench, harmful, false, told)
    names = [str(chat.tokenizer.convert_ids_to_tokens(token)) for token in behind]
    before = {kind: refusal_scores(rows, refusals).mean().item() for kind, rows in clean.items()}
    return tensors, {
        "kept": {kind: [len(kept[kind]), len(train[kind])] for kind in KINDS},
        "ablated": ablated.record(names) | {"clean_score": before["seemingly_toxic"]},
        "added": added.record(names) | {"clean_score": before["harmless"]},
    }


def _chosen(
    bench: Held,
    harmful: Float[Tensor, "positions blocks width"],
    false: Float[Tensor, "positions blocks width"],
    told: SurgicalConfig,
) -> tuple[dict[str, Tensor], Choice, Choice]:
    pure = orthogonalised(false, harmful, told.orthogonalise)
    ablated = select_ablation(bench, pure, told.ablation_kl)
    added = select_addition(bench, harmful, told.addition_kl, told.select_coefficient)
    tensors = {
        "ablated": pure[ablated.place, ablated.block - 1],
        "added": harmful[added.place, added.block - 1],
    }
    return tensors, ablated, added


def edits(policy: Policy, _chat: ChatFormat, found: Found, settings: SteeringConfig) -> Edits:
    """x ← x − s·b·(x·w')w' at three sites of every block, then x ← x + s·a·r at r's block input.

    s is the strength, a `add`, b `ablate`; at all positions, of prompt and answer. With s·b < 1
    removal compounds over sites and depth, and what is left is not a share of 1 − s·b.
    """
    tensors, info = found
    told, depth = settings.surgical, len(models.decoder_blocks(policy.model))
    added = Edit(
        Site.block_input,
        info["added"]["block"],
        add=tensors["added"],
        scale=settings.strength * told.add,
    )
    return [*everywhere(depth, tensors["ablated"], settings.strength * told.ablate), added]


def _blocks(depth: int, share: float) -> int:
    """How many blocks, from the first, candidates are taken from: ⌊share·depth⌋."""
    blocks = int(share * depth + 1e-9)  # 0.29 · 100 is 28.999…
    if blocks < 2:  # before the first block no token has seen another
        raise ConfigError(
            f"steering.surgical.prune_layers={share}: leaves {blocks} of {depth} blocks to take "
            f"vectors from; give at least {math.ceil(200 / depth) / 100}"
            if depth > 1
            else f"model.name: a model of {depth} block has no input that saw a whole prompt; "
            "Surgical needs 2 blocks or more"
        )
    return blocks


def _split(
    chat: ChatFormat, extraction: Extraction, told: SurgicalConfig
) -> tuple[dict[str, list[Tokens]], dict[str, list[Tokens]]]:
    """Training and validation prompts of each kind, each by length: so little is padding."""
    train, held = {}, {}
    for kind in KINDS:
        rows = vectors.encoded(chat, getattr(extraction, kind)[: told.train + told.validation])
        train[kind] = sorted(rows[: told.train], key=len)
        if kind != "harmful":  # no choice is made on these
            held[kind] = sorted(rows[told.train :], key=len)
    empty = [kind for kind, rows in held.items() if not rows]
    if empty:
        raise ConfigError(
            f"steering.surgical.train={told.train}: no {' and no '.join(empty)} prompt is left to "
            "choose vectors on; lower it"
        )
    return train, held


def _filtered(
    model: nn.Module,
    train: Mapping[str, Sequence[Tokens]],
    refusals: Int[Tensor, " refusals"],
    told: SurgicalConfig,
    batch_size: int,
) -> dict[str, list[Tokens]]:
    """Prompts that the model is about to refuse, and harmless ones that it is not."""
    kept: dict[str, list[Tokens]] = {}
    for kind, rows in train.items():
        sign = -1 if kind == "harmless" else 1
        scores = sign * refusal_scores(last_log_p(model, rows, batch_size), refusals)
        kept[kind] = [ids for ids, score in zip(rows, scores.tolist(), strict=True) if score > 0]
    if min(map(len, kept.values())) < FEWEST:
        counts = ", ".join(f"{len(kept[kind])} of {len(train[kind])} {kind}" for kind in KINDS)
        raise ConfigError(
            f"steering.surgical.train={told.train}: {counts} prompts are left where the model "
            f"refuses the first two kinds and answers the third, of each {FEWEST} are needed; "
            "raise it, give the words that this model's refusals begin with in "
            f"steering.surgical.refusal_tokens (now {', '.join(told.refusal_tokens)}), or take a "
            "model that refuses more"
        )
    return kept
