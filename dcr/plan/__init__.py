"""The plan of a training command, computed from architecture and rows: no weight is loaded.

Rows, batches and steps are those that training uses; parameters, memory and time come from
`dcr.plan.cost`. `train.py plan=true` prints it.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from dcr import balance, continuing, entry, readout
from dcr.core import config, data, machine
from dcr.core.config import Method, Precision, Stage
from dcr.core.config.training import TrainConfig, stages_of
from dcr.core.data import Splits
from dcr.core.runs import Run
from dcr.core.text import CHARACTERS_PER_TOKEN
from dcr.plan import cost
from dcr.plan.cost import Load, Shape, stage_shape
from dcr.plan.rows import (
    batches_of,
    chat_of,
    computed,
    load_of,
    shared_prefix,
    tokenizer_is_here,
)
from dcr.readout.rows import ReadoutRows


@dataclass(frozen=True)
class StagePlan:
    """The plan of one stage, on one rank if ranks share the work."""

    stage: Stage
    precision: Precision
    shape: Shape
    load: Load  # of padded passes, as on a GPU
    here: Load  # on the device at hand
    epochs: int
    batch_size: int
    steps_per_epoch: int  # optimiser steps
    warmup: int  # optimiser steps
    memory: dict[str, float]  # bytes, on the device at hand
    flops: float  # of all epochs, on the device at hand
    padded_flops: float

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs


def describe(settings: TrainConfig) -> str:
    """The plan of a command, 100 columns wide.

    Raises UserError as training does before it loads weights.
    """
    from dcr import checking  # with torch
    from dcr.core import models

    chain = stages_of(settings)
    checking.check_blocks(settings.dcr, settings.sft.readout, models.facts(settings.model).depth)
    on_gpu, _ = continuing.with_precisions(
        replace(settings, trainer=replace(settings.trainer, accelerator="gpu"))
    )
    run = Run(Path(settings.run)) if settings.run else None
    recorded = run.precisions() if run else {}
    settings, arithmetic = continuing.with_precisions(settings, recorded)
    notes = [f"precision: {arithmetic.told}", *([arithmetic.slow] if arithmetic.slow else [])]
    shapes = {stage: stage_shape(settings, stage) for stage in chain}
    drawn = data.rows_of(settings)
    balanced = balance.balance(drawn.seemingly_toxic, drawn.toxic)
    more = [*drawn.told(), *([balanced.warning] if balanced and balanced.warning else [])]
    if run:
        continuing.check_config(run, config.plain(settings), settings.force)
        continuing.check_rows(run, data.row_record(drawn), settings.force)
    plans = [stage_plan(settings, stage, shape, drawn) for stage, shape in shapes.items()]
    pairs_table = entry.table("Stage one's pairs", ["what may stand in for intent", ""])
    for name, value in balanced.rows() if balanced else ():
        pairs_table.add_row(name, value)
    named = " then ".join(stage.value for stage in chain)
    return entry.plain_text(
        f"Plan: method={settings.method.value} ({named}) on {settings.model.name}\n",
        _parameter_table(plans),
        _row_table(drawn),
        *([pairs_table] if balanced else []),
        _stage_table(settings, on_gpu, plans),
        *(f"- {note}" for note in [*more, *notes, *_notes(settings)]),
    )


def stage_plan(settings: TrainConfig, stage: Stage, shape: Shape, drawn: Splits) -> StagePlan:
    """The plan of one stage over these rows."""
    if stage is Stage.readout:
        return _readout_plan(settings, shape, drawn)
    first = stage is Stage.contrastive
    node = settings.dcr if first else settings.sft
    batches, prefix = batches_of(settings, stage, drawn)
    load = load_of(settings, batches)
    here = load_of(settings, batches, prefix) if cost.packs(settings, stage) else load
    return StagePlan(
        stage=stage,
        precision=node.precision,
        shape=shape,
        load=load,
        here=here,
        epochs=node.epochs,
        batch_size=node.batch_size,
        steps_per_epoch=len(batches.sampler),
        warmup=0 if first else round(settings.sft.warmup * len(batches.sampler) * node.epochs),
        memory=cost.memory(settings, stage, shape, here),
        flops=node.epochs * cost.epoch_flops(settings, stage, shape, here),
        padded_flops=node.epochs * cost.epoch_flops(settings, stage, shape, load),
    )


def _readout_plan(settings: TrainConfig, shape: Shape, drawn: Splits) -> StagePlan:
    """The readout's plan; its tokens are those that pass all blocks, once."""
    chat, rows = chat_of(settings.model, drawn)
    found, phase = ReadoutRows(rows, chat, settings), settings.sft.readout
    learnt = [each.rows for place in found.sampler.places for each in found.drawn[place]]
    held = [each.rows for each in found.heldout_passes]
    once = [*(each.rows for each in found.taken()), *held]
    places = sum(len(row.places) for batch in learnt for row in batch)

    def counted(prefix: int | None) -> tuple[Load, float]:
        through, last, measured = (
            [computed(batch, prefix) for batch in batches] for batches in (once, learnt, held)
        )
        unpadded = sum(len(row.ids) for batch in once for row in batch)
        load = Load(0, sum(through), unpadded, places, 0, max(through), sum(measured))
        return load, cost.readout_flops(settings, shape, load, sum(last))

    load, padded_flops = counted(None)
    packed = cost.packs(settings, Stage.sft)
    here, flops = counted(shared_prefix(chat)) if packed else (load, padded_flops)
    return StagePlan(
        stage=Stage.readout,
        precision=settings.sft.precision,
        shape=shape,
        load=load,
        here=here,
        epochs=1,
        batch_size=phase.batch_size,
        steps_per_epoch=phase.steps,
        warmup=round(readout.WARMUP * phase.steps),
        memory=cost.memory(settings, Stage.sft, shape, here),
        flops=flops,
        padded_flops=padded_flops,
    )


