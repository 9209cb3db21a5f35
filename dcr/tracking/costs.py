"""Callbacks log the cost of every stage, and how held-out prompts of stage one cluster."""

import time
from dataclasses import asdict
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from dcr.clusters import HeldoutClusters
from dcr.core import machine, storage
from dcr.core.config import Stage
from dcr.core.config.training import TrainConfig
from dcr.core.models import Policy
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.training import Watched
from dcr.stages import Cost
from dcr.tracking import TrackingConfig


def watching(settings: TrainConfig) -> Watched:
    """The callbacks of every stage, and behind them those that `tracking` asks for.

    Raises UserError as `curves.watching` does.
    """
    node, asked = settings.node(TrackingConfig), None
    if node.quantities or node.snapshots:
        from dcr.tracking import curves  # with the analyses

        asked = curves.watching(settings)

    def callbacks(
        run: Run, stage: Stage, policy: Policy, chat: ChatFormat, total: int
    ) -> list[Callback]:
        trained = settings.dcr if stage is Stage.contrastive else settings.sft
        return [
            # it stops at the end of a step before anything is measured there
            StepClock(run, stage.value, trained.precision.value),
            *([HeldoutClusters()] if stage is Stage.contrastive else []),
            *(asked(run, stage, policy, chat, total) if asked else []),
        ]

    return callbacks


class StepClock(Callback):
    """Writes down what a stage cost: seconds, tokens, peak memory, into `<stage>.cost.json`.

    Seconds count the steps of this command only and the tokens are those its processes saw, so the
    rate of a resumed stage is a rate of its last part. Memory is the first process's.
    """

    def __init__(self, run: Run, stage: str, precision: str) -> None:
        self.run, self.stage, self.precision = run, stage, precision
        self.seconds, self.tokens, self.steps, self.began = 0.0, 0, 0, 0.0
        self.cpu_seconds, self.cpu_began = 0.0, 0.0

    def on_train_batch_start(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.began, self.cpu_began = time.perf_counter(), time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter() - self.began
        self.cpu_seconds += time.process_time() - self.cpu_began
        parts = batch if isinstance(batch, list) else [batch, batch.general]
        self.tokens += sum(int(part.mask.sum()) for part in parts if part)
        self.steps += 1

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seen = torch.tensor(self.tokens, device=trainer.strategy.root_device)
        tokens = int(torch.as_tensor(trainer.strategy.reduce(seen, reduce_op="sum")))
        if not trainer.is_global_zero or not self.steps:
            return
        device, device_seconds = f"CPU, threads: {torch.get_num_threads()}", self.cpu_seconds
        if trainer.strategy.root_device.type == "cuda":
            device, device_seconds = torch.cuda.get_device_name(), self.seconds
        cost = Cost(
            steps=self.steps,
            seconds=round(self.seconds, 1),
            tokens=tokens,
            tokens_per_second=round(tokens / self.seconds, 1),
            peak_memory_gib=round(machine.peak_memory_gib(), 2),
            device=device,
            device_seconds=round(device_seconds, 3),
            precision=self.precision,
        )
        storage.write_json(self.run.cost_file(self.stage), asdict(cost))
