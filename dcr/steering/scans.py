"""SCANS (Cao et al., AAAI 2025): steers a query that moves like a toxic one to refusal, else away.

Two kinds of anchors give a unit vector for each steered block, and the reference: how the stream of
a toxic prompt moves when the answer begins with " Sure". A query that moves alike counts as toxic.

Departures from the released code: one threshold serves all test sets; prompts are drawn by seed;
queries are compared up to the last block in models of every size; the last block's output is taken
before the final norm, where HF's hidden state is normed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from dcr.activations import Site
from dcr.core import prompts
from dcr.core.config import ConfigError
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.steering import ScansConfig, ScansEnd, ScansLayers, SteeringConfig, vectors
from dcr.steering.edits import Edit, Edits, Plan
from dcr.steering.prompts import Extraction
from dcr.steering.vectors import Vectors

SUFFIX = " Sure"
ABSOLUTE = range(11, 21)  # 0-based outputs [10, 20) of the released code, for models of 32 blocks
LAST, END, SURE = 0, 1, 2  # the places of each prompt: its last token, s1, s2


@dataclass(frozen=True)
class Query:
    """The suffix, whose last token is s2, and the `tail` from the user's end token (s1) on.

    A prompt that does not end with the tail, as in text without a chat template, has s1 at its last
    token; so has every prompt if the tail is empty.
    """

    suffix: list[int]
    tail: list[int]


def find(
    policy: Policy, chat: ChatFormat, extraction: Extraction, settings: SteeringConfig
) -> Vectors:
    """Tensors `vectors` [steered blocks, width] and `reference` [compared blocks, width].

    Each anchor takes one pass. Anchors beyond the first `scans.anchors` of each kind calibrate the
    threshold. Raises ConfigError as `steered_blocks` and `query` do.
    """
    scans, depth = settings.scans, len(structure.decoder_blocks(policy.model))
    steered, asked = steered_blocks(depth, scans), query(chat, scans)
    compared = range(steered[0], depth + 1)
    states = {
        kind: read_places(policy.model, asked, vectors.encoded(chat, rows))
        for kind, rows in (("toxic", extraction.toxic), ("normal", extraction.normal))
    }
    inside = [block - 1 for block in steered]
    means = {k: s[:, : scans.anchors, LAST].mean(1)[inside] for k, s in states.items()}
    moved = {k: transitions(s, compared) for k, s in states.items()}
    reference = moved["toxic"][:, : scans.anchors].mean(1)
    threshold, accuracy = scans.threshold, None
    if threshold is None:
        scores = {k: similarity(m[:, scans.anchors :], reference) for k, m in moved.items()}
        threshold, accuracy = calibrated(scores["toxic"].tolist(), scores["normal"].tolist())
    directions = vectors.unit(means["toxic"] - means["normal"], "toxic and normal prompts")
    info = {
        "blocks": [steered[0], steered[-1]],
        "compared": [compared[0], compared[-1]],
        "threshold": threshold,
        "balanced_accuracy": accuracy,
    }
    return {"vectors": directions, "reference": reference}, info


def edits(policy: Policy, chat: ChatFormat, made: Vectors, settings: SteeringConfig) -> Plan:
    """Edits x ← x + σ·α·v at each steered block from the last prompt token on, σ = ±1 by row.

    Each batch of prompts takes one further pass, which computes no logits.

    The lm-evaluation-harness scores texts without a mask, padded on the right with id 0. Each row's
    text without its trailing zeros is then the query, compared inside the chat template, as the
    reference was, since bare text moves otherwise. Nobody can tell there where the instruction
    ends, so every position is steered and no scored token goes unsteered.
    """
    tensors, info = made
    device, asked = policy.model.device, query(chat, settings.scans)
    directions, reference = (tensors[name].to(device) for name in ("vectors", "reference"))
    steered, compared = (range(a, b + 1) for a, b in (info["blocks"], info["compared"]))
    lead = chat.lead()

    def plan(ids: Tensor, mask: Tensor | None) -> Edits:
        prompts, start = rows(ids, mask), starts(ids, mask)
        if mask is None:
            texts = chat.tokenizer.batch_decode(prompts, skip_special_tokens=True)
            prompts = [chat.prompt_ids(text) for text in texts]
        else:
            given, prompts = prompts, asked_in(prompts, lead)
            begun = [len(row) - len(own) for row, own in zip(given, prompts, strict=True)]
            start = start - torch.tensor(begun, device=start.device)
        moved = transitions(read_places(policy.model, asked, prompts, len(prompts)), compared)
        toxic = similarity(moved, reference) >= info["threshold"]
        scale = torch.where(toxic, settings.strength, -settings.strength)
        common = Edit(Site.block_output, 1, scale=scale, start=start)
        return [
            replace(common, block=block, add=vector)
            for block, vector in zip(steered, directions, strict=True)
        ]

    return plan


def steered_blocks(depth: int, scans: ScansConfig) -> range:
    """The blocks (from 1) whose output is steered.

    `absolute` gives 11 to 20, whatever the depth; `middle_third` gives 10 to 18 of 28. Raises
    ConfigError for `absolute` in a model without a block 20.
    """
    if scans.layers is ScansLayers.middle_third:
        return range(depth // 3 + 1, max(2 * depth // 3, depth // 3 + 1) + 1)
    if depth < ABSOLUTE[-1]:
        raise ConfigError(
            f"steering.scans.layers=absolute: steers blocks {ABSOLUTE[0]} to {ABSOLUTE[-1]}, the "
            f"model has {depth}; give steering.scans.layers=middle_third"
        )
    return ABSOLUTE


def query(chat: ChatFormat, scans: ScansConfig) -> Query:
    """The places to read. Raises ConfigError if no token of its own ends the user's turn."""
    tokenizer = chat.tokenizer
    suffix = tokenizer.encode(SUFFIX, add_special_tokens=False)
    if scans.s1 is ScansEnd.prompt_last:
        return Query(suffix, [])
    ids = vectors.tokens_after_prompt(chat)
    special = prompts.special_tokens(tokenizer).values()
    first = next((place for place, token in enumerate(ids) if token in special), None)
    tail = [] if first is None else ids[first:]
    if not tail or chat.prompt_ids(vectors.PLACEHOLDER)[-len(tail) :] != tail:
        raise ConfigError(
            "steering.scans.s1=user_end: the chat template ends the user's turn without a token of "
            "its own; give steering.scans.s1=prompt_last"
        )
    return Query(suffix, tail)


