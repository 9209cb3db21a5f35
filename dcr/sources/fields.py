"""How a raw row of a public data set maps onto our keys, and which of its rows are taken.

A row of a local folder (`data.root`) has the keys `id`, `prompt`, `label`, `category`, `response`
and `meta`. A hub row is first brought to those keys, so one predicate serves both places.
"""

import re
from collections.abc import Callable

from dcr.sources.jsonl import Row

Fields = Callable[[Row], Row]
Keep = Callable[[Row], bool]


def first_turn(transcript: str) -> str:
    """The first human turn of an HH-RLHF dialogue; empty if there is none."""
    _, _, rest = transcript.partition("\n\nHuman:")
    return re.split(r"\n\n(?:Assistant|Human):", rest, maxsplit=1)[0].strip()


def columns(**names: str) -> Fields:
    """Our keys from the named columns; further columns are left out."""
    return lambda row: {key: row[column] for key, column in names.items()}


prompt = columns(prompt="prompt")
prompt_and_category = columns(prompt="prompt", category="category")
bare = columns(prompt="text")  # what `datasets` calls the column of a bare list of strings


def first_turn_of(column: str) -> Fields:
    return lambda row: {"prompt": first_turn(row[column])}


def instruction(row: Row) -> Row:
    given = row["input"]
    text = row["instruction"] + (f"\n\n{given}" if given else "")
    return {"prompt": text, "response": row["output"]}


def xstest(row: Row) -> Row:
    base = {"prompt": row["prompt"], "label": row["label"], "category": row["type"]}
    return {**base, "meta": {"focus": row["focus"]}}


def phtest(row: Row) -> Row:
    return {"prompt": row["Request"], "category": str(row["Harmfulness"]).strip().lower()}


def first_of_turns(row: Row) -> Row:
    """SORRY-Bench: `turns` is a list of one; `prompt_style` is `base` or the name of a mutation."""
    category = str(row["category"])
    return {"prompt": row["turns"][0], "label": row["prompt_style"], "category": category}


def every(_: Row) -> bool:
    return True


def has(key: str, value: str) -> Keep:
    return lambda row: row.get(key) == value


def is_paired(row: Row) -> bool:
    return row.get("pair") is not None
