"""The readout: SFT's adapter in the last blocks, trained on for how an answer begins.

After SFT the state from which the first answer token is read tells toxic prompts from seemingly
toxic ones far better than the first tokens of refusals do (docs/results.md). A contrast between
pairs teaches those tokens, and refusals of toxic prompts how to go on: behind "I" stand answers as
well. What lies below the last blocks stays as it is, so each prompt passes it once, and a step
costs the last blocks alone. No part of the paper.
"""

import logging
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dcr import batching, grouping, models, refusal, statistics
from dcr.config import ConfigError, ReadoutConfig, Schedule, SFTConfig
from dcr.data import NO_CLASS, SEEMINGLY_TOXIC, TOXIC, Chance, Splits
from dcr.models import Policy
from dcr.prompts import IGNORED, ChatFormat
from dcr.sources import Example
from dcr.training.resuming import TrainingError, adamw, rate_factor

log = logging.getLogger(__name__)

GENERAL_ROWS = 2  # instruction rows in a step, to whose answers the model is held
OPENING = 4  # tokens of a refusal: those that tell "I can't help" from "I can help"
# Of their NLL beside the contrast. At 1 "can't" spreads into all answers, which then go in circles.
WORDING = 0.1
ANSWER = 64  # tokens of an answer that may be looked at
ANSWER_PLACES = 24  # of them are, drawn once, and the first always
HELD_OUT_ROWS = 64  # on which drift is measured
WARMUP = 0.05


@dataclass(frozen=True, eq=False)
class Entered:
    """A batch as it enters the last blocks.

    Attributes:
        hidden: what the first of these blocks is given, as it was laid out.
        calls: the further arguments of each of them, in their order.
        read: the positions of the padded batch whose states are read.
        before: the final-normed states there, by the weights of that time.
    """

    hidden: Float[Tensor, "..."]
    calls: tuple[tuple[tuple[Any, ...], dict[str, Any]], ...]
    layout: models.Layout
    read: Bool[Tensor, "batch length"]
    before: Float[Tensor, "places width"]


def entered(
    model: Any,
    count: int,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    read: Bool[Tensor, "batch length"],
    packing: models.Packing,
) -> Entered:
    """A pass without gradient in which what the last `count` blocks are called with is noted.

    `packing` is what `models.packs` says of the backbone. Raises ConfigError where calling the
    blocks again does not give what the model itself computes.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def note(_block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append((args, dict(kwargs)))

    backbone: Any = models.backbone(model)
    layout = models.laid_out(backbone, ids, mask, packing)
    with ExitStack() as stack, torch.no_grad():
        for block in models.decoder_blocks(model)[-count:]:
            stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
        output = layout.padded(models.run(backbone, layout))
    given = [args[0] if args else kwargs.pop("hidden_states") for args, kwargs in calls]
    further = tuple((args[1:], kwargs) for args, kwargs in calls)
    found = Entered(given[0], further, layout, read, output[read])
    with torch.no_grad():
        error = (leaving(model, found) - found.before).abs().max()
    if not error <= 1e-2 * found.before.abs().max():
        kind = type(models.unwrapped(model)).__name__
        raise ConfigError(
            f"sft.readout.blocks={count}: the last blocks of {kind} cannot be run by themselves; "
            "set sft.readout.steps=0"
        )
    return found


def leaving(model: Any, given: Entered) -> Float[Tensor, "places width"]:
    """The final-normed states at the positions that are read, by the weights of now."""
    hidden, blocks = given.hidden, models.decoder_blocks(model)
    with models.running(models.backbone(model), given.layout):
        for block, (args, kwargs) in zip(blocks[-len(given.calls) :], given.calls, strict=True):
            output = block(hidden, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
    hidden, norm = given.layout.padded(hidden)[given.read], models.final_norm(model)
    return hidden if norm is None else norm[1](hidden)


def contrast_loss(
    refusing: Float[Tensor, "prompts"], labels: Int[Tensor, "prompts"]
) -> Float[Tensor, ""]:
    """Logistic loss of refusing toxic prompts and answering the others.

    `refusing` is above 0 where a prompt is refused: log-odds or margin of refusals' first tokens.
    """
    signs = 2.0 * (labels == TOXIC) - 1.0
    return F.softplus(-signs * refusing).mean()


def drift(
    before: Float[Tensor, "places vocabulary"], now: Float[Tensor, "places vocabulary"]
) -> Float[Tensor, "places"]:
    """KL(before ‖ now) of the next token at each place, in nats, from logits."""
    old, new = before.log_softmax(-1), now.log_softmax(-1)
    return (old.exp() * (old - new)).sum(-1)


@dataclass(frozen=True)
class Row:
    """Token ids, the positions that are read, and of a prompt its class.

    `opening` has the tokens that a refusal goes on with behind all positions but the first.
    """

    ids: list[int]
    places: list[int]
    label: int = NO_CLASS
    opening: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows as they enter the last blocks, with their classes.

    Attributes:
        first: which of the positions that are read are the first of their row.
        opening: the tokens of refusals behind the others, where rows are prompts.
    """

    entered: Entered
    labels: Int[Tensor, "rows"]
    first: Bool[Tensor, "places"]
    opening: Int[Tensor, "tokens"]


