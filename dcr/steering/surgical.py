"""Directions ablated from the stream: Surgical, and plain ablation to compare with.

Surgical (Wang et al., ICLR 2025) ablates the seemingly toxic direction, which a false refusal
follows, and adds the toxic one. Directions come from every block and template position
(`directions`); validation prompts choose among them (`select_ablation`, `select_addition`) by how
strongly the model is about to refuse (`refusal_scores`). Departures from the released code: scores
and divergences are computed from log-probabilities without its 1e-8 and 1e-6, and the ablated share
of a direction is a setting for both.

Plain ablation removes the refusal direction (Arditi et al., NeurIPS 2024): the difference of means
of toxic and normal prompts at their last token. The authors select layer and position on a
validation set; here one relative depth serves all models.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from dcr.activations import Site
from dcr.core.config import ConfigError
from dcr.core.models import Policy, structure
from dcr.core.prompts import ChatFormat
from dcr.core.refusal import opening
from dcr.core.refusal.opening import PhraseError, checked, continuations, ending
from dcr.steering import SteeringConfig, SurgicalConfig, vectors
from dcr.steering.edits import Edit, Edits, edited
from dcr.steering.prompts import KINDS, Extraction
from dcr.steering.vectors import Vectors

log = logging.getLogger(__name__)

Tokens = list[int]

FEWEST = 8  # prompts of a kind: with fewer, the mean says more about them than about the kind
# A difference shorter than this share of its two vectors is their rounding.
ROUNDING = 1e-6
# The released config's λ: 1 removes the whole component along the toxic direction.
ORTHOGONALISED = 1.0
CANDIDATES_BELOW = 0.8  # of the depth, as released: the last blocks give no candidate
RELATIVE_DEPTH = 0.6  # the authors select layers between 0.3 and 0.65 of the depth, by model
SITES = (Site.block_input, Site.attention_output, Site.mlp_output)

# From a candidate and its block to (KL on normal prompts, mean refusal score).
Trial = Callable[[Tensor, int], tuple[float, float]]


@dataclass(frozen=True)
class Validation:
    """Validation prompts; `clean` are the unedited model's log-probabilities on the normal ones."""

    model: Any
    normal: Sequence[Tokens]
    seemingly_toxic: Sequence[Tokens]
    clean: Float[Tensor, "prompts vocabulary"]
    refusals: Int[Tensor, " refusals"]


@dataclass(frozen=True)
class Selected:
    """The chosen candidate: the position `place` and the input of `block` (from 1)."""

    place: int
    block: int
    score: float
    kl: float
    candidates: int
    survivors: int

    def record(self, names: Sequence[str]) -> dict[str, Any]:
        """The choice as JSON; `position` counts from the prompt's end (-1: last token)."""
        chosen = asdict(self)
        place = chosen.pop("place")
        return chosen | {"position": place - len(names), "token": names[place]}


def find(
    policy: Policy, chat: ChatFormat, extraction: Extraction, settings: SteeringConfig
) -> Vectors:
    """Tensors `ablated` (w', of length 1) and `added` (r, as it was measured), both [width].

    The first `train` prompts of each kind give the means, and the next `validation` choose among
    the candidates of either vector: (template tokens behind the instruction) × ⌊0.8·depth⌋. This
    takes two passes over the former, and for each candidate up to three over the latter.

    Raises ConfigError if fewer than FEWEST training prompts of a kind pass the filter, if no
    candidate survives, if the template has no token behind the instruction, or if the words for
    refusals cannot follow it.
    """
    options, model = settings.surgical, policy.model
    depth = len(structure.decoder_blocks(model))
    blocks = int(CANDIDATES_BELOW * depth)  # the first ones, which give candidates
    if blocks < 2:  # before the first block no token has seen another
        raise ConfigError(
            f"model.name: leaves {blocks} of {depth} blocks to take vectors from, which lie below "
            f"{CANDIDATES_BELOW} of the depth and behind the first; Surgical needs 3 blocks or more"
        )
    refusals = openings(chat, options.refusal_tokens).to(model.device)
    train, held = _split(chat, extraction, options)
    template = tail(chat, [ids for part in (train, held) for rows in part.values() for ids in rows])
    used = _filtered(model, train, refusals, options)
    toxic, seemingly_toxic = directions(model, used, len(template), blocks)
    pure = orthogonalised(seemingly_toxic, toxic, ORTHOGONALISED)
    clean = {kind: last_log_p(model, rows) for kind, rows in held.items()}
    bench = Validation(model, held["normal"], held["seemingly_toxic"], clean["normal"], refusals)
    log.info(
        "surgical: %d positions × %d blocks are tried, for either vector on %d prompts or fewer",
        *(len(template), blocks, sum(map(len, held.values()))),
    )
    ablated = select_ablation(bench, pure, options.ablation_kl)
    added = select_addition(bench, toxic, options.addition_kl)
    tensors = {
        "ablated": pure[ablated.place, ablated.block - 1],
        "added": toxic[added.place, added.block - 1],
    }
    names = [str(chat.tokenizer.convert_ids_to_tokens(token)) for token in template]
    before = {kind: refusal_scores(rows, refusals).mean().item() for kind, rows in clean.items()}
    return tensors, {
        "kept": {kind: [len(used[kind]), len(train[kind])] for kind in KINDS},
        "ablated": ablated.record(names) | {"clean_score": before["seemingly_toxic"]},
        "added": added.record(names) | {"clean_score": before["normal"]},
    }


