"""What a training command would do, read from architecture and rows: no weight is loaded.

Rows, batches and steps are those that training uses, parameters, memory and time come from
`dcr.cost`. `train.py plan=true` and `python -m dcr.plan` print the same.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rich.table import Table

from dcr import blueprint, cost, tokens
from dcr.core import balance, cli, config, data, precision, prompts, sources
from dcr.core.balance import Balance
from dcr.core.config import (
    EMBEDDED_MODEL,
    TINY_MODEL,
    ConfigError,
    Kind,
    Method,
    ModelConfig,
    Precision,
    SourceConfig,
    Stage,
    TrainConfig,
    stages_of,
)
from dcr.core.data import HELD_OUT_PAIRS, Splits, StageRows
from dcr.core.data.readout import Row
from dcr.core.prompts import IGNORED, ChatFormat, PairRow, PromptRow
from dcr.core.runs import Run
from dcr.core.sources import SOURCES, Example
from dcr.cost import Load, Shape, stage_shape

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

CHARACTERS_PER_TOKEN = 4
# Mean characters of prompt and response in the paper's sources (Section 7.1), for unread rows.
CHARACTERS = {Kind.seemingly_toxic: (44, 0), Kind.toxic: (60, 360), Kind.normal: (80, 340)}
# One token a character, and as many control tokens around a turn as ChatML has.
COUNTING_TEMPLATE = (
    "{% for m in messages %}<|im_start|><|im_start|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><|im_start|>\n{% endif %}"
)


@dataclass
class Options:
    """python -m dcr.plan [any setting of train.py]

    Says what a training command would do, without loading a weight: rows, parameters, steps, and
    estimates of memory and time. The same as train.py plan=true.
    """

    settings: list[str] = cli.option(
        "any setting of train.py; python train.py --cfg job lists them", [], rest=True
    )


@cli.command(Options)
def main(options: Options) -> None:
    print(describe(config.resolve(cli.compose("train", options.settings, Options), TrainConfig)))


@dataclass(frozen=True)
class StagePlan:
    """What one stage would do, on one rank where ranks share the work."""

    stage: Stage
    precision: Precision
    shape: Shape
    load: Load  # of padded passes, as on a GPU
    here: Load  # on the device at hand
    epochs: int
    batch_size: int
    steps_per_epoch: int  # optimiser steps
    warmup: int  # of them
    memory: dict[str, float]  # bytes, on the device at hand
    flops: float  # of all epochs, there
    padded_flops: float
    readout: "ReadoutPlan | None" = None  # behind SFT

    @property
    def steps(self) -> int:
        return self.steps_per_epoch * self.epochs


@dataclass(frozen=True)
class ReadoutPlan:
    """What the readout would do, in tokens unless said otherwise."""

    prompts: int  # of both kinds, in batches
    batches: int
    prepared: int  # batches that steps take
    through_all: int  # tokens that pass all blocks, once
    through_last: int  # tokens that pass the last blocks, over all steps
    flops: float  # on the device at hand
    padded_flops: float


def describe(settings: TrainConfig) -> str:
    """The plan of a command, 100 columns wide.

    Raises UserError for whatever training would refuse before it loads weights.
    """
    stages = stages_of(settings.method, settings.stage)
    on_gpu, _ = precision.of_training(
        replace(settings, trainer=replace(settings.trainer, accelerator="gpu"))
    )
    recorded = Run(Path(settings.run)).precisions() if settings.run else {}
    settings, arithmetic = precision.of_training(settings, recorded)
    notes = [f"precision: {arithmetic.told}", *([arithmetic.slow] if arithmetic.slow else [])]
    shapes = {stage: stage_shape(settings, stage) for stage in stages}
    if Stage.sft in stages:
        notes += cost.smaller_passes(settings, shapes[Stage.sft])
    drawn, told, more = expected(settings)
    plans = [stage_plan(settings, stage, shape, drawn) for stage, shape in shapes.items()]
    chain = " then ".join(plan.stage.value for plan in plans)
    return cli.plain_text(
        f"Plan: method={settings.method.value} ({chain}) on {settings.model.name}\n",
        _parameter_table(plans),
        _row_table(drawn),
        *([_balance_table(told)] if told else []),
        _stage_table(settings, on_gpu, plans),
        *_readout_table(settings, on_gpu, plans),
        *_fit_table(on_gpu, plans),
        *(f"- {note}" for note in [*more, *notes, *_notes(settings, plans)]),
    )


def stage_plan(settings: TrainConfig, stage: Stage, shape: Shape, drawn: Splits) -> StagePlan:
    """Everything known of one stage."""
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
            sum(_computed(rows, prefix) for rows in part) for part in (once + measured, learnt)
        ]
        places = sum(len(row.places) for rows in learnt for row in rows)
        held = sum(_computed(rows, prefix) for rows in measured)
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
    table = cli.table("Parameters", ["part", "count", *(plan.stage.value for plan in plans)])
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
    table = cli.table("Rows", ["list", "rows", "of source"])
    table.columns[2].justify = "left"
    for name, part in drawn.parts().items():
        counts = Counter(row.source for row in part)
        where = ", ".join(f"{source} {n:,}" for source, n in counts.items())
        if part:
            table.add_row(name, f"{len(part):,}", where)
    return table


def _balance_table(told: Balance) -> Table:
    table = cli.table("Stage one's pairs", ["what may stand in for intent", ""])
    for name, value in told.rows():
        table.add_row(name, value)
    return table


def _stage_table(settings: TrainConfig, on_gpu: TrainConfig, plans: list[StagePlan]) -> Table:
    table = cli.table("Stages", ["", *(plan.stage.value for plan in plans)])
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
    """What makes stage one fit on which GPUs, where it does not fit on the smallest as it is."""
    first = [plan for plan in plans if plan.stage is Stage.contrastive]
    found = cost.ways(settings, first[0].load) if first else []
    if not found or found[0].alone <= cost.CARDS[0][1] * 2**30:
        return []
    heads = [f"{devices}×{size} GB" for devices, size in cost.CARDS]
    table = cli.table("Stage one on GPUs: GB of each, where that fits", ["settings", *heads])
    for way in found:
        needs = [way.alone if devices == 1 else way.of_eight for devices, _ in cost.CARDS]
        cells = [
            _bytes(need) if need <= size * 2**30 else "-"
            for need, (_, size) in zip(needs, cost.CARDS, strict=True)
        ]
        table.add_row(way.settings, *cells)
    return [table]


def _times(
    settings: TrainConfig, on_gpu: TrainConfig, plans: list[StagePlan]
) -> dict[str, list[str]]:
    """A row for the device at hand and one for a GPU, where that is another."""
    rows: dict[str, list[str]] = {}
    for plan in plans:
        for name, cell in _time_of(settings, on_gpu, plan, plan).items():
            rows.setdefault(name, []).append(cell)
    return rows


def _time_of(
    settings: TrainConfig, on_gpu: TrainConfig, plan: StagePlan, of: StagePlan | ReadoutPlan
) -> dict[str, str]:
    here = cost.throughput(settings, plan.precision, plan.shape.width)
    node = on_gpu.dcr if plan.stage is Stage.contrastive else on_gpu.sft
    there = cost.published(cost.ASSUMED_GPU, node.precision)
    found: dict[str, str] = {}
    for rate in {here.device: here, there.device: there}.values():
        flops = of.flops if rate is here else of.padded_flops
        found[f"time on {rate.device}"] = f"{duration(flops / rate.flops)} ({rate.basis})"
    return found


def _readout_table(
    settings: TrainConfig, on_gpu: TrainConfig, plans: list[StagePlan]
) -> list[Table]:
    phase, found = settings.sft.readout, [(plan, plan.readout) for plan in plans if plan.readout]
    if not found:
        return []
    plan, of = found[0]
    assert of is not None
    table = cli.table("Readout, behind sft", ["", "readout"])
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
    notes = ["memory and time are estimates, formulas in dcr/cost.py; tokens are epoch 1's"]
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
    for plan in plans:
        if settings.run and Run(Path(settings.run)).done(plan.stage.value):
            notes.append(f"{plan.stage.value} is done in {settings.run} and would be skipped")
    return notes


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.2f} MB"


def duration(seconds: float) -> str:
    """As a plan tells it: `3.2 min`."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s" if seconds >= 0.1 else "under 0.1 s"


