"""The paper's two stages, each from the weights that it starts from to its result.

Stage one is Circle loss on the hidden state of an intermediate block (Section 5, A.8), stage two
LoRA fine-tuning on instructions plus refusals (STL, A.3).
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from dcr.core import extending, learning, losses, models, prompts
from dcr.core.config import Method, Quantization, Stage
from dcr.core.config.training import Adapter, ContrastiveConfig, SFTConfig
from dcr.core.data.rows import NO_CLASS, PairBatch, PromptBatch
from dcr.core.models import Policy, structure
from dcr.core.models.training import freeze_beyond, is_sharded, save_adapter, save_full, trunk
from dcr.core.prompts import IGNORED
from dcr.core.training import Job, Train, batches_of, chat_of_answers, fit
from dcr.core.training.resuming import ResumableModule, adamw, epoch_mean, ranks, rate_factor

log = logging.getLogger(__name__)

ROWS = ("general", "refusal")  # of stage two


def train_stage(stage: Stage, job: Job) -> None:
    """From the weights that a stage starts from to its result."""
    train: Train = TRAIN.get(stage) or extending.ours(job.settings.table.stages[stage.value])
    train(job)


# --- stage one ------------------------------------------------------------------------------------


def train_contrastive(job: Job) -> None:
    """Stage one: from the base model to `contrastive/`."""
    settings = job.settings
    policy = _contrastive_start(job)
    chat = prompts.chat_format(policy.tokenizer, settings.model)
    batches = batches_of(job, Stage.contrastive, policy, chat)
    total = batches.steps_per_epoch * settings.dcr.epochs
    module = ContrastiveModule(policy, settings.dcr, job.block, total)
    light = learning.current().shrink_frozen(
        policy.model, job.block, whole=module.anchored, settings=settings
    )

    def save(trained: dict[str, Tensor]) -> None:
        made = policy
        if light or structure.is_quantised(policy.model) or is_sharded(policy.model):
            made = _contrastive_start(job, whole=True)  # no whole weights are here
            made.model.load_state_dict(trained, strict=False)
        if settings.dcr.adapter is Adapter.lora:
            made = replace(made, model=made.model.merge_and_unload())
        save_full(made, job.run.stage("contrastive"))

    fit(job, Stage.contrastive, module, policy, chat, batches, save)


def _contrastive_start(job: Job, whole: bool = False) -> Policy:
    """The base model as the stage trains it, or whole for a result.

    A result of weights in four bits adds what was trained to the weights in full: to the rounded
    ones it would be lost where SFT rounds again, since each stands on a step of the grid.
    """
    settings, dcr = job.settings, job.settings.dcr
    model = replace(settings.model, quantization=Quantization.none) if whole else settings.model
    policy = models.open_policy(model, dcr.precision)
    if dcr.adapter is not Adapter.lora:
        return policy
    adapted = structure.add_lora(policy.model, dcr.lora, settings.seed, blocks=job.block)
    return replace(policy, model=adapted)


def of_all_ranks(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the global batch that have a class, in order; gradient flows to ours alone.

    Every rank then finds the loss of all pairs, and each its own features' gradient of it.
    """
    if ranks() == 1:
        return features, labels
    features, labels = (torch.cat(gather_all_tensors(part)) for part in (features, labels))
    kept = labels != NO_CLASS
    return features[kept], labels[kept]


def summed_over_ranks(value: Tensor) -> Tensor:
    """The sum over all ranks, without gradient."""
    value = value.detach()
    return torch.stack(gather_all_tensors(value)).sum(0) if ranks() > 1 else value


class PairMetrics(torch.nn.ModuleDict):
    """Epoch means of stage one, exact over uneven batches and ranks: sums and counts as state."""

    def __init__(self, margin: float, suffix: str = "") -> None:
        names = ("circle", "above_floor", "within_cosine", "across_cosine", "violating_share")
        super().__init__({name: epoch_mean() for name in names})
        self.margin, self.suffix = margin, suffix

    def add(
        self, features: Tensor, labels: Tensor, circle: Tensor, floor: Tensor, counts: bool = True
    ) -> None:
        """One batch; without weight where another rank `counts` the same rows."""
        batch = torch.tensor(len(labels), device=features.device)
        summed = losses.pair_statistics(features, labels, self.margin) | {
            "circle": (circle * batch, batch),
            "above_floor": ((circle - floor) * batch, batch),
        }
        for name, (total, weight) in summed.items():
            mean: Any = self[name]
            mean.update(total.detach() / weight.clamp(min=1), weight=weight * counts)

    def log_to(self, module: LightningModule) -> None:
        metric: Any
        for name, metric in self.items():
            module.log(f"contrastive/{name}{self.suffix}", metric, on_step=False, on_epoch=True)