def edits(policy: Policy, _chat: ChatFormat, made: Vectors, settings: SteeringConfig) -> Edits:
    """Edits x ← x − s·b·(x·w')w' at three sites of every block, then x ← x + s·a·r at r's block.

    s is the strength, a `add`, b `ablate`; the edits act at all positions of prompt and answer. If
    s·b < 1, removal compounds over sites and depth: the rest is not the share 1 − s·b.
    """
    tensors, info = made
    options, depth = settings.surgical, len(structure.decoder_blocks(policy.model))
    added = Edit(
        Site.block_input,
        info["added"]["block"],
        add=tensors["added"],
        scale=settings.strength * options.add,
    )
    return [*everywhere(depth, tensors["ablated"], settings.strength * options.ablate), added]


def _split(
    chat: ChatFormat, extraction: Extraction, options: SurgicalConfig
) -> tuple[dict[str, list[Tokens]], dict[str, list[Tokens]]]:
    """Training and validation prompts of each kind, ordered by length so that little is padded."""
    train, held = {}, {}
    for kind in KINDS:
        rows = vectors.encoded(
            chat, getattr(extraction, kind)[: options.train + options.validation]
        )
        train[kind] = sorted(rows[: options.train], key=len)
        if kind != "toxic":  # no choice depends on these
            held[kind] = sorted(rows[options.train :], key=len)
    empty = [kind for kind, rows in held.items() if not rows]
    if empty:
        raise ConfigError(
            f"steering.surgical.train={options.train}: no {' and no '.join(empty)} prompt is left "
            "to choose vectors on; lower it"
        )
    return train, held


def _filtered(
    model: nn.Module,
    train: Mapping[str, Sequence[Tokens]],
    refusals: Int[Tensor, " refusals"],
    options: SurgicalConfig,
) -> dict[str, list[Tokens]]:
    """Prompts that the model is about to refuse, and normal ones that it is not."""
    used: dict[str, list[Tokens]] = {}
    for kind, rows in train.items():
        sign = -1 if kind == "normal" else 1
        scores = sign * refusal_scores(last_log_p(model, rows), refusals)
        used[kind] = [ids for ids, score in zip(rows, scores.tolist(), strict=True) if score > 0]
    if min(map(len, used.values())) < FEWEST:
        counts = ", ".join(f"{len(used[kind])} of {len(train[kind])} {kind}" for kind in KINDS)
        raise ConfigError(
            f"steering.surgical.train={options.train}: {counts} prompts are left where the model "
            f"refuses the first two kinds and answers the third, of each {FEWEST} are needed; "
            "raise it, give the words that this model's refusals begin with in "
            f"steering.surgical.refusal_tokens (now {', '.join(options.refusal_tokens)}), or take "
            "a model that refuses more"
        )
    return used


# --- directions that are tried --------------------------------------------------------------------


def tail(chat: ChatFormat, sequences: Sequence[Tokens]) -> Tokens:
    """The template's tokens behind the instruction that every one of `sequences` ends with.

    The assistant's header is among them. Some tokenizers join the end of an instruction with the
    beginning of the text behind it. Raises ConfigError if there is no such token.
    """
    behind = vectors.tokens_after_prompt(chat)
    shared = len(behind)
    while any(ids[len(ids) - shared :] != behind[len(behind) - shared :] for ids in sequences):
        shared -= 1
    if shared == 0:
        raise ConfigError(
            "model.template: no token of the chat template stands behind the instruction, where "
            "Surgical takes its vectors; give chatml, llama3 or a .jinja file with one"
        )
    return behind[len(behind) - shared :]


