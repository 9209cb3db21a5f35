"""Stage two: LoRA fine-tuning on instructions plus refusals (STL, A.3)."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from dcr.core import learning
from dcr.core.config.training import SFTConfig
from dcr.core.data.rows import PairBatch
from dcr.core.models import Policy
from dcr.core.prompts import IGNORED
from dcr.core.training.resuming import ResumableModule, adamw, epoch_mean, rate_factor

ROWS = ("general", "refusal")


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
        self.optimise()
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
