"""The plan as a person reads it."""

import io
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from dcr.config import Method, Precision, Stage, TrainConfig, stages_of
from dcr.data import Splits
from dcr.plan import cost, rows
from dcr.plan.rows import CHARACTERS_PER_TOKEN, Load
from dcr.plan.shape import Shape, stage_shape
from dcr.runs import Run

COLUMNS = 100


@dataclass(frozen=True)
class StagePlan:
    """What one stage would do, on one rank where ranks share the work."""

    stage: Stage
    precision: Precision
    shape: Shape
    load: Load
    epochs: int
    batch_size: int
    steps_per_epoch: int  # optimiser steps
    warmup: int  # of them
    memory: dict[str, float]  # bytes
    flops: float  # of all epochs

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs


def describe(settings: TrainConfig) -> str:
    """The plan of a command, 100 columns wide.

    Raises UserError for whatever training would refuse before it loads weights.
    """
    stages = stages_of(settings.method, settings.stage)
    shapes = {stage: stage_shape(settings, stage) for stage in stages}
    drawn, notes = rows.expected(settings)
    plans = [stage_plan(settings, stage, shape, drawn) for stage, shape in shapes.items()]
    chain = " then ".join(plan.stage.value for plan in plans)
    out = io.StringIO()
    console = Console(file=out, width=COLUMNS, color_system=None, highlight=False)
    console.print(f"Plan: method={settings.method.value} ({chain}) on {settings.model.name}\n")
    console.print(_parameter_table(plans), _row_table(drawn), _stage_table(settings, plans))
    for note in [*notes, *_notes(settings, plans)]:
        console.print(f"- {note}", markup=False)
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def stage_plan(settings: TrainConfig, stage: Stage, shape: Shape, drawn: Splits) -> StagePlan:
    """Everything known of one stage."""
    first = stage is Stage.contrastive
    node = settings.dcr if first else settings.sft
    batches = rows.batches_of(settings, stage, drawn)
    load = rows.load(settings, batches)
    return StagePlan(
        stage=stage,
        precision=node.precision,
        shape=shape,
        load=load,
        epochs=node.epochs,
        batch_size=node.batch_size,
        steps_per_epoch=batches.steps_per_epoch,
        warmup=0 if first else round(settings.sft.warmup * batches.steps_per_epoch * node.epochs),
        memory=cost.memory(settings, stage, shape, load),
        flops=node.epochs * cost.epoch_flops(settings, stage, shape, load),
    )


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    return table


def _parameter_table(plans: list[StagePlan]) -> Table:
    table = _table("Parameters", ["part", "count", *(plan.stage.value for plan in plans)])
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
    return "trained" if shape.trained[part] else "frozen"


def _row_table(drawn: Splits) -> Table:
    table = _table("Rows", ["list", "rows", "of source"])
    table.columns[2].justify = "left"
    for name, part in drawn.parts().items():
        counts = Counter(row.source for row in part)
        where = ", ".join(f"{source} {n:,}" for source, n in counts.items())
        if part:
            table.add_row(name, f"{len(part):,}", where)
    return table


def _stage_table(settings: TrainConfig, plans: list[StagePlan]) -> Table:
    table = _table("Stages", ["", *(plan.stage.value for plan in plans)])
    lines = {
        "starts from": [_start(settings, plan.stage) for plan in plans],
        "precision": [plan.precision.value for plan in plans],
        "epochs": [str(plan.epochs) for plan in plans],
        "rows a step": [f"{plan.batch_size:,}" for plan in plans],
        "steps an epoch": [f"{plan.steps_per_epoch:,}" for plan in plans],
        "steps in all": [f"{plan.steps:,}" for plan in plans],
        "of them warm-up": [f"{plan.warmup:,}" for plan in plans],
        "tokens an epoch": [f"{plan.load.unpadded:,}" for plan in plans],
        "padded": [f"{plan.load.trunk + plan.load.full:,}" for plan in plans],
        "with a loss": [f"{plan.load.labelled:,}" for plan in plans],
    }
    for name, cells in lines.items():
        table.add_row(name, *cells)
    table.add_section()
    for name in plans[0].memory:
        table.add_row(f"memory: {name}", *(_bytes(plan.memory[name]) for plan in plans))
    table.add_row("memory at the peak", *(_bytes(sum(plan.memory.values())) for plan in plans))
    table.add_section()
    for name, times in _times(settings, plans).items():
        table.add_row(name, *times)
    return table


def _start(settings: TrainConfig, stage: Stage) -> str:
    second = stage is Stage.sft and settings.method is Method.dcr
    return "contrastive/" if second else "the base model"


def _times(settings: TrainConfig, plans: list[StagePlan]) -> dict[str, list[str]]:
    """A row for the device at hand and one for a GPU, where that is another."""
    found: dict[str, list[str]] = {}
    for plan in plans:
        here = cost.throughput(settings, plan.precision, plan.shape.width)
        there = cost.published(cost.ASSUMED_GPU, plan.precision)
        for rate in {here.device: here, there.device: there}.values():
            cell = f"{_time(plan.flops / rate.flops)} ({rate.basis})"
            found.setdefault(f"time on {rate.device}", []).append(cell)
    return found


def _notes(settings: TrainConfig, plans: list[StagePlan]) -> list[str]:
    notes = ["memory and time are estimates, formulas in dcr/plan/cost.py; tokens are epoch 1's"]
    if not rows.tokenizer_is_here(settings.model):
        notes.append(
            f"tokens: estimated at {CHARACTERS_PER_TOKEN} characters a token, since the tokenizer "
            "of this model is not on this machine"
        )
    world = settings.trainer.devices * settings.trainer.num_nodes
    if world > 1:
        notes.append(f"tokens, memory and time are those of one of {world} devices")
    for plan in plans:
        if settings.run and Run(Path(settings.run)).done(plan.stage.value):
            notes.append(f"{plan.stage.value} is done in {settings.run} and would be skipped")
    return notes


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "under 0.1 s"