def directions(
    model: Any, prompts: Mapping[str, Sequence[Tokens]], positions: int, blocks: int
) -> tuple[Float[Tensor, "positions blocks width"], Float[Tensor, "positions blocks width"]]:
    """r = toxic − normal and w = seemingly toxic − normal, as differences of mean block inputs.

    The means are over the last `positions` tokens of each prompt and the first `blocks` blocks, in
    fp32 on the CPU (summed in fp64). Kinds that do not differ, as at the first block's input, give
    NaN.
    """
    means = {}
    for kind, rows in prompts.items():
        offsets = [list(range(-positions, 0))] * len(rows)
        states = vectors.read_states(model, rows, offsets, Site.block_input, blocks)
        means[kind] = states.cpu().mean(1, dtype=torch.float64).transpose(0, 1)
    toxic, seemingly_toxic = (
        _or_nan(means[kind] - means["normal"], means["normal"]).float()
        for kind in ("toxic", "seemingly_toxic")
    )
    return toxic, seemingly_toxic


def orthogonalised(
    seemingly_toxic: Float[Tensor, "positions blocks width"],
    toxic: Float[Tensor, "positions blocks width"],
    share: float,
) -> Float[Tensor, "positions blocks width"]:
    """w' = w − λ(w·r / r·r)r of each place, scaled to length 1; NaN if only rounding is left."""
    w, r = seemingly_toxic.double(), toxic.double()
    along = (w * r).sum(-1, keepdim=True) / (r * r).sum(-1, keepdim=True)
    rest = _or_nan(w - share * along * r, w)
    return (rest / rest.norm(dim=-1, keepdim=True)).float()


def _or_nan(
    difference: Float[Tensor, "*places width"], term: Float[Tensor, "*places width"]
) -> Float[Tensor, "*places width"]:
    length = difference.norm(dim=-1, keepdim=True)
    real = length > ROUNDING * term.norm(dim=-1, keepdim=True)
    return torch.where(real, difference, torch.nan)


# --- how strongly a model is about to refuse ------------------------------------------------------


def openings(chat: ChatFormat, words: Sequence[str]) -> Int[Tensor, " refusals"]:
    """The distinct first tokens of `words` at the beginning of an answer, ascending.

    A word that the tokenizer splits counts by its first part. Raises ConfigError for no word or an
    empty one, and if the template's own tokens change once a word follows.
    """
    end = ending(chat.tokenizer, chat.prompt_ids("x"))
    try:
        tokens = continuations(chat.tokenizer, end, checked(words))
    except PhraseError as error:
        raise ConfigError(f"steering.surgical.refusal_tokens: {error}") from error
    return torch.tensor(sorted({ids[0] for ids in tokens}))


def last_log_p(
    model: Any, sequences: Sequence[Sequence[int]]
) -> Float[Tensor, "prompts vocabulary"]:
    """Log-probabilities (in fp32 or wider) of the token that follows each sequence."""
    found = list(opening.first_logits(model, sequences))
    order = torch.tensor([place for places, _ in found for place in places]).argsort()
    logits = torch.cat([of_batch for _, of_batch in found])[order]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def refusal_scores(
    log_p: Float[Tensor, "prompts vocabulary"], refusals: Int[Tensor, " refusals"]
) -> Float[Tensor, " prompts"]:
    """log p_R − log(1 − p_R), p_R the probability of all refusal tokens.

    Both are sums of exponentials, so neither underflows and nothing is subtracted from 1.
    """
    chosen = torch.zeros(log_p.shape[-1], dtype=torch.bool, device=log_p.device)
    chosen[refusals] = True
    return log_p[:, chosen].logsumexp(-1) - log_p[:, ~chosen].logsumexp(-1)


def divergence(
    clean: Float[Tensor, "prompts vocabulary"], edited: Float[Tensor, "prompts vocabulary"]
) -> Float[Tensor, " prompts"]:
    """KL(clean ‖ edited) in nats of log-probabilities."""
    return (clean.exp() * (clean - edited)).sum(-1)


# --- the best that leaves normal prompts alone ----------------------------------------------------


def everywhere(depth: int, direction: Float[Tensor, " width"], share: float) -> list[Edit]:
    """x ← x − share·(x·w)w at block inputs, attention and MLP outputs of all blocks."""
    return [
        Edit(site, block, ablate=direction, scale=share)
        for block in range(1, depth + 1)
        for site in SITES
    ]


