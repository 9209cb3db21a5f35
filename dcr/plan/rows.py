"""The rows and batches a command would train on, counted offline."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dcr import data, models, prompts, refusal, sources
from dcr.config import (
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
from dcr.data import HELD_OUT_PAIRS, PairBatch, PromptBatch, SafetyData, Splits
from dcr.prompts import IGNORED, ChatFormat
from dcr.sources import SOURCES, Example

CHARACTERS_PER_TOKEN = 4
# Mean characters of prompt and response in the paper's sources (Section 7.1), for unread rows.
CHARACTERS = {Kind.seemingly_toxic: (44, 0), Kind.toxic: (60, 360), Kind.normal: (80, 340)}
# One token a character, and as many control tokens around a turn as ChatML has.
COUNTING_TEMPLATE = (
    "{% for m in messages %}<|im_start|><|im_start|>\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><|im_start|>\n{% endif %}"
)


@dataclass(frozen=True)
class Load:
    """One rank's first epoch, in padded tokens unless said otherwise."""

    trunk: int  # passes that end at block ℓ
    full: int  # passes through every block
    unpadded: int  # of both
    labelled: int  # tokens with a next-token loss
    largest_trunk: int  # in one pass
    largest_full: int
    heldout: int


def expected(settings: TrainConfig) -> tuple[Splits, list[str]]:
    """The rows a run would draw, read where that needs no network, else placeholders; and notes.

    Raises UserError for data that training would refuse.
    """
    contrastive = settings.method is Method.dcr
    if settings.data.root is None and _need_the_hub(settings):
        return _placeholders(settings), [
            "rows: from the table of sources, not read (a plan leaves the hub alone): none "
            "dropped, each of its source's mean length, so padding is understated"
        ]
    augment = settings.stl_aug if settings.method is Method.stl_aug else None
    rows = data.split(
        settings.data, settings.dcr.ratio, settings.seed, contrastive, refusal.is_refusal, augment
    )
    notes = [f"dropped {count} rows of {reason}" for reason, count in rows.dropped.items()]
    warning = data.warn_of_forms(rows) if contrastive else None
    return rows, [*notes, warning] if warning else notes


def _need_the_hub(settings: TrainConfig) -> bool:
    node = settings.data
    read = [node.safety, node.normal]
    read += [node.seemingly_toxic, node.toxic] if settings.method is Method.dcr else []
    names = [name for part in read for name in part.source]
    names += [*node.evaluation.over_refusal, *node.evaluation.safety]
    return any(name in SOURCES and SOURCES[name].embedded is None for name in names)


# --- rows that were not read --------------------------------------------------------------------


def _placeholders(settings: TrainConfig) -> Splits:
    """As many rows as `data.split` would draw if it dropped none."""
    node, share = settings.data, settings.data.validation
    refusals, refusals_left = _drawn("safety", Kind.toxic, node.safety, node.safety.count)
    normal, normal_left = _drawn("normal", Kind.normal, node.normal, node.normal.count)
    safe, safe_left, toxic, toxic_left = 0, 0, 0, 0
    if settings.method is Method.dcr:
        asked, unseen = node.seemingly_toxic, node.group_holdout
        safe, safe_left = _drawn(
            "seemingly_toxic", Kind.seemingly_toxic, asked, asked.count, unseen=unseen
        )
        wanted = None if settings.dcr.ratio is None else round(settings.dcr.ratio * safe)
        taken = refusals if set(node.toxic.source) & set(node.safety.source) else 0
        toxic, toxic_left = _drawn("toxic", Kind.toxic, node.toxic, wanted, taken, unseen)
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
    )


def _answers(settings: TrainConfig) -> list[Example]:
    """STL-aug's rows, which never come from the hub: a file's, or those that sources here bring."""
    node, named = settings.data.seemingly_toxic, settings.stl_aug.responses
    if named is not None:
        found = data.read_answers(named, settings.data.root, refusal.is_refusal)
    else:
        here = [name for name in node.source if not _on_the_hub(name)]
        rows = [row for name in here for row in sources.read(name, kind=Kind.seemingly_toxic)]
        found = data.answered(rows, settings.data, refusal.is_refusal)
    return found * settings.stl_aug.repeat


def _drawn(
    name: str,
    kind: Kind,
    node: SourceConfig,
    wanted: int | None,
    taken: int = 0,
    unseen: float = 0.0,
) -> tuple[int, int]:
    """Rows drawn and held out, of a node's sources without those `taken` already.

    `unseen` is the share of template groups held out, taken for a share of the rows.
    """
    there = sum(_count(source, kind) for source in node.source) - taken
    heldout = round(unseen * there)
    left = there - heldout
    if wanted is not None and wanted > left:
        raise ConfigError(f"data.{name}: {wanted} rows asked for, {left} there; ask for fewer")
    drawn = left if wanted is None else wanted
    return drawn, heldout or left - drawn


def _count(name: str, kind: Kind) -> int:
    hub = SOURCES[name].hub if name in SOURCES else None
    return len(sources.read(name, kind=kind)) if hub is None else hub.rows


def _on_the_hub(name: str) -> bool:
    """Not the user's file, nor of the embedded corpus."""
    return name in SOURCES and SOURCES[name].hub is not None


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
        return (models.cache_folder() / EMBEDDED_MODEL / "config.json").is_file()
    return config.name == TINY_MODEL or Path(config.name).is_dir()


def batches_of(settings: TrainConfig, stage: Stage, rows: Splits) -> SafetyData:
    """The DataModule of a stage: training's own, or with a token counted as four characters."""
    if stage is Stage.contrastive and not _anchored(settings):
        rows = replace(rows, normal=[])  # training tokenises them and looks at none
    if tokenizer_is_here(settings.model):
        chat = prompts.chat_format(models.open_tokenizer(settings.model), settings.model)
    else:
        chat, rows = _counting_format(settings.model), _shortened(rows)
    batches = SafetyData(stage, rows, chat, settings.dcr, settings.sft, settings.seed)
    batches.world = settings.trainer.devices * settings.trainer.num_nodes
    return batches


def _counting_format(config: ModelConfig) -> ChatFormat:
    system = _short(config.system_prompt) if config.system_prompt else None
    counted = ModelConfig(name=config.name, system_prompt=system)
    return prompts.chat_format(models.byte_tokenizer(COUNTING_TEMPLATE), counted)


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


def load(settings: TrainConfig, batches: SafetyData) -> Load:
    """Tokens of rank 0's first epoch, counted on the batches that training would see."""
    nll = settings.dcr.nll
    short = _anchored(settings) or nll.weight == 0
    trunk: list[PromptBatch | PairBatch] = []
    full: list[PromptBatch | PairBatch] = []
    for batch in batches.train_dataloader():
        if isinstance(batch, list):  # one step of SFT
            full += batch
            continue
        (trunk if short else full).append(batch)
        full += [batch.general] if batch.general else []
    return Load(
        trunk=sum(batch.ids.numel() for batch in trunk),
        full=sum(batch.ids.numel() for batch in full),
        unpadded=sum(int(batch.mask.sum()) for batch in [*trunk, *full]),
        labelled=sum(int((batch.targets != IGNORED).sum()) for batch in full),
        largest_trunk=max((batch.ids.numel() for batch in trunk), default=0),
        largest_full=max((batch.ids.numel() for batch in full), default=0),
        heldout=sum(batch.ids.numel() for batch in batches.val_dataloader()),  # pyright: ignore
    )
