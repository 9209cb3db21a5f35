"""Stage one: Circle loss on the hidden state of an intermediate block (Section 5, A.8)."""

from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from dcr.core import learning, losses
from dcr.core.config.training import Adapter, ContrastiveConfig
from dcr.core.data.rows import NO_CLASS, PairBatch, PromptBatch
from dcr.core.models import Policy
from dcr.core.models.training import freeze_beyond, trunk
from dcr.core.prompts import IGNORED
from dcr.core.training.resuming import ResumableModule, adamw, epoch_mean, ranks, rate_factor


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
