"""The paper's quantities as curves over a stage, and SFT's adapter, at chosen steps."""

import copy
import functools
import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from dcr.analyses import check_parameters, kinds, weights
from dcr.core import models
from dcr.core.config import ConfigError, Kind, Stage
from dcr.core.config.training import TrainConfig
from dcr.core.models import Policy
from dcr.core.models.training import save_adapter, trained_weights
from dcr.core.prompts import ChatFormat
from dcr.core.runs import Run
from dcr.core.sources import Example
from dcr.core.training import Watched
from dcr.results import schema
from dcr.tracking import Quantity, TrackingConfig

BETWEEN = 20  # steps at which a curve is measured between its first and its last


def tracked_steps(total: int, every: int | None = None) -> list[int]:
    """Steps done at which to measure: 0, the last, and 20 between, denser early.

    All of them where there are fewer; with `every` at that interval instead.
    """
    if every is not None:
        return sorted({*range(0, total, every), total})
    between: list[int] = []
    for i in range(1, BETWEEN + 1):
        wanted = round(total * (i / (BETWEEN + 1)) ** 1.5)
        between.append(max(wanted, between[-1] + 1 if between else 1))
    return sorted({0, *(step for step in between if step < total), total})


@dataclass(frozen=True)
class Tracked:
    """The quantities to measure while stages train, and their prompts."""

    config: TrackingConfig
    rows: Mapping[Quantity, kinds.ByKind]
    alone: Mapping[Kind, Example]
    seed: int


def tracked(settings: TrainConfig) -> Tracked | None:
    """The prompts of every quantity; None where nothing is to be measured.

    Raises ConfigError and DataError as reading sources does.
    """
    config = settings.node(TrackingConfig)
    if not config.quantities:
        return None
    every = kinds.every(settings.data)
    counts = {
        Quantity.refusal_probability: config.refusal_prob.prompts,
        Quantity.kernel: config.entk.prompts,
    }
    rows = {q: kinds.drawn(every, counts[q], settings.seed) for q in config.quantities}
    return Tracked(config, rows, kinds.followed(every), settings.seed)


def watching(settings: TrainConfig) -> Watched:
    """Trackers and snapshots for the stages of a run, on prompts that are read now.

    Raises ConfigError for parameters and tokens that the model does not have, and as `tracked`.
    """
    facts, tracking = models.facts(settings.model), settings.node(TrackingConfig)
    kernel = tracking.entk
    if Quantity.kernel in tracking.quantities:
        check_parameters("tracking.entk.params", kernel.params, facts.depth)
        if kernel.top_k > facts.vocabulary:
            raise ConfigError(
                f"tracking.entk.top_k={kernel.top_k}: the model has {facts.vocabulary} tokens"
            )
    found = tracked(settings)

    def callbacks(
        run: Run, stage: Stage, policy: Policy, chat: ChatFormat, total: int
    ) -> list[Callback]:
        made: list[Callback] = []
        if stage is Stage.sft:
            made.append(Snapshots(run, policy, snapshot_steps(total, tracking.snapshots)))
        if found is not None:
            steps = tracked_steps(total, tracking.every_n_steps)
            made.append(Tracker(stage.value, policy, chat, found, steps, run.tracked(stage.value)))
        return made

    return callbacks


def snapshot_steps(total: int, count: int) -> list[int]:
    """Step 0 and at most `count` up to the last, denser early, where refusal moves fastest."""
    if count < 1:
        return []
    count = min(count, 2 * total)  # so many are every step
    wanted = {max(1, math.ceil(total * ((i + 1) / count) ** 1.5)) for i in range(count)}
    return sorted(wanted | {0, total})


class Snapshots(Callback):
    """Saves the adapter at chosen steps of SFT; `eval.py snapshots=true` scores them afterwards."""

    def __init__(self, run: Run, policy: Policy, steps: list[int]) -> None:
        self.run, self.policy, self.steps = run, policy, set(steps)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step in self.steps:
            weights = trained_weights(self.policy.model)
            if trainer.is_global_zero:
                place = self.run.snapshots / f"step-{step:06d}"
                save_adapter(self.policy, place, self.policy.name, weights)