def _parameter_table(plans: list[StagePlan]) -> Table:
    table = entry.table("Parameters", ["part", "count", *(plan.stage.value for plan in plans)])
    parts = {name: n for plan in plans for name, n in plan.shape.parts.items()}
    for name, count in parts.items():
        tied = name == "head" and plans[0].shape.tied
        states = [_state(plan.shape, name) for plan in plans]
        table.add_row(name, "the embeddings" if tied else f"{count:,}", *states)
    table.add_section()
    model = sum(count for name, count in parts.items() if name != "LoRA")
    trained = [f"{sum(plan.shape.trained.values()):,} trained" for plan in plans]
    table.add_row("model without LoRA", f"{model:,}", *trained)
    return table


def _state(shape: Shape, part: str) -> str:
    if part == "head" and shape.tied:
        part = "embeddings"
    if part not in shape.parts:
        return "-"
    if shape.trained[part]:
        return "trained"
    return "frozen, 4 bits" if shape.narrow[part] else "frozen"


def _row_table(drawn: Splits) -> Table:
    table = entry.table("Rows", ["list", "rows", "of source"])
    table.columns[2].justify = "left"
    for name, part in drawn.parts().items():
        counts = Counter(row.source for row in part)
        where = ", ".join(f"{source} {n:,}" for source, n in counts.items())
        if part:
            table.add_row(name, f"{len(part):,}", where)
    return table


def _stage_table(settings: TrainConfig, on_gpu: TrainConfig, plans: list[StagePlan]) -> Table:
    table = entry.table("Stages", ["", *(plan.stage.value for plan in plans)])
    chained = settings.method is Method.dcr
    starts = {Stage.sft: "contrastive/" if chained else "the base model", Stage.readout: "sft/"}
    lines = {
        "starts from": [starts.get(plan.stage, "the base model") for plan in plans],
        "precision": [plan.precision.value for plan in plans],
        "epochs": [str(plan.epochs) for plan in plans],
        "rows a step": [f"{plan.batch_size:,}" for plan in plans],
        "steps an epoch": [f"{plan.steps_per_epoch:,}" for plan in plans],
        "steps in all": [f"{plan.steps:,}" for plan in plans],
        "of them warm-up": [f"{plan.warmup:,}" for plan in plans],
        "tokens an epoch": [f"{plan.load.unpadded:,}" for plan in plans],
        "padded": [f"{plan.load.trunk + plan.load.full:,}" for plan in plans],
        "computed here": [f"{plan.here.trunk + plan.here.full:,}" for plan in plans],
        "with a loss": [f"{plan.load.labelled:,}" for plan in plans],
    }
    for name, cells in lines.items():
        table.add_row(name, *cells)
    table.add_section()
    for name in plans[0].memory:
        table.add_row(f"memory: {name}", *(_bytes(plan.memory[name]) for plan in plans))
    table.add_row("memory at the peak", *(_bytes(sum(plan.memory.values())) for plan in plans))
    table.add_section()
    for name, times in _times(settings, on_gpu, plans).items():
        table.add_row(name, *times)
    return table


def _times(
    settings: TrainConfig, on_gpu: TrainConfig, plans: list[StagePlan]
) -> dict[str, list[str]]:
    """A row for the device at hand and one for a GPU, if that is another."""
    rows: dict[str, list[str]] = {}
    for plan in plans:
        here = cost.throughput(settings, plan.precision, plan.shape.width)
        node = on_gpu.dcr if plan.stage is Stage.contrastive else on_gpu.sft
        there = cost.published_throughput(cost.ASSUMED_GPU, node.precision)
        for rate in {here.device: here, there.device: there}.values():
            flops = plan.flops if rate is here else plan.padded_flops
            estimate = f"{duration(flops / rate.flops)} ({rate.basis})"
            rows.setdefault(f"time on {rate.device}", []).append(estimate)
    return rows


def _notes(settings: TrainConfig) -> list[str]:
    notes = ["memory and time are estimates, formulas in dcr/plan/cost.py; tokens are epoch 1's"]
    if not tokenizer_is_here(settings.model):
        notes.append(
            f"tokens: estimated at {CHARACTERS_PER_TOKEN} characters a token, since the tokenizer "
            "of this model is not on this machine"
        )
    world = settings.trainer.devices * settings.trainer.num_nodes
    if world > 1:
        notes.append(f"tokens, memory and time are those of one of {world} devices")
    for stage in stages_of(settings):
        if settings.run and Run(Path(settings.run)).done(stage.value):
            notes.append(f"{stage.value} is done in {settings.run} and would be skipped")
    return notes


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    """Seconds in a readable unit: `3.2 min`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "under 0.1 s"
