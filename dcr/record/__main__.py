"""The command of dcr.record: numbers of run folders, or of a comparison of arms, into a file."""

import sys
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
    only: list[str] = entry.option("a metric to record, by its first word; not given: all", [])
    commit: str | None = entry.option("the commit whose code measured; not given: by date", None)
    out: Path | None = entry.option("the file; not given: docs/records/<name>.csv", None)
    replace: bool = entry.option("write over a record of this name", False)
    runs: list[str] = entry.option("run folders, or .json files of dcr.frontier", [], rest=True)


@entry.command(Options)
def main(options: Options) -> None:
    from dcr.record import writing  # with pandas, which help and a user's error need not wait for

    writing.write(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
