"""What was measured: `metrics.json` written and read as typed records, runs as a data frame.

import dcr.core.results
table = dcr.core.results.load(["outputs/a", "outputs/b"])
table[table.quantity == "refused"].pivot_table("value", ["run", "judge"], "set")
"""

from dcr.core.results.frame import COLUMNS, csv_text, frame_of, load, steering
from dcr.core.results.schema import (
    VERSION,
    Metrics,
    OwnTask,
    Tracked,
    read,
    read_tracked,
    write,
    write_tracked,
)

__all__ = [
    "COLUMNS",
    "VERSION",
    "Metrics",
    "OwnTask",
    "Tracked",
    "csv_text",
    "frame_of",
    "load",
    "read",
    "read_tracked",
    "steering",
    "write",
    "write_tracked",
]
