"""Measured numbers as files of the repository, and pages that are written from them.

`python -m dcr.record` writes a record, a CSV file with a row for each number; `origins` says where
a number comes from, and which code measured it; `pages` writes numbers of records into documents.
"""

from dataclasses import dataclass
from pathlib import Path

from dcr import entry


@dataclass
class Options:
    """python -m dcr.record <run folder or comparison of arms> ... name=<name> command=<command>

    Writes docs/records/<name>.csv, a row for each number with where it comes from. A comparison is
    the file of python -m dcr.frontier out=. The code that measured is that of the last commit
    before the evaluation, unless commit= names another.
    """

    name: str = entry.option("of the record")
    command: list[str] = entry.option(
        "needed: a command that made the runs, as typed, with <data> in the place of a path"
    )
    only: list[str] = entry.option(
        "a metric to record, by its first words up to a slash; not given: all", []
    )
    commit: str | None = entry.option("the commit whose code measured; not given: by date", None)
    out: Path | None = entry.option("the file; not given: docs/records/<name>.csv", None)
    replace: bool = entry.option("write over a record of this name", False)
    runs: list[str] = entry.option("run folders, or .json files of dcr.frontier", [], rest=True)
