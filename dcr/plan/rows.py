"""The rows and tokens that a plan counts: read if that needs no network, else placeholders."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dcr import balance, stl_aug
from dcr.balance import Balance
from dcr.core import data, prompts, sources, storage
from dcr.core.config import (
    EMBEDDED_MODEL,
    TINY_MODEL,
    ConfigError,
    Kind,
    Method,
    ModelConfig,
    SourceConfig,
    Stage,
    TrainConfig,
)
from dcr.core.data import HELD_OUT_PAIRS, Splits, StageRows
from dcr.core.data.readout import Row
from dcr.core.prompts import IGNORED, ChatFormat, PairRow, PromptRow
from dcr.core.sources import SOURCES, Example
from dcr.plan import cost
from dcr.plan.cost import Load

CHARACTERS_PER_TOKEN = 4
# Mean characters of prompt and response in the paper's sources (Section 7.1), for unread rows.
CHARACTERS = {Kind.seemingly_toxic: (44, 0), Kind.toxic: (60, 360), Kind.normal: (80, 340)}
# One token a character, and as many control tokens around a turn as ChatML has.
COUNTING_TEMPLATE = (
    "{% for m in messages %}<|im_start|><|im_start|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><|im_start|>\n{% endif %}"
)


def expected(settings: TrainConfig) -> tuple[Splits, Balance | None, list[str]]:
    """The rows a run would draw, the balance of stage one's rows in form, and notes.

    The rows are read if that needs no network, else they are placeholders without a balance.
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
    """Placeholders for as many rows as `data.split` would draw if it dropped none."""
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
    """The readout's rows, if its sources are on this machine; none is dropped."""
    phase = settings.sft.readout
    names = [*phase.toxic, *phase.seemingly_toxic]
    if not phase.steps or any(name in SOURCES and SOURCES[name].hub for name in names):
        return {}
    read = data.split_readout(settings)
    return {name: rows for name, rows in read.parts().items() if name.startswith("readout")}


def _answers(settings: TrainConfig) -> list[Example]:
    """STL-aug's rows, which never come from the hub: a file's, or those of local sources."""
    node, named = settings.data.seemingly_toxic, settings.stl_aug.responses
    if named is not None:
        answers = stl_aug.read_answers(named, settings.data.root)
    else:
        answers = stl_aug.answered(_here(node.source, Kind.seemingly_toxic), settings.data)
    return answers * settings.stl_aug.repeat


def _here(names: Sequence[str], kind: Kind) -> list[Example]:
    """The rows of the sources that need no hub."""
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
    """The numbers of rows drawn and held out from a node's sources without those `taken` already.

    `unseen` is the share of template groups held out, counted as a share of the rows.
    """
    there = sum(_count(source, kind) for source in getattr(settings.data, name).source) - taken
    heldout = round(unseen * there)
    rest = there - heldout
    asked = "dcr.ratio" if name == "toxic" else f"data.{name}.count"
    if wanted is not None and wanted > rest and asked not in settings.at_most:
        raise ConfigError(f"data.{name}: {wanted} rows asked for, {rest} there; ask for fewer")
    drawn = rest if wanted is None else min(wanted, rest)
    return drawn, heldout or rest - drawn


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
    """Whether the tokenizer opens without the network and without a conversion of weights."""
    if config.name == EMBEDDED_MODEL:
        return (storage.cache_folder() / EMBEDDED_MODEL / "config.json").is_file()
    return config.name == TINY_MODEL or Path(config.name).is_dir()


def batches_of(settings: TrainConfig, stage: Stage, rows: Splits) -> tuple[StageRows, int]:
    """A stage's rows in order, and the number of template tokens that all of them begin with.

    The rows are training's own, or have a token for every four characters.
    """
    if stage is Stage.contrastive and not _anchored(settings):
        rows = replace(rows, normal=[])  # training tokenises them but uses none
    chat, rows = chat_of(settings.model, rows)
    batches = StageRows(stage, rows, chat, settings)
    batches.world = settings.trainer.devices * settings.trainer.num_nodes
    alike = [a == b for a, b in zip(*map(chat.prompt_ids, ("A", "b")), strict=False)]
    return batches, alike.index(False)


def chat_of(config: ModelConfig, rows: Splits) -> tuple[ChatFormat, Splits]:
    """The model's chat format and the rows, or a format and shortened rows for counting."""
    from dcr.core import models

    if tokenizer_is_here(config):
        tiny = config.name == TINY_MODEL  # its folder would be made with weights
        tokenizer = models.byte_tokenizer() if tiny else models.open_tokenizer(config)
        return prompts.chat_format(tokenizer, config), rows
    system = _short(config.system_prompt) if config.system_prompt else None
    counted = ModelConfig(name=config.name, system_prompt=system)
    return prompts.chat_format(models.byte_tokenizer(COUNTING_TEMPLATE), counted), _shortened(rows)


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
    """Whether stage one's NLL is on general pairs, in a pass of their own."""
    return settings.dcr.nll.source.value == "general" and settings.dcr.nll.weight > 0


def load_of(settings: TrainConfig, batches: StageRows, prefix: int | None = None) -> Load:
    """The tokens of rank 0's first epoch, counted on training's own batches.

    Passes are padded without a `prefix`. With one they are packed, and rows share so many first
    tokens unless LoRA's dropout is on (`dcr.fast.packing`).
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
        trunk=sum(computed(rows, shared) for rows in trunk),
        full=sum(computed(rows, shared) for rows in full),
        unpadded=sum(len(row.ids) for rows in [*trunk, *full] for row in rows),
        labelled=sum(
            target != IGNORED
            for rows in full
            for row in rows
            for target in (row.targets if isinstance(row, PairRow) else row.nll)
        ),
        largest_trunk=max((computed(rows, shared) for rows in trunk), default=0),
        largest_full=max((computed(rows, shared) for rows in full), default=0),
        heldout=sum(computed(rows, prefix) for rows in batches.heldout_passes()),
    )


def computed(rows: Sequence[PromptRow | PairRow | Row], prefix: int | None) -> int:
    """The tokens of one forward pass, padded or with a prefix computed once."""
    lengths = [len(row.ids) for row in rows]
    if prefix is None:
        return len(rows) * max(lengths)
    return sum(lengths) - (len(rows) - 1) * min(prefix, min(lengths) - 1)
