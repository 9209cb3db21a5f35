"""The plan of a training command, computed from architecture and rows: no weight is loaded.

Rows, batches and steps are those that training uses; parameters, memory and time come from
`dcr.plan.cost`. `train.py plan=true` and `python -m dcr.plan` print the same.
"""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from rich.table import Table

from dcr import entry
from dcr.balance import Balance
from dcr.core import data, machine
from dcr.core.config import Method, Precision, Stage, TrainConfig, stages_of
from dcr.core.data import Splits
from dcr.core.runs import Run
from dcr.plan import cost
from dcr.plan.cost import Load, Shape, stage_shape
from dcr.plan.rows import (
    CHARACTERS_PER_TOKEN,
    batches_of,
    chat_of,
    computed,
    expected,
    load_of,
    tokenizer_is_here,
)


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
    readout: "ReadoutPlan | None" = None  # behind SFT

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs


@dataclass(frozen=True)
class ReadoutPlan:
    """The plan of the readout."""

    prompts: int  # of both kinds, in batches
    batches: int
    prepared: int  # batches that steps take
    through_all: int  # tokens that pass all blocks, once
    through_last: int  # tokens that pass the last blocks, over all steps
    flops: float  # on the device at hand
    padded_flops: float


def describe(settings: TrainConfig) -> str:
    """The plan of a command, 100 columns wide.

    Raises UserError as training does before it loads weights.
    """
    chain = stages_of(settings)
    # the readout is counted behind SFT
    stages = [stage for stage in chain if stage is not Stage.readout] or [Stage.sft]
    on_gpu, _ = machine.of_training(
        replace(settings, trainer=replace(settings.trainer, accelerator="gpu"))
    )
    recorded = Run(Path(settings.run)).precisions() if settings.run else {}
    settings, arithmetic = machine.of_training(settings, recorded)
    notes = [f"precision: {arithmetic.told}", *([arithmetic.slow] if arithmetic.slow else [])]
    shapes = {stage: stage_shape(settings, stage) for stage in stages}
    if Stage.sft in chain:
        notes += cost.smaller_passes(settings, shapes[Stage.sft])
    drawn, told, more = expected(settings)
    plans = [stage_plan(settings, stage, shape, drawn) for stage, shape in shapes.items()]
    shown = [plan for plan in plans if plan.stage in chain]
    named = " then ".join(stage.value for stage in chain)
    return entry.plain_text(
        f"Plan: method={settings.method.value} ({named}) on {settings.model.name}\n",
        *([_parameter_table(shown)] if shown else []),
        _row_table(drawn),
        *([_balance_table(told)] if told else []),
        *([_stage_table(settings, on_gpu, shown)] if shown else []),
        *(_readout_table(settings, on_gpu, plans) if Stage.readout in chain else []),
        *_fit_table(on_gpu, shown),
        *(f"- {note}" for note in [*more, *notes, *_notes(settings, plans)]),
    )


def stage_plan(settings: TrainConfig, stage: Stage, shape: Shape, drawn: Splits) -> StagePlan:
    """The plan of one stage over these rows."""
    first = stage is Stage.contrastive
    node = settings.dcr if first else settings.sft
    batches, prefix = batches_of(settings, stage, drawn)
    load = load_of(settings, batches)
    packed = cost.packs(settings, stage)
    here = load_of(settings, batches, prefix) if packed else load
    phase = None
    if not first and settings.sft.readout.steps and drawn.readout_toxic:
        phase = readout_plan(settings, shape, drawn, prefix if packed else None)
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
        readout=phase,
    )