def select_ablation(
    held: Validation, candidates: Float[Tensor, "positions blocks width"], bound: float
) -> Selected:
    """The candidate of the lowest mean refusal score on seemingly toxic prompts when ablated.

    Only candidates count whose ablation moves the answer to normal prompts by at most `bound` (KL).
    """
    depth = len(structure.decoder_blocks(held.model))

    def ablation(direction: Tensor, _block: int) -> tuple[float, float]:
        edits = everywhere(depth, direction, 1.0)
        with edited(held.model, edits):
            normal = last_log_p(held.model, held.normal)
            kl = divergence(held.clean, normal).mean().item()
            if not kl <= bound:  # one pass is saved
                return kl, math.nan
            seeming = last_log_p(held.model, held.seemingly_toxic)
        return kl, refusal_scores(seeming, held.refusals).mean().item()

    return _select("ablation", candidates, ablation, bound, 1)


def select_addition(
    held: Validation, candidates: Float[Tensor, "positions blocks width"], bound: float
) -> Selected:
    """The candidate of the highest mean refusal score on normal prompts when added at its block.

    Only candidates count whose addition moves the answer to these prompts by at most `bound` (KL).
    The released code compares them at a coefficient of 0, which makes all equal and keeps the
    first.
    """

    def addition(direction: Tensor, block: int) -> tuple[float, float]:
        edit = Edit(Site.block_input, block, add=direction)
        with edited(held.model, [edit]):
            moved = last_log_p(held.model, held.normal)
        kl = divergence(held.clean, moved).mean().item()
        return kl, refusal_scores(moved, held.refusals).mean().item()

    return _select("addition", candidates, addition, bound, -1)


def _select(
    name: str,
    candidates: Float[Tensor, "positions blocks width"],
    trial: Trial,
    bound: float,
    sign: int,
) -> Selected:
    """The survivor with the lowest sign·score; a tie goes to the first position and block.

    Raises ConfigError if none survives.
    """
    real = (~candidates.isnan().any(-1)).nonzero().tolist()
    tried = []
    for place, index in tqdm(real, unit="candidate", desc=f"surgical {name}", disable=None):
        kl, score = trial(candidates[place, index], index + 1)
        tried.append((place, index + 1, kl, score))
    alive = [entry for entry in tried if entry[2] <= bound and not math.isnan(entry[3])]
    if not alive:
        raise ConfigError(_no_survivor(name, [entry[2] for entry in tried], bound))
    place, block, kl, score = min(alive, key=lambda entry: sign * entry[3])
    return Selected(place, block, score, kl, candidates[..., 0].numel(), len(alive))


def _no_survivor(name: str, tried: Sequence[float], bound: float) -> str:
    if not tried:
        return (
            "data.extraction: toxic, seemingly toxic and normal prompts leave no direction to "
            f"choose for {name}; name other sources"
        )
    measured = [kl for kl in tried if not math.isnan(kl)]
    if not measured:
        return f"precision: the model's logits are NaN under each {name}; give precision=fp32"
    return (
        f"steering.surgical.{name}_kl={bound}: each of {len(tried)} candidates moves the answers "
        f"to normal prompts farther, the nearest by {min(measured):.3g} nats; raise it"
    )


# --- plain ablation -------------------------------------------------------------------------------


def find_ablation(
    policy: Policy, chat: ChatFormat, extraction: Extraction, _settings: SteeringConfig
) -> Vectors:
    """The tensor `vector` [width], of length 1."""
    depth = len(structure.decoder_blocks(policy.model))
    block = max(1, round(RELATIVE_DEPTH * depth))
    means = []
    for rows in (extraction.toxic, extraction.normal):
        prompts, last = vectors.encoded(chat, rows), [[-1]] * len(rows)
        states = vectors.read_states(policy.model, prompts, last, Site.block_input, block)
        means.append(states[-1, :, 0].mean(0))
    vector = vectors.unit(means[0] - means[1], "toxic and normal prompts")
    return {"vector": vector}, {"block": block}


def ablation_edits(
    policy: Policy, _chat: ChatFormat, made: Vectors, settings: SteeringConfig
) -> Edits:
    """Edits x ← x − strength·(x·v)v at three sites of every block and at all positions."""
    depth = len(structure.decoder_blocks(policy.model))
    return everywhere(depth, made[0]["vector"], settings.strength)
