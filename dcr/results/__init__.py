"""Measurements: `metrics.json` read as typed records, runs as a data frame.

import dcr.results
table = dcr.results.load(["outputs/a", "outputs/b"])
table[table.quantity == "refused"].pivot_table("value", ["run", "judge"], "set")
"""

from dcr.core.evaluation.protocols import VERSION
from dcr.results.frame import COLUMNS, TIMES, csv_text, edit, frame_of, load, steering
from dcr.results.schema import Metrics, OwnTask, Tracked, read, read_tracked