# --- rows ---


def expected(settings: TrainConfig) -> tuple[Splits, Balance | None, list[str]]:
    """The rows a run would draw, read where that needs no network, else placeholders; how those of
    stage one that were read differ in form; and notes.

    Raises UserError for data that training would refuse.
    """
    if settings.data.root is None and _need_the_hub(settings):
        return (
            _placeholders(settings),
            None,
            [
                "rows: from the table of sources, not read (a plan leaves the hub alone): none "
                "dropped, each of its source's mean length, so padding is understated"
            ],
        )
    rows = data.rows_of(settings)
    told, notes = balance.balance(rows.seemingly_toxic, rows.toxic), rows.told()
    return rows, told, [*notes, told.warning] if told and told.warning else notes


def _need_the_hub(settings: TrainConfig) -> bool:
    node = settings.data
    read = [node.safety, node.normal]
    read += [node.seemingly_toxic, node.toxic] if settings.method is Method.dcr else []
    names = [name for part in read for name in part.source]
    names += [*node.evaluation.over_refusal, *node.evaluation.safety]
    if (phase := settings.sft.readout).steps:
        names += [*phase.toxic, *phase.seemingly_toxic]
    return any(name in SOURCES and SOURCES[name].embedded is None for name in names)


# --- rows that were not read --------------------------------------------------------------------


