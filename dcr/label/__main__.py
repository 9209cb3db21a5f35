"""The command of dcr.label: a blind sheet, or labelled sheets read back and their agreement."""

import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dcr import entry
from dcr.core.config import ConfigError

if TYPE_CHECKING:
    from dcr.report.sections import Selection


@dataclass
class Options:
    """python -m dcr.label <run folder> ... [count=100] [seed=0]
    python -m dcr.label <run folder> ... read=<csv>[,<csv>]

    Draws answers of evaluated runs for people to label, without saying whose they are, and writes
    them as a CSV file and as a page to label in a browser. With read=, reads labelled sheets back
    and says how far annotators agree with each other and with every judge.
    """

    folders: list[Path] = entry.option(
        "folders of train.py or eval.py that hold an evaluation", [], rest=True
    )
    count: int = entry.option("answers on the sheet", 100, least=1)
    seed: int = entry.option("of the draw; another seed draws another sheet", 0, least=0)
    read: list[str] = entry.option(
        "labelled sheets, separated by commas; repeatable. A file's name, or its column "
        "annotator, names the annotator",
        [],
    )
    partial: bool = entry.option("accept a sheet on which some answers have no label", False)
    replace: bool = entry.option("replace an annotator's earlier labels by other ones", False)


@entry.command(Options)
def main(options: Options) -> None:
    """Prints the sheet's places, or the agreement."""
    # not at the top: --help needs no pandas
    from dcr.report.records import read_run
    from dcr.report.sections import Selection

    for folder in options.folders:
        if "=" in str(folder) and not folder.exists():  # a sweep's folders may hold one
            raise ConfigError(f"{folder}: neither a run folder nor a setting of dcr label")
    if not options.folders:
        raise ConfigError("no run folder given; see python -m dcr.label --help")
    chosen = Selection.of([read_run(folder) for folder in options.folders])
    (_take if options.read else _draw)(options, chosen)


def _draw(options: Options, chosen: "Selection") -> None:
    from dcr.label import sheets

    drawn = sheets.draw(chosen.columns, options.count, options.seed)
    name = sheets.write(options.folders, drawn, options.seed)
    if len(drawn) < options.count:
        print(f"count={options.count}: the runs hold {len(drawn)} distinct answers; all are drawn")
    place = sheets.home(options.folders[0], name)
    print(f"{len(drawn)} answers: {place / 'sheet.html'} or {place / 'sheet.csv'}")
    print(f"then: python -m dcr.label {shlex.join(map(str, options.folders))} read=<name>.csv")


def _take(options: Options, chosen: "Selection") -> None:
    from dcr.label import agreement, sheets
    from dcr.report import writing
    from dcr.report.sections import SECTIONS

    known = {name: of for run in options.folders for name, of in sheets.sheets_of(run).items()}
    files = [Path(word) for words in options.read for word in words.split(",")]
    taken = [sheets.read(file, known, options.partial) for file in files]
    for (sheet, name), times in Counter((of.sheet, of.annotator) for of in taken).items():
        if times > 1:
            raise ConfigError(
                f"read: {times} files are of {name}, of sheet {sheet}; give each person "
                "a name, by the file's or in a column annotator"
            )
    for labelled in taken:
        sheets.store(options.folders, labelled, options.replace)
        print(f"{labelled.annotator}: {len(labelled.labels)} labels of sheet {labelled.sheet}")
    table = agreement.section(chosen)
    assert table is not None
    told = writing.in_terminal(table), *table.notes, "", SECTIONS["labels"].words[1]
    print(entry.plain_text("", *told))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
