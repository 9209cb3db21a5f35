"""What each figure is drawn by, and the page with all that stands beside it."""

import shlex
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from dcr.core import storage
from dcr.core.config import ConfigError, DataError, UserError
from dcr.core.text import printable
from dcr.report import (
    MARGIN,
    OPERATING,
    analyses,
    claims,
    curves,
    figures,
    page,
    paper,
    trade_offs,
)
from dcr.report.figures import Drawing
from dcr.report.page import Report, Shown
from dcr.report.records import Column, RunRecord, read_run

WIDTH = 100  # where no terminal tells its own
DRAWN: dict[str, Callable[[Sequence[RunRecord]], Drawing]] = {
    **{name: partial(curves.over_sft, name) for name in curves.CURVES},
    "4": trade_offs.figure4,
    **{name: partial(analyses.kernel, name) for name in analyses.KERNEL_FIGURES},
    "7": analyses.accuracies,
    "8": analyses.scaling,
}


def build(
    folders: Sequence[Path],
    out: Path,
    wanted_tables: Sequence[str] = (),
    wanted_figures: Sequence[str] = (),
    with_claims: bool = False,
    *,
    margin: float = MARGIN,
    data: str | None = None,
    notes: Sequence[str] = (),
) -> str:
    """Write the page to `out`, and what else is wanted beside it, each file whole or not.

    `margin` (percentage points) and the label of the data are of operating points; `notes` are what
    the page says beside its own; a figure without data is one more. Returns the terminal's table.
    Raises UserError for a folder that is no run's, for a damaged file, or where a file cannot be
    written.
    """
    distinct = {folder.resolve(): folder for folder in folders}.values()
    records, lacking = [read_run(folder) for folder in distinct], list(notes)
    operating = partial(trade_offs.operating_points, margin=margin, data=data)
    label = "" if data is None else f" data={shlex.quote(data)}"
    shown = []
    for name in wanted_figures:
        command = f"python -m dcr.report {shlex.join(map(str, folders))} --figure {name}"
        command += f" margin={margin:g}{label}" if name == OPERATING else ""
        try:
            drawing = (DRAWN | {OPERATING: operating})[name](records)
        except (ConfigError, DataError):
            raise
        except UserError as error:
            lacking.append(str(error))
            continue
        shown.append(Shown(drawing, figures.files(drawing), printable(command)))
    report = Report.of(records, wanted_tables, shown, with_claims, lacking)
    files = {out: page.render(report).encode("utf-8", "replace")}
    for table in report.paper:
        for ending, text_of in paper.WRITERS.items():
            files[out.parent / f"{table.name}.{ending}"] = text_of(table).encode("utf-8", "replace")
    for drawing in shown:
        for ending, content in drawing.files.items():
            files[out.parent / f"{drawing.figure.name}.{ending}"] = content
    if report.claims:
        files[out.parent / claims.FILE] = claims.csv_text(report.claims).encode("utf-8", "replace")
    for path, content in files.items():
        storage.write_bytes(path, content)
    width = shutil.get_terminal_size((WIDTH, 24)).columns
    lines = [page.plain_text(_title(records, report.columns), report, width)]
    lines += [line for d in shown if d.figure.lines for line in ("", *d.figure.lines)]
    lines += claims.lines(report.claims, width) if with_claims else ()
    beside = dict.fromkeys((table.name for table in report.paper), tuple(paper.WRITERS))
    beside |= {drawing.figure.name: tuple(drawing.files) for drawing in shown}
    places = [f"{name}: {out.parent / name}.{{{','.join(e)}}}" for name, e in beside.items()]
    places += [f"claims: {out.parent / claims.FILE}"] if report.claims else []
    return "\n".join([*lines, *([""] if places else []), *places])


def _title(records: Sequence[RunRecord], columns: Sequence[Column]) -> str:
    if not columns:
        return f"{len(records)} runs without a final evaluation of answers: see the page"
    models, data = (
        ", ".join(dict.fromkeys(filter(None, (column.about(key) for column in columns))))
        for key in ("model", "data")
    )
    return f"{models} on {data or 'unnamed'} data"
