"""Where prompts come from: named sources, the user's files, and what is done with their rows.

`table` says what each named source is, `fields` how its raw rows become ours, `reading` reads one,
`jsonl` validates rows of files, and `examples` draws, splits and compares.
"""

from dcr.core.sources.examples import (
    Example,
    draw,
    drop_duplicates,
    fingerprint,
    record,
    split_by_group,
)
from dcr.core.sources.fields import first_turn
from dcr.core.sources.reading import Rows, origin, read, read_jsonl, read_rows
from dcr.core.sources.table import SOURCES, Hub, Source
