"""The sources of prompts: named data sets and the user's files.

`sources.yaml` lists the named sources, `table` maps their raw rows to ours, `reading` reads a
source, `jsonl` validates rows of files, `examples` draws, splits and compares rows, and `apart`
knows those that are kept apart.
"""

from dcr.core.sources.apart import is_final
from dcr.core.sources.examples import (
    Example,
    Opening,
    draw,
    drop_duplicates,
    fingerprint,
    record,
    split_by_group,
)
from dcr.core.sources.reading import Rows, origin, read, read_jsonl
from dcr.core.sources.table import SOURCES, Hub, Source, first_turn