def pair_losses(
    model: Any, batch: Batch, openings: Int[Tensor, "tokens"], greedy: float = 0.0
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """The contrast at the first answer token; and with it the NLL of how refusals go on.

    `openings` are the first tokens of refusals. The contrast is that of their mass, which ranks
    prompts, and as `greedy` weighs it of their margin, by which greedy decoding decides.
    """
    logits = models.logits(model, leaving(model, batch.entered))
    first = logits[batch.first]
    contrast = contrast_loss(refusal.refusal_log_odds(first, openings), batch.labels)
    if greedy:
        decided = contrast_loss(refusal.refusal_margin(first, openings), batch.labels)
        contrast = contrast + greedy * decided
    if not len(batch.opening):
        return contrast, contrast
    wording = F.cross_entropy(logits[~batch.first].float(), batch.opening)
    return contrast, contrast + WORDING * wording


def read_out(
    policy: Policy, chat: ChatFormat, rows: Splits, config: SFTConfig, seed: int
) -> dict[str, Any]:
    """Train on, in place, what trains in the last blocks; returns the record of what came of it.

    Each step takes `batch_size` prompts and the answers of a few instruction rows, at whose tokens
    the model is held to what it predicted before. Everything follows from the weights, the rows
    and `seed`. Raises ConfigError for a model whose last blocks cannot be run by themselves, and
    TrainingError for a loss that is not finite.
    """
    phase, chance = config.readout, Chance(seed, config.readout.steps)
    learnt = _alternating(
        prompt_rows(chat, rows.readout_toxic, TOXIC),
        prompt_rows(chat, rows.readout_seemingly_toxic, SEEMINGLY_TOXIC),
        chance,
    )
    watched = prompt_rows(chat, rows.readout_toxic_heldout, TOXIC)
    watched += prompt_rows(chat, rows.readout_seemingly_toxic_heldout, SEEMINGLY_TOXIC)
    size = phase.batch_size
    with models.evaluating(policy.model):
        pairs = _batches(policy, phase, _parted(learnt, size))
        general = _general(policy, chat, rows, config, len(pairs), chance)
        heldout = _batches(policy, phase, _parted(_by_length(watched), size))
        answers = _answers(chat, rows.normal_heldout, HELD_OUT_ROWS, config.max_len, chance)
        ordinary = _batches(policy, phase, _parted(_by_length(answers), GENERAL_ROWS))
        openings = refusal.refusal_openings(chat)
        before = _discernment(policy, heldout, openings, seed)
        losses = _fit(policy, pairs, general, openings, phase, chance)
        moved, first = _moved(policy, ordinary)
        after = _discernment(policy, heldout, openings, seed)
    quarter = max(1, phase.steps // 4)
    record = {
        "steps": phase.steps,
        "loss": {  # means of the first and of the last quarter of the steps
            "first": sum(losses[:quarter]) / quarter,
            "last": sum(losses[-quarter:]) / quarter,
        },
        "heldout_auroc": {"before": before, "after": after, "prompts": len(watched)},
        "drift": {"answer_tokens": moved, "first_token": first},
    }
    log.info("readout: %s", record)
    return record


def _fit(
    policy: Policy,
    pairs: Sequence[Batch],
    general: Sequence[Batch],
    openings: Tensor,
    phase: ReadoutConfig,
    chance: Chance,
) -> list[float]:
    """The contrast loss of every step."""
    model, blocks = policy.model, models.decoder_blocks(policy.model)[-phase.blocks :]
    factor = rate_factor(Schedule.linear, phase.steps, round(WARMUP * phase.steps))
    tools = adamw(blocks, phase.lr, phase.weight_decay, factor)
    optimizer, rate = tools["optimizer"], tools["lr_scheduler"]["scheduler"]
    found: list[float] = []
    while len(found) < phase.steps:
        order = chance.permutation(len(pairs))
        for place in order[: phase.steps - len(found)]:
            contrast, loss = pair_losses(model, pairs[place], openings, phase.greedy)
            if general:
                loss = loss + phase.drift * _drifted(model, general[place % len(general)]).mean()
            if not torch.isfinite(loss):
                raise TrainingError(
                    f"readout: loss is {loss.item()} at step {len(found)}: lower sft.readout.lr"
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            found.append(contrast.item())
    return found


# --- rows at the door of the last blocks --------------------------------------------------------


def prompt_rows(chat: ChatFormat, rows: Sequence[Example], label: int) -> list[Row]:
    """Prompts, read where the first answer token is; toxic ones with how their refusal goes on."""
    found: list[Row] = []
    for row in rows:
        ids, opening = chat.prompt_ids(row.prompt), list[int]()
        if label == TOXIC and row.response and refusal.is_refusal(row.response):
            whole, _ = chat.pair(row.prompt, row.response, len(ids) + OPENING)
            opening = whole[len(ids) :]
        places = range(len(ids) - 1, len(ids) + max(1, len(opening)) - 1)
        found.append(Row([*ids, *opening[:-1]], list(places), label, tuple(opening[1:])))
    return found


def _general(
    policy: Policy, chat: ChatFormat, rows: Splits, config: SFTConfig, steps: int, chance: Chance
) -> list[Batch]:
    """What the model is held to in each of as many steps: answers of instruction rows, how a
    refusal goes on once it has begun, and a harmless prompt's answer behind its first token.
    """
    harmless = [row for row in rows.readout_seemingly_toxic if row.response]
    kinds = [
        _answers(chat, part, GENERAL_ROWS * steps, config.max_len, chance, skipped)
        for part, skipped in ((rows.normal, 0), (rows.refusals, OPENING), (harmless, 1))
    ]
    kinds[0] = _by_length(kinds[0])
    several = [GENERAL_ROWS, 1, 1]
    chosen = [
        [
            kind[(step * count + place) % len(kind)]
            for kind, count in zip(kinds, several, strict=True)
            for place in range(count if kind else 0)
        ]
        for step in range(steps)
    ]
    return _batches(policy, config.readout, chosen) if any(kinds) else []


def _answers(
    chat: ChatFormat,
    rows: Sequence[Example],
    count: int,
    max_len: int,
    chance: Chance,
    skipped: int = 0,
) -> list[Row]:
    """The first rows, read at the first answer token that is not `skipped` and some behind it."""
    found: list[Row] = []
    for row in rows[:count]:
        ids, targets = chat.pair(row.prompt, row.response or "", max_len)
        answer = [place for place, target in enumerate(targets) if target != IGNORED]
        places = answer[skipped : skipped + ANSWER]
        drawn = chance.permutation(len(places))[:ANSWER_PLACES]
        if places:
            chosen = sorted({0, *drawn})
            found.append(Row(ids[: places[-1] + 1], [places[i] for i in chosen]))
    return found


def _alternating(toxic: Sequence[Row], safe: Sequence[Row], chance: Chance) -> list[Row]:
    """As many of both kinds in turn, each in a drawn order, the fewer of them more than once.

    In batches of one kind, or of one length, nearly nothing is learnt in as many steps.
    """
    count = max(len(toxic), len(safe))
    drawn = []
    for rows in (toxic, safe):
        rounds = math.ceil(count / len(rows))
        order = [place for _ in range(rounds) for place in chance.permutation(len(rows))]
        drawn.append([rows[place] for place in order[:count]])
    return [row for both in zip(*drawn, strict=True) for row in both]


def _by_length(rows: Sequence[Row]) -> list[Row]:
    return [rows[place] for place in grouping.by_length([row.ids for row in rows])]


def _parted(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _batches(policy: Policy, phase: ReadoutConfig, parts: Sequence[Sequence[Row]]) -> list[Batch]:
    """Rows that are together in a batch, as they enter the last blocks."""
    device, found = models.head(policy.model).weight.device, []
    packing = models.packs(models.backbone(policy.model), device)
    for part in parts:
        mask = batching.attention_mask([row.ids for row in part])
        read = torch.zeros_like(mask)
        for inside, row in zip(read, part, strict=True):
            inside[row.places] = True
        ids = batching.padded([row.ids for row in part], 0)
        ids, mask, read = (tensor.to(device) for tensor in (ids, mask, read))
        given = entered(policy.model, phase.blocks, ids, mask, read, packing)
        first = torch.tensor([place == row.places[0] for row in part for place in row.places])
        labels = torch.tensor([row.label for row in part])
        opening = torch.tensor([token for row in part for token in row.opening], dtype=torch.long)
        found.append(Batch(given, labels.to(device), first.to(device), opening.to(device)))
    return found


# --- what is measured ---------------------------------------------------------------------------


def _drifted(model: Any, answers: Batch) -> Float[Tensor, "places"]:
    with torch.no_grad():
        before = models.logits(model, answers.entered.before)
    return drift(before, models.logits(model, leaving(model, answers.entered)))


def _moved(policy: Policy, ordinary: Sequence[Batch]) -> tuple[float | None, float | None]:
    """Mean drift over all answer positions that are looked at, and over the first of each row."""
    everywhere: list[float] = []
    first: list[float] = []
    with torch.no_grad():
        for answers in ordinary:
            rows = _drifted(policy.model, answers).split(answers.entered.read.sum(1).tolist())
            everywhere += [value for row in rows for value in row.tolist()]
            first += [row[0].item() for row in rows]
    if not first:
        return None, None
    return sum(everywhere) / len(everywhere), sum(first) / len(first)


def _discernment(
    policy: Policy, heldout: Sequence[Batch], openings: Tensor, seed: int
) -> tuple[float, ...] | None:
    """AUROC of refusing toxic prompts before the others, its interval; None without both kinds."""
    found: dict[int, list[float]] = {TOXIC: [], SEEMINGLY_TOXIC: []}
    with torch.no_grad():
        for batch in heldout:
            states = leaving(policy.model, batch.entered)[batch.first]
            scores = refusal.refusal_log_odds(models.logits(policy.model, states), openings)
            for score, label in zip(scores.tolist(), batch.labels.tolist(), strict=True):
                found[label].append(score)
    if not all(found.values()):
        return None
    return astuple(statistics.auroc_interval(found[TOXIC], found[SEEMINGLY_TOXIC], seed=seed))