def read_places(
    model: Any, asked: Query, prompts: Sequence[Sequence[int]], size: int = vectors.BATCH_SIZE
) -> Float[Tensor, "blocks prompts 3 width"]:
    """Outputs of all blocks at the three places of each prompt with the suffix appended."""
    offsets, added = [], len(asked.suffix)
    for prompt in prompts:
        ends = bool(asked.tail) and list(prompt[-len(asked.tail) :]) == asked.tail
        end = len(asked.tail) if ends else 1
        offsets.append([-added - 1, -added - end, -1])
    return vectors.read_states(model, [[*p, *asked.suffix] for p in prompts], offsets, size=size)


def transitions(
    states: Float[Tensor, "blocks prompts 3 width"], compared: range
) -> Float[Tensor, "compared prompts width"]:
    """t = h(s1) − h(s2) of the blocks compared."""
    inside = states[compared[0] - 1 : compared[-1]]
    return inside[:, :, END] - inside[:, :, SURE]


def similarity(
    moved: Float[Tensor, "compared prompts width"], reference: Float[Tensor, "compared width"]
) -> Float[Tensor, " prompts"]:
    """c(q): the cosine of a transition and the reference, averaged over the blocks."""
    return F.cosine_similarity(moved, reference[:, None], dim=-1).mean(0)


def calibrated(toxic: Sequence[float], normal: Sequence[float]) -> tuple[float, float]:
    """The threshold T of the highest balanced accuracy of "toxic if c ≥ T", and that accuracy.

    T lies halfway between two scores; a tie goes to the widest gap, then to the lowest T. The
    lowest score of all, which takes every query for toxic, wins only if nothing beats it.
    """
    scores = sorted({*toxic, *normal})
    gaps = [(high - low, (high + low) / 2) for low, high in pairwise(scores)]

    def accuracy(threshold: float) -> float:
        true_positive = sum(score >= threshold for score in toxic) / len(toxic)
        true_negative = sum(score < threshold for score in normal) / len(normal)
        return (true_positive + true_negative) / 2

    candidates = [(0.0, scores[0]), *gaps]
    _, best = max(candidates, key=lambda c: (accuracy(c[1]), c[0], -c[1]))
    return best, accuracy(best)


def rows(ids: Int[Tensor, "batch length"], mask: Tensor | None) -> list[list[int]]:
    """The prompts without their padding, or without trailing zeros if there is no mask."""
    if mask is not None:
        return [row[keep].tolist() for row, keep in zip(ids, mask.bool(), strict=True)]
    texts = []
    for row in ids.tolist():
        end = len(row)
        while end > 1 and row[end - 1] == 0:
            end -= 1
        texts.append(row[:end])
    return texts


def asked_in(given: Sequence[list[int]], lead: list[int]) -> list[list[int]]:
    """The prompts without the tokens of an answer begun behind them, which calibration feeds.

    A prompt ends with the tokens `lead`; a row that lacks them is taken for a whole prompt.
    """
    found, size = [], len(lead)
    for ids in given:
        places = range(len(ids), size - 1, -1)
        found.append(ids[: next((end for end in places if ids[end - size : end] == lead), None)])
    return found


def starts(ids: Int[Tensor, "batch length"], mask: Tensor | None) -> Int[Tensor, " batch"]:
    """The place of each row's last prompt token; without a mask, of its first token."""
    if mask is None:
        return torch.zeros(len(ids), dtype=torch.long, device=ids.device)
    places = torch.arange(ids.shape[1], device=ids.device)
    return torch.where(mask.bool(), places, 0).amax(1)
