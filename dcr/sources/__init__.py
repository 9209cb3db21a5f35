"""Where prompts come from: named sources, the user's JSONL files, and what is done with their rows.

`table` says what each named source is, `reading` reads one, `jsonl` validates rows of files, and
`examples` draws, splits and compares what was read.
"""

from dcr.sources.examples import (
    Example,
    draw,
    drop_duplicates,
    ends_as_question,
    fingerprint,
    form_gap,
    question_share,
    split_by_group,
)
from dcr.sources.reading import read, read_jsonl
from dcr.sources.table import SOURCES, Hub, Source, first_turn

__all__ = [
    "SOURCES",
    "Example",
    "Hub",
    "Source",
    "draw",
    "drop_duplicates",
    "ends_as_question",
    "fingerprint",
    "first_turn",
    "form_gap",
    "question_share",
    "read",
    "read_jsonl",
    "split_by_group",
]
