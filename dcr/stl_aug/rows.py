"""The rows that STL-aug adds to SFT's: compliant answers to seemingly toxic prompts."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dcr import keywords
from dcr.core import sources
from dcr.core.config import ConfigError, DataConfig, DataError, Kind, is_path
from dcr.core.config.training import TrainConfig
from dcr.core.data import Cleaning, Splits, split_by_group, without
from dcr.core.sources import Example
from dcr.overlaps import overlaps
from dcr.public import SOURCES
from dcr.stl_aug import AugmentConfig


def added(settings: TrainConfig, rows: Splits, cleaning: Cleaning) -> Splits:
    """The rows of SFT and `augmented`, which are the answers `stl_aug.repeat` times.

    The answers come from the file, all of them, or with the very prompts that stage one would draw.
    Evaluation sets that hold such a prompt become in-distribution. Raises ConfigError where no
    answer is left, and DataError for an answer of the file that refuses.
    """
    config, node = cleaning.config, settings.node(AugmentConfig)
    named = node.responses
    if named is None:
        answers = cleaning.clean("seemingly_toxic", Kind.seemingly_toxic)
    else:
        answers = read_answers(named, config.root)
        # the prompts of these sets are answered by design
        exempt = cleaning.holding([named, *config.seemingly_toxic.source])
        for source in config.seemingly_toxic.source:
            exempt |= cleaning.contrasts(source)
        answers = cleaning.apart_from_evaluation("augmented", answers, exempt)
        answers = cleaning.once("augmented", answers)
    answers, unseen = split_by_group(answers, config.group_holdout, cleaning.seed)
    if named is None:
        count = config.seemingly_toxic.count
        answers, _ = cleaning.draw(answers, count, "data.seemingly_toxic.count")
        answers = answered(answers, config)
    pairs = (rows.normal, rows.refusals, rows.normal_heldout, rows.refusals_heldout)
    left = without(answers, [row for part in pairs for row in part])
    if len(left) < len(answers):
        cleaning.dropped["augmented: is a prompt of SFT already"] += len(answers) - len(left)
    if not left and unseen and not answers:
        raise ConfigError(
            f"data.group_holdout={config.group_holdout}: holds out every row of stl_aug; lower it"
        )
    if not left:
        raise ConfigError(
            f"stl_aug.responses={named}: every row is a prompt of SFT or of an evaluation set; "
            "give others, or name the set that they answer in data.seemingly_toxic.source"
        )
    return replace(
        rows,
        augmented=left * node.repeat,
        in_distribution=sorted({*rows.in_distribution, *_holding(left, cleaning)}),
        unseen_groups=sorted({row.group or row.id for row in unseen}),
    )


def _holding(rows: list[Example], cleaning: Cleaning) -> list[str]:
    """The evaluation sets that hold a prompt of the rows.

    In the sets that these answer by design a prompt close to one counts as well.
    """
    config, prompts = cleaning.config, [row.prompt for row in rows]
    return [
        name
        for name, asked in cleaning.evaluated.items()
        if any(
            overlap is not None and (overlap.exact or name in config.seemingly_toxic.source)
            for overlap in overlaps(prompts, {name: asked}, near=config.near_duplicate)
        )
    ]


def read_answers(name: str, root: str | None) -> list[Example]:
    """The rows of `stl_aug.responses`: a JSONL file, or a named source of pairs.

    Raises ConfigError where there is no such file, and DataError for whatever is wrong in it, an
    answer that refuses among it.
    """
    if name not in SOURCES and name.endswith(".jsonl") and not Path(name).exists():
        raise ConfigError(
            f"stl_aug.responses={name}: no such file; write it with `python -m dcr.augment "
            f"out={name} …`, or name your own"
        )
    rows = sources.read(name, root=root, kind=Kind.seemingly_toxic, pairs=True)
    for row in rows:
        if rules := keywords.refusing_rules(row.response or ""):
            raise DataError(
                f"{_place(name, row)}: response: of {row.id}: a refusal by the keyword filter "
                f"({', '.join(rules)}); STL-aug learns compliant answers, so remove the row or "
                "answer it"
            )
    return rows


def answered(rows: Sequence[Example], data: DataConfig) -> list[Example]:
    """Those of the prompts that came with a compliant answer of their own.

    Raises ConfigError if there is none.
    """
    compliant = [row for row in rows if row.response and not keywords.refusing_rules(row.response)]
    if not compliant:
        names = ", ".join(data.seemingly_toxic.source)
        raise ConfigError(
            f"stl_aug.responses=null: {names} has no answers to learn; give your own file with "
            "stl_aug.responses=<file.jsonl>, or write one with `python -m dcr.augment "
            f"source={data.seemingly_toxic.source[0]} out=<file.jsonl> model=<name>`"
        )
    return compliant


def _place(name: str, row: Example) -> str:
    """The source of a row, with its line in a file, or its number among those of a user's class."""
    if name in SOURCES:
        return name
    whole = sources.read(name, kind=Kind.seemingly_toxic, pairs=True, scored=True)
    number = whole.index(row)
    if is_path(name):
        return f"{name}:{number + 1}"
    with open(name, "rb") as stream:
        return f"{name}:{[line for line, _ in sources.rows(stream, name)][number]}"