class ContrastiveModule(ResumableModule):
    """Trains blocks 1 to `block`; all above, final norm and head stay bit-identical.

    The policy's weights are changed in place.
    """

    step_loss = "contrastive/step_circle"

    def __init__(
        self, policy: Policy, config: ContrastiveConfig, block: int, total_steps: int
    ) -> None:
        super().__init__()
        self.config, self.block, self.total_steps = config, block, total_steps
        self.arithmetic, self.clip = config.precision, config.optim.clip
        self.model = policy.model
        if config.adapter is Adapter.full:
            freeze_beyond(self.model, block, config.train_embeddings)
        if config.gradient_checkpointing:
            self.recompute_blocks()
        # in a tuple: a registered trunk would repeat its parameters in every state dict
        self._trunk = (trunk(self.model, block),)
        self.anchored = config.nll.weight > 0
        self.train_metrics = PairMetrics(config.margin)
        self.heldout_metrics = PairMetrics(config.margin, "/heldout")
        self.token_nll = epoch_mean()

    def training_step(self, batch: PromptBatch, _: int) -> Tensor:
        features, nll = self.features_and_nll(batch)
        features, labels = of_all_ranks(features, batch.labels)
        circle, floor = self.circle(features, labels)
        loss = self.checked(circle + self.config.nll.weight * nll, batch.names)
        self.log(self.step_loss, circle)
        leads = self.global_rank == 0
        self.train_metrics.add(features, labels, circle, floor, counts=leads)
        self.train_metrics.log_to(self)
        if self.anchored:
            nll = summed_over_ranks(nll)
            self.log("contrastive/step_nll", nll)
            tokens = summed_over_ranks(self.nll_tokens(batch))
            self.token_nll.update(nll, weight=tokens * leads)
            self.log("contrastive/nll", self.token_nll, on_step=False, on_epoch=True)
        # DDP averages gradients over ranks, and this loss is already over the global batch
        return loss * ranks()

    def validation_step(self, batch: PromptBatch, _: int) -> Tensor:
        """Measures held-out rows, and gives their features to callbacks."""
        features = self.features(batch)
        circle, floor = self.circle(features, batch.labels)
        self.checked(circle, batch.names)
        self.heldout_metrics.add(features, batch.labels, circle, floor)
        self.heldout_metrics.log_to(self)
        return features

    def features_and_nll(self, batch: PromptBatch) -> tuple[Tensor, Tensor]:
        """The prompts' features, and the NLL that anchors language: 0 without `dcr.nll.weight`."""
        if not self.anchored:
            features = self.features(batch)
            return features, features.new_zeros(())
        if batch.general is not None:
            features = self.features(batch)
            return features, self.mean_nll(batch.general)[0]
        nll, states = self.mean_nll(batch, self.block)
        assert states is not None
        return learning.pooled(states, batch.spans), nll

    def features(self, batch: PromptBatch) -> Tensor:
        (trunk,) = self._trunk
        states = learning.current().states(trunk, batch.ids, batch.mask)
        return learning.pooled(states, batch.spans)

    def mean_nll(
        self, batch: PromptBatch | PairBatch, block: int | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The token mean of the next-token NLL, and a block's output if asked for.

        Each of several ranks has its part of the mean over the tokens of all. The paper names no
        reduction; transformers takes the token mean.
        """
        found = learning.current().nll(self.model, batch.ids, batch.mask, batch.targets, block)
        return found.total / summed_over_ranks((batch.targets != IGNORED).sum()), found.states

    def circle(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Eq. 5 and its floor, the value at which no pair violates its margin."""
        margin, scale = self.config.margin, self.config.scale
        weights = self.config.circle.weights.value
        circle = losses.circle_loss(features, labels, margin, scale, weights=weights)
        return circle, losses.circle_floor(labels)

    def nll_tokens(self, batch: PromptBatch) -> Tensor:
        """How many tokens the batch's NLL is a mean over."""
        source: PromptBatch | PairBatch = batch.general or batch
        return (source.targets != IGNORED).sum()

    def configure_optimizers(self) -> Any:
        factor = rate_factor(self.config.schedule, self.total_steps, warmup=0)
        optim = self.config.optim
        return adamw(self, optim.lr, optim.weight_decay, factor, optim.moments)


# --- stage two ------------------------------------------------------------------------------------


def train_sft(job: Job) -> None:
    """Stage two: from the base model (STL, STL-aug) or `contrastive/` (DCR) to `sft/`."""
    settings, sft = job.settings, job.settings.sft
    if settings.method is Method.dcr:
        policy = models.open_folder(
            str(job.run.stage("contrastive")),
            sft.precision,
            trust_remote_code=settings.model.trust_remote_code,
            quantization=settings.model.quantization,
        )
    else:
        policy = models.open_policy(settings.model, sft.precision)
    policy = replace(policy, model=structure.add_lora(policy.model, sft.lora, settings.seed))
    chat = chat_of_answers(job, policy)
    batches = batches_of(job, Stage.sft, policy, chat)
    if batches.rows.too_long:
        log.warning(
            "%d pairs have no room for a response within sft.max_len=%d and were left out",
            len(batches.rows.too_long),
            sft.max_len,
        )
    module = SFTModule(policy, sft, batches.steps_per_epoch * sft.epochs)

    def save(trained: dict[str, Tensor]) -> None:
        save_adapter(policy, job.run.stage("sft"), policy.name, trained)

    fit(job, Stage.sft, module, policy, chat, batches, save)


class SFTModule(ResumableModule):
    """One batch is one optimiser step: its micro-batches share one per-token normaliser.

    Optimisation is manual because Lightning scales every micro-batch alike, while Eq. 1 summed
    over a batch weighs every response token alike.
    """

    step_loss = "sft/step_nll"

    def __init__(self, policy: Policy, config: SFTConfig, total_steps: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.total_steps, self.arithmetic = config, total_steps, config.precision
        self.model = policy.model
        if config.gradient_checkpointing:
            self.recompute_blocks()
        self.train_nll = torch.nn.ModuleDict({row: epoch_mean() for row in ROWS})
        self.heldout_nll = torch.nn.ModuleDict({row: epoch_mean() for row in ROWS})

    def training_step(self, batch: list[PairBatch], _: int) -> None:
        weight, parts = self.weight(batch), list[Tensor]()
        for index, micro in enumerate(batch):
            with self.gradients_exchanged(last=index == len(batch) - 1):
                total, per_token = self.nll(micro)
                part = self.checked(total * weight, micro.names)
                parts.append(part.detach())
                self.manual_backward(part * self.trainer.world_size)
            self.count(self.train_nll, micro, per_token)
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()
        self.log(self.step_loss, torch.stack(parts).sum(), sync_dist=True, reduce_fx="sum")
        self.log_nll(self.train_nll, "")

    def validation_step(self, batch: PairBatch, _: int) -> None:
        total, per_token = self.nll(batch)
        self.checked(total, batch.names)
        self.count(self.heldout_nll, batch, per_token)
        self.log_nll(self.heldout_nll, "/heldout")

    def nll(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """The NLL of the tokens that have a target: its sum, and each."""
        found = learning.current().nll(self.model, batch.ids, batch.mask, batch.targets)
        return found.total, found.each

    def weight(self, batch: list[PairBatch]) -> Tensor:
        """The factor of a step's sum: one over the labelled tokens of all ranks."""
        tokens = torch.stack([(micro.targets != IGNORED).sum() for micro in batch]).sum().float()
        return 1.0 / torch.as_tensor(self.trainer.strategy.reduce(tokens, reduce_op="sum"))

    def gradients_exchanged(self, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients once a step, with the last micro-batch."""
        wrapped = self.trainer.strategy.model
        if last or not hasattr(wrapped, "no_sync"):
            return nullcontext()
        return wrapped.no_sync()  # pyright: ignore

    def count(self, metrics: torch.nn.ModuleDict, batch: PairBatch, per_token: Tensor) -> None:
        """Add every labelled token's NLL to the mean of its kind of row."""
        of_refusal = batch.refusal[torch.nonzero(batch.targets != IGNORED)[:, 0]]
        for row, chosen in zip(ROWS, (~of_refusal, of_refusal), strict=True):
            metrics[row].update(per_token[chosen])  # pyright: ignore[reportCallIssue]

    def log_nll(self, metrics: torch.nn.ModuleDict, suffix: str) -> None:
        for row, metric in metrics.items():
            self.log(f"sft/nll/{row}{suffix}", metric, on_step=False, on_epoch=True)  # pyright: ignore

    def configure_optimizers(self) -> Any:
        warmup = round(self.config.warmup * self.total_steps)
        factor = rate_factor(self.config.schedule, self.total_steps, warmup)
        return adamw(self, self.config.lr, self.config.weight_decay, factor)


TRAIN: dict[Stage, Train] = {Stage.contrastive: train_contrastive, Stage.sft: train_sft}