def _placeholders(settings: TrainConfig) -> Splits:
    """As many rows as `data.split` would draw if it dropped none."""
    node, share = settings.data, settings.data.validation
    refusals, refusals_left = _drawn(settings, "safety", Kind.toxic, node.safety.count)
    normal, normal_left = _drawn(settings, "normal", Kind.normal, node.normal.count)
    safe, safe_left, toxic, toxic_left = 0, 0, 0, 0
    if settings.method is Method.dcr:
        kind, unseen = Kind.seemingly_toxic, node.group_holdout
        safe, safe_left = _drawn(settings, kind.value, kind, node.seemingly_toxic.count, 0, unseen)
        wanted = None if settings.dcr.ratio is None else round(settings.dcr.ratio * safe)
        taken = refusals if set(node.toxic.source) & set(node.safety.source) else 0
        toxic, toxic_left = _drawn(settings, "toxic", Kind.toxic, wanted, taken, unseen)
    return Splits(
        seemingly_toxic=_rows(Kind.seemingly_toxic, node.seemingly_toxic, safe),
        toxic=_rows(Kind.toxic, node.toxic, toxic),
        seemingly_toxic_heldout=_rows(
            Kind.seemingly_toxic, node.seemingly_toxic, min(safe_left, HELD_OUT_PAIRS)
        ),
        toxic_heldout=_rows(Kind.toxic, node.toxic, min(toxic_left, HELD_OUT_PAIRS)),
        normal=_rows(Kind.normal, node.normal, normal),
        refusals=_rows(Kind.toxic, node.safety, refusals),
        normal_heldout=_rows(Kind.normal, node.normal, min(normal_left, round(share * normal))),
        refusals_heldout=_rows(
            Kind.toxic, node.safety, min(refusals_left, round(share * refusals))
        ),
        augmented=_answers(settings) if settings.method is Method.stl_aug else [],
        **_readout_rows(settings),
    )


def _readout_rows(settings: TrainConfig) -> dict[str, Any]:
    """The readout's rows where its sources are here, none of them dropped."""
    phase = settings.sft.readout
    names = [*phase.toxic, *phase.seemingly_toxic]
    if not phase.steps or any(name in SOURCES and SOURCES[name].hub for name in names):
        return {}
    read = data.split_readout(settings)
    return {name: rows for name, rows in read.parts().items() if name.startswith("readout")}


def _answers(settings: TrainConfig) -> list[Example]:
    """STL-aug's rows, which never come from the hub: a file's, or those that sources here bring."""
    node, named = settings.data.seemingly_toxic, settings.stl_aug.responses
    if named is not None:
        answers = data.read_answers(named, settings.data.root)
    else:
        answers = data.answered(_here(node.source, Kind.seemingly_toxic), settings.data)
    return answers * settings.stl_aug.repeat


def _here(names: Sequence[str], kind: Kind) -> list[Example]:
    """The rows of those sources that reading needs no hub for."""
    here = [name for name in names if name not in SOURCES or not SOURCES[name].hub]
    return [row for name in here for row in sources.read(name, kind=kind)]


def _drawn(
    settings: TrainConfig,
    name: str,
    kind: Kind,
    wanted: int | None,
    taken: int = 0,
    unseen: float = 0.0,
) -> tuple[int, int]:
    """Rows drawn and held out, of a node's sources without those `taken` already.

    `unseen` is the share of template groups held out, taken for a share of the rows.
    """
    there = sum(_count(source, kind) for source in getattr(settings.data, name).source) - taken
    heldout = round(unseen * there)
    left = there - heldout
    asked = "dcr.ratio" if name == "toxic" else f"data.{name}.count"
    if wanted is not None and wanted > left and asked not in settings.at_most:
        raise ConfigError(f"data.{name}: {wanted} rows asked for, {left} there; ask for fewer")
    drawn = left if wanted is None else min(wanted, left)
    return drawn, heldout or left - drawn


def _count(name: str, kind: Kind) -> int:
    hub = SOURCES[name].hub if name in SOURCES else None
    return len(sources.read(name, kind=kind)) if hub is None else hub.rows


def _rows(kind: Kind, node: SourceConfig, count: int) -> list[Example]:
    prompt, response = CHARACTERS[kind]
    source = " + ".join(node.source)
    return [
        Example(f"{source}-{i}", "x" * prompt, kind, source, "x" * response or None)
        for i in range(count)
    ]


# --- tokens -------------------------------------------------------------------------------------


