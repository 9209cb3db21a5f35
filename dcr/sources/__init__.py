"""Where prompts come from: named sources, the user's files, and what is done with their rows.

`table` says what each named source is, `fields` how its raw rows become ours, `reading` reads one,
`jsonl` validates rows of files, and `examples` draws, splits and compares.
"""

from dcr.sources.examples import (
    Example,
    draw,
    drop_duplicates,
    fingerprint,
    record,
    split_by_group,
)
from dcr.sources.fields import first_turn
from dcr.sources.reading import read, read_jsonl, read_rows
from dcr.sources.table import SOURCES, Hub, Source
