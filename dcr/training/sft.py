"""Stage two: LoRA fine-tuning on instructions plus refusals (STL, Section 7.1)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from dcr import models
from dcr.config import ContrastiveConfig, SFTConfig
from dcr.data import PairBatch, PromptBatch
from dcr.models import Policy
from dcr.prompts import IGNORED
from dcr.training.contrastive import PAIR_LOSSES, features_of
from dcr.training.resuming import ResumableModule, adamw, epoch_mean, rate_factor

ROWS = ("general", "refusal")


def first_targets(targets: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """The first target of each row alone, where answers begin."""
    labelled = targets != IGNORED
    return targets.where(labelled & (labelled.cumsum(1) == 1), IGNORED)


class SFTModule(ResumableModule):
    """One batch is one optimiser step: its micro-batches share one per-token normaliser.

    Optimisation is manual because Lightning scales every micro-batch alike, while Eq. 1 summed
    over a batch weighs every response token alike. A step that begins with prompts of stage one
    takes its loss on them as well, as `dcr` says, at the output of `block`.
    """

    def __init__(
        self,
        policy: Policy,
        config: SFTConfig,
        total_steps: int,
        dcr: ContrastiveConfig | None = None,
        block: int = 1,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.config, self.dcr, self.total_steps = config, dcr, total_steps
        self.model = policy.model
        # in a tuple: a registered trunk would repeat its parameters in every state dict
        self._trunk = (models.trunk(self.model, block),)
        if config.gradient_checkpointing:
            self.recompute_blocks()
        self.train_nll = torch.nn.ModuleDict({row: epoch_mean() for row in ROWS})
        self.heldout_nll = torch.nn.ModuleDict({row: epoch_mean() for row in ROWS})
        self.keep_metrics_in_checkpoints()

    def training_step(self, batch: list[PromptBatch | PairBatch], _: int) -> None:
        prompts = [part for part in batch if isinstance(part, PromptBatch)]
        pairs = [part for part in batch if isinstance(part, PairBatch)]
        weight, parts = self.weight(pairs), []
        for part in prompts:  # first, since ranks wait for gradients of every block with the last
            with self.gradients_exchanged(last=False):
                self.manual_backward(self.contrast(part))
        for index, micro in enumerate(pairs):
            with self.gradients_exchanged(last=index == len(pairs) - 1):
                total, per_token = self.nll(micro)
                parts.append(self.checked(total * weight, micro.names))
                self.manual_backward(parts[-1] * self.trainer.world_size)
            self.count(self.train_nll, micro, per_token)
        self.optimise()
        step = torch.stack(parts).detach().sum()
        self.log("sft/step_nll", step, sync_dist=True, reduce_fx="sum")
        self.log_nll(self.train_nll, "")

    def validation_step(self, batch: PairBatch, _: int) -> None:
        total, per_token = self.nll(batch)
        self.checked(total, batch.names)
        self.count(self.heldout_nll, batch, per_token)
        self.log_nll(self.heldout_nll, "/heldout")

    def nll(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """Weighted sum of the tokens' NLL, and each without its weight."""
        hidden, more = self.hidden(batch.ids, batch.mask), self.config.first_token_weight - 1
        total, per_token = self.labelled_nll(hidden, batch.targets)
        if more:
            total = total + more * self.labelled_nll(hidden, first_targets(batch.targets))[0]
        return total, per_token

    def contrast(self, batch: PromptBatch) -> Tensor:
        """Stage one's loss, of the same prompts on every rank, by its weight."""
        (trunk,), dcr = self._trunk, self.dcr
        assert dcr is not None
        features = features_of(self, trunk, batch)
        contrast = PAIR_LOSSES[dcr.loss](features, batch.labels, batch.pairs, dcr)
        self.log("sft/step_contrast", contrast)
        return self.checked(self.config.contrast.weight * contrast, batch.names)

    def weight(self, batch: list[PairBatch]) -> Tensor:
        """What a step's weighted sum is multiplied by: one over the weights of all ranks' tokens.

        A token weighs 1, the first of an answer `first_token_weight`.
        """
        tokens = torch.stack([(micro.targets != IGNORED).sum() for micro in batch]).sum().float()
        first = torch.stack([(first_targets(micro.targets) != IGNORED).sum() for micro in batch])
        tokens = tokens + (self.config.first_token_weight - 1) * first.sum()
        return 1.0 / torch.as_tensor(self.trainer.strategy.reduce(tokens, reduce_op="sum"))

    def gradients_exchanged(self, last: bool) -> AbstractContextManager[Any]:
        """Ranks exchange gradients once a step, with the last micro-batch."""
        wrapped = self.trainer.strategy.model
        if last or not hasattr(wrapped, "no_sync"):
            return nullcontext()
        return wrapped.no_sync()  # pyright: ignore

    def optimise(self) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()
        scheduler: Any = self.lr_schedulers()
        scheduler.step()

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