def tokenizer_is_here(config: ModelConfig) -> bool:
    """Whether opening it needs neither the network nor a conversion of weights."""
    if config.name == EMBEDDED_MODEL:
        return blueprint.folder_of(config) is not None
    return config.name == TINY_MODEL or Path(config.name).is_dir()


def batches_of(settings: TrainConfig, stage: Stage, rows: Splits) -> tuple[StageRows, int]:
    """A stage's rows in order, and how many tokens the chat template begins all of them with.

    They are training's own, or with a token counted as four characters.
    """
    if stage is Stage.contrastive and not _anchored(settings):
        rows = replace(rows, normal=[])  # training tokenises them and looks at none
    chat, rows = chat_of(settings.model, rows)
    batches = StageRows(stage, rows, chat, settings)
    batches.world = settings.trainer.devices * settings.trainer.num_nodes
    alike = [a == b for a, b in zip(*map(chat.prompt_ids, ("A", "b")), strict=False)]
    return batches, alike.index(False)


def chat_of(config: ModelConfig, rows: Splits) -> tuple[ChatFormat, Splits]:
    """How the model is spoken to, and the rows; or a format that counts, and rows as short."""
    if tokenizer_is_here(config):
        return prompts.chat_format(_tokenizer(config), config), rows
    return _counting_format(config), _shortened(rows)


def _tokenizer(config: ModelConfig) -> Tokenizer:
    """Read from its files where that is the same, which saves the seconds of transformers."""
    known, folder = blueprint.read(config), blueprint.folder_of(config)
    if config.name == TINY_MODEL:
        read = tokens.byte_level()
    else:
        read = tokens.read(folder) if folder else None
    ours = config.template is None or config.template in prompts.TEMPLATES
    if read is not None and known is not None and ours and len(read) <= known.vocabulary:
        return cast(Tokenizer, read)
    from dcr.core import models

    return models.open_tokenizer(config)


def _counting_format(config: ModelConfig) -> ChatFormat:
    system = _short(config.system_prompt) if config.system_prompt else None
    counted = ModelConfig(name=config.name, system_prompt=system)
    return prompts.chat_format(cast(Tokenizer, tokens.byte_level(COUNTING_TEMPLATE)), counted)


def _shortened(rows: Splits) -> Splits:
    parts: dict[str, Any] = {
        name: [
            replace(row, prompt=_short(row.prompt), response=_short(row.response or "") or None)
            for row in part
        ]
        for name, part in rows.parts().items()
    }
    return replace(rows, **parts)


def _short(text: str) -> str:
    return "x" * math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def _anchored(settings: TrainConfig) -> bool:
    """Whether stage one's NLL is that of general pairs, in a pass of their own."""
    return settings.dcr.nll.source.value == "general" and settings.dcr.nll.weight > 0


def load_of(settings: TrainConfig, batches: StageRows, prefix: int | None = None) -> Load:
    """Tokens of rank 0's first epoch, counted on the batches that training would see.

    Of padded passes, or of packed ones whose rows begin with a `prefix` of so many tokens, which
    they share but where LoRA's dropout is on (`dcr.core.models.packing`).
    """
    nll, lora = settings.dcr.nll, cost.lora_of(settings, batches.stage)
    shared = 0 if prefix and lora and lora.dropout else prefix
    short = _anchored(settings) or nll.weight == 0
    trunk: list[Sequence[PromptRow]] = []
    full: list[Sequence[PromptRow | PairRow]] = []
    for places in batches.sampler:
        if batches.stage is Stage.sft:
            full += batches.sft_step([batches.pairs[place] for place in places])
            continue
        rows, general = batches.contrastive_step([batches.prompts[place] for place in places])
        (trunk if short else full).append(rows)
        full += [general] if general else []
    return Load(
        trunk=sum(_computed(rows, shared) for rows in trunk),
        full=sum(_computed(rows, shared) for rows in full),
        unpadded=sum(len(row.ids) for rows in [*trunk, *full] for row in rows),
        labelled=sum(
            target != IGNORED
            for rows in full
            for row in rows
            for target in (row.targets if isinstance(row, PairRow) else row.nll)
        ),
        largest_trunk=max((_computed(rows, shared) for rows in trunk), default=0),
        largest_full=max((_computed(rows, shared) for rows in full), default=0),
        heldout=sum(_computed(rows, prefix) for rows in batches.heldout_passes()),
    )


def _computed(rows: Sequence[PromptRow | PairRow | Row], prefix: int | None) -> int:
    """Tokens of one forward pass, padded or with a prefix computed once."""
    lengths = [len(row.ids) for row in rows]
    if prefix is None:
        return len(rows) * max(lengths)
    return sum(lengths) - (len(rows) - 1) * min(prefix, min(lengths) - 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