class Tracker(Callback):
    """Measures refusal probability and kernel at chosen steps of a stage.

    Keys are `<stage>/refusal_probability/<kind>` (the plain sum), `…_prefix_free/<kind>`,
    `…/followed/<kind>` and `<stage>/kernel/<params>/<observer kind>/<trained kind>`. The values of
    every prompt and whole kernels go to `folder`/step-…, for intervals over prompts. Measuring
    draws no random number and leaves modes as they are: training is the same to the bit with it.
    """

    def __init__(
        self,
        stage: str,
        policy: Policy,
        chat: ChatFormat,
        tracked: Tracked,
        steps: list[int],
        folder: Path,
    ) -> None:
        self.stage, self.policy, self.chat, self.folder = stage, policy, chat, folder
        self.tracked, self.steps, self.seconds = tracked, set(steps), 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            self._forget_beyond(trainer.global_step)
        self._measure(trainer)

    def _forget_beyond(self, step: int) -> None:
        """Deletes what an earlier process measured at steps that are now trained again."""
        for place in self.folder.glob("step-*"):
            number = place.name.removeprefix("step-")
            if number.isdecimal() and int(number) > step:
                shutil.rmtree(place)

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self._measure(trainer)

    def _measure(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step not in self.steps or not trainer.is_global_zero:
            return
        began = time.perf_counter()
        measured: dict[str, float] = {}
        blocks: dict[str, Any] = {}
        place = self.folder / f"step-{step:06d}"
        with trainer.precision_plugin.forward_context():
            for quantity, rows in self.tracked.rows.items():
                measure, values_of = MEASURES[quantity]
                blocks[quantity.value] = measure(self.policy, self.chat, rows, self.tracked, place)
                measured |= values_of(blocks[quantity.value])
        schema.write(place / "metrics.json", blocks, schema.Tracked)
        self.seconds += time.perf_counter() - began
        measured["tracking_seconds"] = self.seconds
        named = {f"{self.stage}/{key}": value for key, value in measured.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**named, "epoch": trainer.current_epoch}, step)


def _refusal_probability(
    policy: Policy, chat: ChatFormat, rows: kinds.ByKind, tracked: Tracked, _: Path
) -> dict[str, Any]:
    phrases = tracked.config.refusal_prob.phrases
    read = functools.partial(weights.probabilities, policy, chat, phrases)
    return weights.refusal_probability(read, rows, tracked.alone, phrases, tracked.seed)


def _probabilities(block: Mapping[str, Any]) -> dict[str, float]:
    values = {}
    for kind, means in block["kinds"].items():
        values[f"refusal_probability/{kind}"] = means["plain"][0]
        values[f"refusal_probability_prefix_free/{kind}"] = means["prefix_free"][0]
    for kind, followed in block["followed"].items():
        values[f"refusal_probability/followed/{kind}"] = followed["plain"]
    return values


def _kernel(
    policy: Policy, chat: ChatFormat, rows: kinds.ByKind, tracked: Tracked, place: Path
) -> dict[str, Any]:
    """Measures the kernel; products of gradients need fp32, so narrower weights are copied."""
    model = policy.model
    if any(parameter.dtype.itemsize < 4 for parameter in model.parameters()):
        model = copy.deepcopy(model).float()
    copied = Policy(model, policy.tokenizer, policy.name)
    with torch.autocast(model.device.type, enabled=False):
        return weights.kernel(copied, chat, rows, tracked.config.entk, tracked.seed, place)


def _norms(block: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"kernel/{params}/{observer}/{trained}": cell[0]
        for params, means in block["params"].items()
        for observer, row in means.items()
        for trained, cell in row.items()
    }


MEASURES = {
    Quantity.refusal_probability: (_refusal_probability, _probabilities),
    Quantity.kernel: (_kernel, _norms),
}
