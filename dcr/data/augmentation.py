"""STL-aug's rows: compliant answers to seemingly toxic prompts, read and checked."""

from collections.abc import Callable, Sequence
from pathlib import Path

from dcr import sources
from dcr.config import ConfigError, DataConfig, DataError, KeywordRules, Kind
from dcr.sources import SOURCES, Example, jsonl
from dcr.text import normalise

Refuses = Callable[..., bool]  # of a response, or of a response and the name of keyword rules


def read_answers(name: str, root: str | None, refuses: Refuses) -> list[Example]:
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
    for place, row in enumerate(rows):
        rules = rules_that_call_it_refusal(row, refuses)
        if rules:
            where = name if name in SOURCES else f"{name}:{_line(name, place)}"
            raise DataError(
                f"{where}: response: of {row.id}: a refusal by the keyword filter "
                f"({', '.join(rules)}); STL-aug learns compliant answers, so remove the row or "
                "answer it"
            )
    return rows


def answered(rows: Sequence[Example], data: DataConfig, refuses: Refuses) -> list[Example]:
    """Those of the prompts that came with a compliant answer of their own.

    Raises ConfigError if there is none.
    """
    found = [row for row in rows if row.response and not rules_that_call_it_refusal(row, refuses)]
    if not found:
        names = ", ".join(data.seemingly_toxic.source)
        raise ConfigError(
            f"stl_aug.responses=null: {names} has no answers to learn; give your own file with "
            "stl_aug.responses=<file.jsonl>, or write one with `python -m dcr.augment "
            f"source={data.seemingly_toxic.source[0]} out=<file.jsonl> model=<name>`"
        )
    return found


def apart_from(rows: Sequence[Example], pairs: Sequence[Example]) -> list[Example]:
    """The rows whose prompts no other pair of SFT answers, in its own way."""
    taken = {normalise(row.prompt) for row in pairs}
    return [row for row in rows if normalise(row.prompt) not in taken]


def rules_that_call_it_refusal(row: Example, refuses: Refuses) -> list[str]:
    return [rules.value for rules in KeywordRules if refuses(row.response, rules.value)]


def _line(path: str, place: int) -> int:
    """The line of a file's row, counted from 1; rows are counted from 0."""
    with open(path, "rb") as stream:
        return [number for number, _ in jsonl.rows(stream, path)][place]
