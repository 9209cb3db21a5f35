"""The readout: SFT's adapter in the last blocks, trained on for how an answer begins.

After SFT the state from which the first answer token is read tells toxic prompts from seemingly
toxic ones far better than the first tokens of refusals do (docs/results.md). A contrast between
pairs teaches those tokens, and refusals of toxic prompts how to go on: behind "I" stand answers as
well. What lies below the last blocks stays as it is, so each prompt passes it once, and a step
costs the last blocks alone. No part of the paper.
"""

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch.nn import functional as F

from dcr.core import batching, models, passes, refusal, statistics
from dcr.core.config import ConfigError, ReadoutConfig, Schedule, SFTConfig
from dcr.core.data import SEEMINGLY_TOXIC, TOXIC, Splits, readout_rows
from dcr.core.data.readout import Row
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.training import callbacks
from dcr.core.training.resuming import TrainingError, adamw, rate_factor

log = logging.getLogger(__name__)

# Of their NLL beside the contrast. At 1 "can't" spreads into all answers, which then go in circles.
WORDING = 0.1
WARMUP = 0.05


@dataclass(frozen=True, eq=False)
class Entered:
    """A batch as it enters the last blocks.

    Attributes:
        rest: these blocks' states, before the final norm, by the weights of the time it is called.
        read: the positions of the padded batch whose states are read.
        before: the final-normed states there, by the weights of that time.
    """

    rest: passes.Rest
    read: Bool[Tensor, "batch length"]
    before: Float[Tensor, "places width"]


def entered(
    model: Any,
    count: int,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    read: Bool[Tensor, "batch length"],
) -> Entered:
    """A pass without gradient, after which the last `count` blocks can be run by themselves.

    Raises ConfigError where that does not give what the model itself computes.
    """
    states, rest = passes.current().halved(model, count, ids, mask)
    found = Entered(rest, read, states[read])
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
    hidden, norm = given.rest()[given.read], models.final_norm(model)
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
    policy: Policy,
    chat: ChatFormat,
    rows: Splits,
    config: SFTConfig,
    seed: int,
    loggers: Sequence[Logger] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Train on, in place, what trains in the last blocks; returns the record of what came of it.

    Each step takes `batch_size` prompts and the answers of a few instruction rows, at whose tokens
    the model is held to what it predicted before. Everything follows from the weights, the rows
    and `seed`. `loggers` are told the losses of every step, and `progress` shows bars. Raises
    ConfigError for a model whose last blocks cannot be run by themselves, and TrainingError for a
    loss that is not finite.
    """
    phase, drawn = config.readout, readout_rows(chat, rows, config, seed)
    used = sorted(set(drawn.steps))
    pairs = [drawn.pairs[place] for place in used]
    general = [drawn.general[place] for place in used] if drawn.general else []
    asked = [*pairs, *general, *drawn.watched, *drawn.ordinary]
    log.info(
        "readout: %d steps of %d prompts; they take %d of %d batches, each prepared once",
        *(phase.steps, phase.batch_size, len(used), len(drawn.pairs)),
    )
    with models.evaluating(policy.model):
        with callbacks.bar("readout, preparing", len(asked), "batch", shown=progress) as bar:
            made = _batches(policy, phase, bar, asked)
        ordinary = made[len(asked) - len(drawn.ordinary) :]
        watched = made[len(pairs) + len(general) :][: len(drawn.watched)]
        openings = refusal.refusal_openings(chat)
        before = _discernment(policy, watched, openings, seed)
        prepared = Prepared(
            drawn.steps,
            dict(zip(used, made[: len(pairs)], strict=True)),
            dict(zip(used, made[len(pairs) :][: len(general)], strict=False)),
        )
        with callbacks.bar("readout", phase.steps, shown=progress) as bar:
            losses = _fit(policy, prepared, openings, phase, loggers, bar)
        moved, first = _moved(policy, ordinary)
        after = _discernment(policy, watched, openings, seed)
    quarter = max(1, phase.steps // 4)
    record = {
        "steps": phase.steps,
        "loss": {  # means of the first and of the last quarter of the steps
            "first": sum(losses[:quarter]) / quarter,
            "last": sum(losses[-quarter:]) / quarter,
        },
        "heldout_auroc": {
            "before": before,
            "after": after,
            "prompts": sum(len(part) for part in drawn.watched),
        },
        "drift": {"answer_tokens": moved, "first_token": first},
    }
    log.info("readout: %s", record)
    return record


@dataclass(frozen=True, eq=False)
class Prepared:
    """Of each step the place of its batches, and these by their places."""

    steps: Sequence[int]
    pairs: dict[int, Batch]
    general: dict[int, Batch]


def _fit(
    policy: Policy,
    prepared: Prepared,
    openings: Tensor,
    phase: ReadoutConfig,
    loggers: Sequence[Logger],
    bar: Any,
) -> list[float]:
    """The contrast loss of every step."""
    model, blocks = policy.model, models.decoder_blocks(policy.model)[-phase.blocks :]
    factor = rate_factor(Schedule.linear, phase.steps, round(WARMUP * phase.steps))
    tools = adamw(blocks, phase.lr, phase.weight_decay, factor)
    optimizer, rate = tools["optimizer"], tools["lr_scheduler"]["scheduler"]
    found: list[float] = []
    for step, place in enumerate(prepared.steps):
        contrast, loss = pair_losses(model, prepared.pairs[place], openings, phase.greedy)
        told = {"readout/contrast": contrast.item()}
        if prepared.general:
            moved = _drifted(model, prepared.general[place]).mean()
            loss = loss + phase.drift * moved
            told["readout/drift"] = moved.item()
        if not torch.isfinite(loss):
            raise TrainingError(
                f"readout: loss is {loss.item()} at step {step}: lower sft.readout.lr"
            )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        found.append(contrast.item())
        for logger in loggers:
            logger.log_metrics(told, step)
        bar.set_postfix_str(f"loss {found[-1]:.3f}", refresh=False)
        bar.update()
    return found


# --- rows at the door of the last blocks --------------------------------------------------------


def _batches(
    policy: Policy, phase: ReadoutConfig, bar: Any, parts: Sequence[Sequence[Row]]
) -> list[Batch]:
    """Rows that are together in a batch, as they enter the last blocks."""
    device, found = models.head(policy.model).weight.device, []
    for part in parts:
        mask = batching.attention_mask([row.ids for row in part])
        read = torch.zeros_like(mask)
        for inside, row in zip(read, part, strict=True):
            inside[row.places] = True
        ids = batching.padded([row.ids for row in part], 0)
        ids, mask, read = (tensor.to(device) for tensor in (ids, mask, read))
        given = entered(policy.model, phase.blocks, ids, mask, read)
        first = torch.tensor([place == row.places[0] for row in part for place in row.places])
        labels = torch.tensor([row.label for row in part])
        opening = torch.tensor([token for row in part for token in row.opening], dtype=torch.long)
        found.append(Batch(given, labels.to(device), first.to(device), opening.to(device)))
        bar.update()
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