def readout_plan(
    settings: TrainConfig, shape: Shape, drawn: Splits, prefix: int | None
) -> ReadoutPlan:
    """The readout's batches, counted as `load_of` counts those of a stage."""
    chat, rows = chat_of(settings.model, drawn)
    found = data.readout_rows(chat, rows, settings.sft, settings.seed)
    once = [
        part[place] for part in (found.pairs, found.general) if part for place in {*found.steps}
    ]
    measured = [*found.watched, *found.ordinary]
    learnt = [part[place] for part in (found.pairs, found.general) if part for place in found.steps]

    def flops(prefix: int | None) -> tuple[int, int, float]:
        tokens = [
            sum(computed(rows, prefix) for rows in part) for part in (once + measured, learnt)
        ]
        places = sum(len(row.places) for rows in learnt for row in rows)
        held = sum(computed(rows, prefix) for rows in measured)
        spent = cost.readout_flops(settings, shape, tokens[0], tokens[1], held, places)
        return tokens[0], tokens[1], spent

    through_all, through_last, spent = flops(prefix)
    return ReadoutPlan(
        prompts=len(rows.readout_toxic) + len(rows.readout_seemingly_toxic),
        batches=len(found.pairs),
        prepared=len({*found.steps}),
        through_all=through_all,
        through_last=through_last,
        flops=spent,
        padded_flops=flops(None)[2],
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
    return "trained" if shape.trained[part] else "frozen"


def _row_table(drawn: Splits) -> Table:
    table = entry.table("Rows", ["list", "rows", "of source"])
    table.columns[2].justify = "left"
    for name, part in drawn.parts().items():
        counts = Counter(row.source for row in part)
        where = ", ".join(f"{source} {n:,}" for source, n in counts.items())
        if part:
            table.add_row(name, f"{len(part):,}", where)
    return table


def _balance_table(told: Balance) -> Table:
    table = entry.table("Stage one's pairs", ["what may stand in for intent", ""])
    for name, value in told.rows():
        table.add_row(name, value)
    return table


def _stage_table(settings: TrainConfig, on_gpu: TrainConfig, plans: list[StagePlan]) -> Table:
    table = entry.table("Stages", ["", *(plan.stage.value for plan in plans)])
    chained = settings.method is Method.dcr
    starts = {Stage.sft: "contrastive/" if chained else "the base model"}
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


def _fit_table(settings: TrainConfig, plans: list[StagePlan]) -> list[Table]:
    """The settings under which stage one fits on GPUs, unless it fits on the smallest as it is."""
    first = [plan for plan in plans if plan.stage is Stage.contrastive]
    by_settings = cost.memory_by_settings(settings, first[0].load) if first else {}
    if not by_settings or by_settings["as asked"][0] <= cost.CARDS[0][1] * 2**30:
        return []
    heads = [f"{devices}×{size} GB" for devices, size in cost.CARDS]
    table = entry.table("Stage one on GPUs: GB of each, where that fits", ["settings", *heads])
    for name, needs in by_settings.items():
        fits = [need <= size * 2**30 for need, (_, size) in zip(needs, cost.CARDS, strict=True)]
        cells = [_bytes(n) if fit else "-" for n, fit in zip(needs, fits, strict=True)]
        table.add_row(name, *cells)
    return [table]


def _times(
    settings: TrainConfig, on_gpu: TrainConfig, plans: list[StagePlan]
) -> dict[str, list[str]]:
    """A row for the device at hand and one for a GPU, if that is another."""
    rows: dict[str, list[str]] = {}
    for plan in plans:
        for name, cell in _time_of(settings, on_gpu, plan, plan).items():
            rows.setdefault(name, []).append(cell)
    return rows


def _time_of(
    settings: TrainConfig, on_gpu: TrainConfig, plan: StagePlan, part: StagePlan | ReadoutPlan
) -> dict[str, str]:
    here = cost.throughput(settings, plan.precision, plan.shape.width)
    node = on_gpu.dcr if plan.stage is Stage.contrastive else on_gpu.sft
    there = cost.published_throughput(cost.ASSUMED_GPU, node.precision)
    times: dict[str, str] = {}
    for rate in {here.device: here, there.device: there}.values():
        flops = part.flops if rate is here else part.padded_flops
        times[f"time on {rate.device}"] = f"{duration(flops / rate.flops)} ({rate.basis})"
    return times


def _readout_table(
    settings: TrainConfig, on_gpu: TrainConfig, plans: list[StagePlan]
) -> list[Table]:
    phase, found = settings.sft.readout, [(plan, plan.readout) for plan in plans if plan.readout]
    if not found:
        return []
    plan, of = found[0]
    assert of is not None
    table = entry.table("Readout, behind sft", ["", "readout"])
    for name, cell in {
        "prompts of both kinds": f"{of.prompts:,}",
        "prompts a step": f"{phase.batch_size:,}",
        "steps": f"{phase.steps:,}",
        "batches prepared": f"{of.prepared:,} of {of.batches:,}",
        "tokens through all blocks, once": f"{of.through_all:,}",
        f"tokens through the last {phase.blocks}": f"{of.through_last:,}",
        **_time_of(settings, on_gpu, plan, of),
    }.items():
        table.add_row(name, cell)
    return [table]


def _notes(settings: TrainConfig, plans: list[StagePlan]) -> list[str]:
    notes = ["memory and time are estimates, formulas in dcr/plan/cost.py; tokens are epoch 1's"]
    if not tokenizer_is_here(settings.model):
        notes.append(
            f"tokens: estimated at {CHARACTERS_PER_TOKEN} characters a token, since the tokenizer "
            "of this model is not on this machine"
        )
    world = settings.trainer.devices * settings.trainer.num_nodes
    if world > 1:
        notes.append(f"tokens, memory and time are those of one of {world} devices")
    if settings.sft.readout.steps and any(
        plan.stage is Stage.sft and plan.readout is None for plan in plans
    ):
        notes.append("sft.readout: its rows are on the hub, so that it is in no estimate")
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
