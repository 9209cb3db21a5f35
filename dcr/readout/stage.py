"""Stage three, the readout: SFT's adapter in the last blocks learns on how an answer begins.

After SFT the state from which the first answer token is read tells toxic prompts from seemingly
toxic ones far better than the first tokens of refusals do (docs/results.md). A contrast between
pairs teaches those tokens, and refusals of toxic prompts how to go on: behind "I" stand answers as
well. What lies below the last blocks stays as it is, so each prompt passes it once, and a step
costs the last blocks alone.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from dcr.activations import head_logits
from dcr.core import runs, statistics, storage, training
from dcr.core.config import ConfigError, Precision, Stage
from dcr.core.config.training import ReadoutConfig, Schedule
from dcr.core.data.rows import NO_CLASS, SEEMINGLY_TOXIC, TOXIC, Batch
from dcr.core.machine import attention_mask, padded
from dcr.core.models import Policy, folders, structure
from dcr.core.models.training import save_adapter
from dcr.core.refusal import opening as refusal
from dcr.core.training import Feed, Job, SafetyData, callbacks
from dcr.core.training.resuming import ResumableModule, adamw, rate_factor
from dcr.readout import WARMUP, halving
from dcr.readout.rows import ReadoutPass, ReadoutRows

log = logging.getLogger(__name__)

# Weight of how refusals go on. At 1 "can't" spreads into all answers, which then go in circles.
WORDING = 0.1

Scores = dict[int, list[float]]  # log-odds of refusing held-out prompts, by class


def train(job: Job) -> None:
    """Stage three: from the adapter in `sft/` to `readout/`, on the same base."""
    settings, run = job.settings, job.run
    before, phase = run.stage("sft"), settings.sft.readout
    trusted = settings.model.trust_remote_code
    policy = folders.open_adapter(before, settings.sft.precision, trust_remote_code=trusted)
    chat = training.chat_of_answers(job, policy)
    feed = Feed(ReadoutRows(job.rows, chat, settings), _of_step, readout_batch)
    batches = training.batches_of(job, Stage.readout, policy, chat, feed)
    openings = refusal.refusal_openings(chat)
    module = ReadoutModule(policy, phase, openings, settings.trainer.progress)

    def save(_: dict[str, Tensor]) -> None:
        record = module.record(batches, runs.read_metrics(run), settings.seed)
        storage.write_json(run.readout_file, record)
        save_adapter(policy, run.stage("readout"), folders.adapter_base(before))
        log.info("readout: %s", summary(record))

    training.fit(job, Stage.readout, module, policy, chat, batches, save)


# --- batches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadoutBatch(Batch):
    """Right-padded rows of the readout, prompts or answers, and the positions that are read.

    Attributes:
        first: which of the positions that are read are the first of their row.
        opening: the tokens of refusals behind the others, where rows are prompts.
        number: by which the batch is known among all of the stage.
    """

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]
    read: Bool[Tensor, "batch length"]
    labels: Int[Tensor, "batch"]
    first: Bool[Tensor, "places"]
    opening: Int[Tensor, "tokens"]
    names: tuple[str, ...]
    number: int


def readout_batch(given: ReadoutPass, pad: int) -> ReadoutBatch:
    """A pass of the readout as one batch."""
    number, rows = given
    mask = attention_mask([row.ids for row in rows])
    read = torch.zeros_like(mask)
    for inside, row in zip(read, rows, strict=True):
        inside[row.places] = True
    return ReadoutBatch(
        padded([row.ids for row in rows], pad),
        mask,
        read,
        torch.tensor([row.label for row in rows]),
        torch.tensor([place == row.places[0] for row in rows for place in row.places]),
        torch.tensor([token for row in rows for token in row.opening], dtype=torch.long),
        tuple(row.id for row in rows),
        number,
    )


def _of_step(rows: ReadoutRows, drawn: Sequence[Sequence[ReadoutPass]]) -> list[ReadoutBatch]:
    """Prompts, and answers where there are any, whole on every rank."""
    return [readout_batch(each, rows.pad) for passes in drawn for each in passes]


# --- the last blocks by themselves ----------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class HalfPass:
    """A batch as it enters the last blocks.

    Attributes:
        rest: these blocks' states, before the final norm, by the weights of the time it is called.
        read: the positions of the padded batch whose states are read.
        before: the final-normed states there, by the weights of that time.
    """

    rest: halving.Rest
    read: Bool[Tensor, "batch length"]
    before: Float[Tensor, "places width"]


def half_pass(
    model: Any,
    count: int,
    ids: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
    read: Bool[Tensor, "batch length"],
) -> HalfPass:
    """A pass without gradient, after which the last `count` blocks can be run by themselves.

    Raises ConfigError where that does not give what the model itself computes.
    """
    states, rest = halving.halved(model, count, ids, mask)
    found = HalfPass(rest, read, states[read])
    with torch.no_grad():
        error = (final_states(model, found) - found.before).abs().max()
    if not error <= 1e-2 * found.before.abs().max():
        kind = type(structure.unwrapped(model)).__name__
        raise ConfigError(
            f"sft.readout.blocks={count}: the last blocks of {kind} cannot be run by themselves; "
            "set sft.readout.steps=0"
        )
    return found


def final_states(model: Any, given: HalfPass) -> Float[Tensor, "places width"]:
    """The final-normed states at the positions that are read, by the weights of now."""
    hidden, norm = given.rest()[given.read], structure.final_norm(model)
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


# --- the module -----------------------------------------------------------------------------------


class ReadoutModule(ResumableModule):
    """Trains the adapter in the last `config.blocks` blocks; all else stays bit-identical.

    Every batch passes the whole model once, before the first step and again where training is
    resumed, by the weights of SFT, which the policy must have; a step then costs the last blocks
    alone. Dropout is off throughout, or answers would seem to move by it. Each of several processes
    takes the same steps, which are too small to be shared. `openings` are the first tokens of
    refusals, and `progress` shows a bar while batches are prepared.
    """

    step_loss = "readout/step_contrast"
    arithmetic = Precision.fp32  # states of a whole pass were made without autocast
    splits = False  # its last blocks run by themselves
    openings: Tensor

    def __init__(
        self,
        policy: Policy,
        config: ReadoutConfig,
        openings: Int[Tensor, "tokens"],
        progress: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.model, self.progress = config, policy.model.eval(), progress
        self.total_steps = config.steps
        self.register_buffer("openings", openings, persistent=False)
        for weight in self.model.parameters():
            weight.requires_grad = False
        for name, weight in structure.decoder_blocks(self.model)[
            -config.blocks :
        ].named_parameters():
            weight.requires_grad = ".lora_" in name
        self.half_passes: dict[int, HalfPass] = {}  # batches by their numbers
        self.scores: Scores = {TOXIC: [], SEEMINGLY_TOXIC: []}
        self.moved: list[list[float]] = []

    def setup(self, stage: str) -> None:
        """Prepares every batch; no checkpoint has been loaded yet."""
        trainer: Any = self.trainer
        self.prepare(trainer.datamodule, trainer.strategy.root_device, trainer.is_global_zero)

    def prepare(self, batches: SafetyData, device: torch.device, leads: bool = True) -> None:
        self.place = device
        self.to(device)
        rows, heldout = batches.rows, batches.heldout()
        taken = [readout_batch(each, rows.pad) for each in rows.taken()]
        shown = self.progress and leads
        with callbacks.bar("readout, preparing", len(taken + heldout), "batch", shown=shown) as bar:
            for batch in taken + heldout:
                given = batch.to(device)
                self.half_passes[batch.number] = half_pass(
                    self.model, self.config.blocks, given.ids, given.mask, given.read
                )
                bar.update()
        prompts = [batch for batch in heldout if _asks(batch)]
        self.before, _ = self.heldout(prompts)

    def on_fit_start(self) -> None:
        self.model.eval()

    def training_step(self, batch: list[ReadoutBatch], _: int) -> Tensor:
        prompts, *answers = batch
        contrast, wording = self.contrast(prompts)
        loss = contrast + WORDING * wording
        self.log(self.step_loss, contrast)
        for held in answers:
            moved = self.drifted(held).mean()
            self.log("readout/step_drift", moved)
            loss = loss + self.config.drift * moved
        return self.checked(loss, tuple(name for part in batch for name in part.names))

    def contrast(self, batch: ReadoutBatch) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The contrast at the first answer token, and the NLL of how refusals go on.

        The contrast is that of the mass of refusals' first tokens, which ranks prompts, and as
        `greedy` weighs it of their margin, by which greedy decoding decides.
        """
        logits = self.logits(batch)
        first = logits[batch.first]
        contrast = contrast_loss(refusal.refusal_log_odds(first, self.openings), batch.labels)
        if self.config.greedy:
            margin = refusal.refusal_margin(first, self.openings)
            contrast = contrast + self.config.greedy * contrast_loss(margin, batch.labels)
        if not len(batch.opening):
            return contrast, contrast.new_zeros(())
        return contrast, F.cross_entropy(logits[~batch.first].float(), batch.opening)

    def drifted(self, batch: ReadoutBatch) -> Float[Tensor, "places"]:
        """How far the next token has moved at each place of some answers, in nats."""
        with torch.no_grad():
            before = head_logits(self.model, self.half_passes[batch.number].before)
        return drift(before, self.logits(batch))

    def logits(self, batch: ReadoutBatch) -> Float[Tensor, "places vocabulary"]:
        return head_logits(self.model, final_states(self.model, self.half_passes[batch.number]))

    def validation_step(self, batch: ReadoutBatch, _: int = 0) -> None:
        if not _asks(batch):
            rows = self.drifted(batch).split(batch.read.sum(1).tolist())
            self.moved += [row.tolist() for row in rows]
            return
        states = final_states(self.model, self.half_passes[batch.number])[batch.first]
        scores = refusal.refusal_log_odds(head_logits(self.model, states), self.openings)
        for score, label in zip(scores.tolist(), batch.labels.tolist(), strict=True):
            self.scores[label].append(score)

    def on_validation_epoch_end(self) -> None:
        scores, moved = self.heldout(())
        if all(scores.values()):
            auroc = statistics.auroc(scores[TOXIC], scores[SEEMINGLY_TOXIC])
            self.log("readout/auroc/heldout", auroc, sync_dist=True)
        if moved:
            values = [value for row in moved for value in row]
            self.log("readout/drift/heldout", sum(values) / len(values), sync_dist=True)

    @torch.no_grad()
    def heldout(self, batches: Iterable[ReadoutBatch]) -> tuple[Scores, list[list[float]]]:
        """Scores by class and drift by row, of `batches` and of held-out rows measured so far."""
        for batch in batches:
            self.validation_step(batch.to(self.device))
        found = self.scores, self.moved
        self.scores, self.moved = {TOXIC: [], SEEMINGLY_TOXIC: []}, []
        return found

    def record(
        self, batches: SafetyData, metrics: Iterable[Mapping[str, Any]], seed: int
    ) -> dict[str, Any]:
        """The outcome of training, which left these rows in `metrics.csv`; for `readout.json`.

        Losses are means over the first and the last quarter of the steps, AUROCs those of refusing
        toxic prompts before others, with their intervals, None without both kinds.
        """
        self.to(self.place)
        contrasts = [row["value"] for row in metrics if row["key"] == self.step_loss]
        after, moved = self.heldout(batches.heldout())
        quarter = max(1, len(contrasts) // 4)
        return {
            "steps": len(contrasts),
            "loss": {"first": _mean(contrasts[:quarter]), "last": _mean(contrasts[-quarter:])},
            "heldout_auroc": {
                "before": _auroc(self.before, seed),
                "after": _auroc(after, seed),
                "prompts": sum(map(len, after.values())),
            },
            "drift": {
                "answer_tokens": _mean([value for row in moved for value in row]),
                "first_token": _mean([row[0] for row in moved]),
            },
        }

    def configure_optimizers(self) -> Any:
        config = self.config
        factor = rate_factor(Schedule.linear, config.steps, round(WARMUP * config.steps))
        return adamw(self, config.lr, config.weight_decay, factor)


def summary(record: Mapping[str, Any]) -> str:
    """Puts steps, loss, AUROC and drift, in nats, of a `ReadoutModule.record` into a line."""
    loss, auroc, drift = record["loss"], record["heldout_auroc"], record["drift"]["answer_tokens"]
    parts = [f"{record['steps']} steps"]
    if loss["first"] is not None:
        parts.append(f"loss {loss['first']:.2f} to {loss['last']:.2f}")
    if auroc["after"]:
        before, (after, low, high) = auroc["before"][0], auroc["after"]
        parts.append(f"AUROC {before:.2f} to {after:.2f} [{low:.2f}, {high:.2f}] on held-out pairs")
    if drift is not None:
        parts.append(f"drift {drift:.3f} nats an answer token")
    return "; ".join(parts)


def _asks(batch: ReadoutBatch) -> bool:
    """Whether its rows are prompts, not answers."""
    return bool((batch.labels != NO_CLASS).all())


def _auroc(scores: Scores, seed: int) -> tuple[float, ...] | None:
    if not all(scores.values()):
        return None
    found = statistics.auroc_interval(scores[TOXIC], scores[SEEMINGLY_TOXIC], seed=seed)
    return astuple(found)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
