"""Sheets of answers for people to label: drawn, written as CSV and as a page, and read back.

    labels/<sheet>/sheet.json            the ids of the answers, in the order of the sheet
      sheet.csv  sheet.html              the blind sheet, to fill in with either
      annotators/<name>.json             one person's labels by id

in each of the runs that the answers are from. An answer's id is the fingerprint of prompt and
response by which verdicts know it, so it tells neither column nor judge, and equal answers of
several columns are labelled once.
"""

import csv
import io
import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dcr.core import storage
from dcr.core.config import ConfigError, DataError, UserError
from dcr.core.config.evaluation import AUTO_LENGTH
from dcr.core.generation import Completion
from dcr.ending import printable, single_line
from dcr.judges.verdicts import answer_fingerprint
from dcr.label import LABELS
from dcr.report.columns import Column
from dcr.report.writing import templates

FIELDS = ("sheet", "id", "prompt", "answer", "ended", "label")
READ = ("sheet", "id", "label")  # the others may be changed or gone
FORMULA = ("=", "+", "-", "@", "\t")  # a spreadsheet runs a cell that begins with one of these
DELIMITERS = ",;\t"  # spreadsheets write the one of their country
LONGEST_NAME = 60  # characters of an annotator's name


@dataclass(frozen=True)
class Sheet:
    """`sheet.json`: the answers that were drawn, and how."""

    seed: int
    ids: list[str]


@dataclass(frozen=True)
class Labelled:
    """One annotator's labels of a sheet, by the answer's id."""

    sheet: str
    annotator: str
    labels: dict[str, str]


# --- drawing --------------------------------------------------------------------------------------


def draw(columns: Sequence[Column], count: int, seed: int) -> list[Completion]:
    """Up to `count` distinct answers, at random, as evenly over kinds, sets and columns as can be.

    Answers that end where the paper's keywords have decided are left out. Raises UserError if the
    columns have no others.
    """
    by_kind: dict[str, dict[str, list[list[Completion]]]] = {}
    for column in columns:
        evaluation = column.evaluation
        whole = evaluation.settings.get("max_new_tokens") != AUTO_LENGTH
        for name, counts in evaluation.sets.items() if whole else ():
            rows = by_kind.setdefault(counts.kind.value, {}).setdefault(name, [])
            rows.append(evaluation.answers(name))
    generator = random.Random(seed)
    distinct: dict[str, Completion] = {}
    for answer in _in_turn(by_kind, generator):
        if len(distinct) < count:
            distinct.setdefault(answer_fingerprint(answer), answer)
    if not distinct:
        raise UserError(
            "no whole answers to label; evaluate with tasks=[over_refusal,safety] and a number of "
            "tokens as gen.max_new_tokens"
        )
    return generator.sample(list(distinct.values()), len(distinct))


def _in_turn(node: Any, generator: random.Random) -> Iterator[Completion]:
    """The answers below a node in random order, one of each of its branches at a time."""
    branches = list(node.values()) if isinstance(node, Mapping) else list(node)
    generator.shuffle(branches)
    if branches and isinstance(branches[0], Completion):
        return iter(branches)
    turns = itertools.zip_longest(*(_in_turn(branch, generator) for branch in branches))
    return (answer for turn in turns for answer in turn if answer is not None)


# --- writing --------------------------------------------------------------------------------------


def home(run: Path, sheet: str) -> Path:
    return run / "labels" / sheet


def write(runs: Sequence[Path], drawn: Sequence[Completion], seed: int) -> str:
    """Writes the sheet into every run, and gives its name, which follows from its answers.

    A sheet that is there stays as it is, since someone may have begun to fill it in.
    """
    ids = [answer_fingerprint(answer) for answer in drawn]
    name = f"s{storage.fingerprint(ids)}"
    texts = {"sheet.csv": csv_text(name, drawn), "sheet.html": page(name, drawn)}
    for place in (home(run, name) for run in runs):
        for file, text in texts.items():
            if not (place / file).exists():
                storage.write_text(place / file, text)
        storage.write_json(place / "sheet.json", {"seed": seed, "ids": ids})
    return name


def csv_text(sheet: str, drawn: Iterable[Completion]) -> str:
    """The sheet for a spreadsheet: with a byte order mark, and no cell that it would run.

    An id begins with a letter, or digits with an e among them would be read as a number.
    """
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(FIELDS)
    for answer in drawn:
        shown = map(_cell, (answer.prompt, answer.response))
        ended = "yes" if answer.ended else "no"
        writer.writerow([sheet, f"a{answer_fingerprint(answer)}", *shown, ended, ""])
    return "\ufeff" + text.getvalue()


def _cell(text: str) -> str:
    shown = printable(text)
    return f"'{shown}" if shown.lstrip(" \n").startswith(FORMULA) else shown


def page(sheet: str, drawn: Sequence[Completion]) -> str:
    """The sheet as one page that needs neither server nor network; it saves a CSV of labels."""
    rows = [
        {
            "id": f"a{answer_fingerprint(answer)}",
            "prompt": printable(answer.prompt),
            "answer": printable(answer.response),
            "ended": answer.ended,
        }
        for answer in drawn
    ]
    return templates().get_template("label.html").render(sheet=sheet, rows=rows, labels=LABELS)


# --- reading --------------------------------------------------------------------------------------


def read(file: Path, sheets: Mapping[str, Sheet], partial: bool = False) -> Labelled:
    """The labels of one file, whose name is the annotator's unless it has a column `annotator`.

    With `partial` answers may lack a label. Raises DataError, which names the file, the row as a
    spreadsheet counts it, and the cure, for whatever is no labelled sheet of `sheets`.
    """
    rows = _rows(file)
    sheet, annotator = _by_whom(file, rows, sheets)
    wanted = sheets[sheet].ids
    places: dict[str, int] = {}
    labels: dict[str, str] = {}
    for number, row in rows.items():
        where, identity = f"{file}: row {number}", row["id"].removeprefix("a")
        if identity not in wanted:
            shown = single_line(row["id"], longest=40)
            raise DataError(f"{where}: id {shown!r} is not on this sheet; copy it from there again")
        if identity in places:
            raise DataError(f"{where}: the answer of row {places[identity]} again; keep one row")
        places[identity] = number
        label = "_".join(row["label"].lower().replace("-", " ").replace("_", " ").split())
        if label and label not in LABELS:
            shown = single_line(row["label"], longest=40)
            raise DataError(f"{where}: label {shown!r}; choose one of {', '.join(LABELS)}")
        if label:
            labels[identity] = label
    lacking = [identity for identity in wanted if identity not in labels]
    if lacking and not (partial and labels):
        bare = [places[identity] for identity in lacking if identity in places]
        fault = "no label" if bare else "no such row"
        raise DataError(
            f"{file}: row {bare[0] if bare else max(rows) + 1}: {fault}; {len(lacking)} of "
            f"{len(wanted)} answers lack a label: give them one, or partial=true to take the rest"
        )
    return Labelled(sheet, annotator, labels)


def _by_whom(
    file: Path, rows: Mapping[int, Mapping[str, str]], sheets: Mapping[str, Sheet]
) -> tuple[str, str]:
    """The sheet that all rows of a file are of, and the annotator's name."""
    first = min(rows)
    for column in ("sheet", "annotator"):
        if len(found := {row.get(column, "") for row in rows.values()}) > 1:
            shown = ", ".join(repr(single_line(each, longest=40)) for each in sorted(found))
            raise DataError(f"{file}: row {first}: {column} is {shown}; give each its own file")
    sheet, annotator = rows[first]["sheet"], rows[first].get("annotator") or file.stem
    if sheet not in sheets:
        shown = single_line(sheet, longest=40)
        raise DataError(
            f"{file}: row {first}: sheet {shown!r} is none of {', '.join(sheets) or 'these runs'}; "
            "name the run folders that it was drawn from"
        )
    hidden, odd = annotator.startswith("."), "/" in annotator or not annotator.isprintable()
    if hidden or odd or len(annotator) > LONGEST_NAME:
        shown = single_line(annotator, longest=LONGEST_NAME)
        raise DataError(
            f"{file}: row {first}: annotator {shown!r}; give a name of at most {LONGEST_NAME} "
            "letters, without / and with no dot in front"
        )
    return sheet, annotator


def _rows(file: Path) -> dict[int, dict[str, str]]:
    """The rows by number, their cells by heading, however a spreadsheet has saved them."""
    cure = "save the sheet as CSV in UTF-8, and name that file"
    text = storage.read_text(file, cure).removeprefix("\ufeff")
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
    try:
        heads, *lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    except (csv.Error, ValueError) as error:
        raise DataError(f"{file}: row 1: no CSV ({error}); {cure}") from None
    heads = [head.strip().lower() for head in heads]
    for name in READ:
        if name not in heads:
            raise DataError(f"{file}: row 1: has no column {name}; keep {', '.join(READ)}")
    rows = {
        number: dict(zip(heads, map(str.strip, [*line, *[""] * len(heads)]), strict=False))
        for number, line in enumerate(lines, start=2)
        if any(line)
    }
    if not rows:
        raise DataError(f"{file}: row 2: missing; fill in the sheet that dcr label has written")
    return rows


# --- labels in run folders ------------------------------------------------------------------------


def sheets_of(run: Path) -> dict[str, Sheet]:
    """The sheets that were drawn from a run, by name. DataError for a damaged one."""
    return {
        file.parent.name: storage.read_json(file, Sheet)
        for file in sorted(run.glob("labels/*/sheet.json"))
    }


def store(runs: Iterable[Path], labelled: Labelled, replace: bool = False) -> None:
    """Keeps the labels in every run that has the sheet.

    Raises ConfigError where someone of that name has given other labels, or more of them, unless
    `replace`.
    """
    places = [place for run in runs if (place := home(run, labelled.sheet)).is_dir()]
    files = [place / "annotators" / f"{labelled.annotator}.json" for place in places]
    for file in files:
        before = _labels(file) if file.exists() and not replace else {}
        if not before.items() <= labelled.labels.items():
            raise ConfigError(
                f"{file}: {labelled.annotator} has given this sheet other labels before; rename "
                "the file of another person, or give replace=true"
            )
    for file in files:
        storage.write_json(file, labelled.labels)


def labels_of(runs: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Everyone's labels in these runs, by annotator and id. DataError for a damaged file."""
    found: dict[str, dict[str, str]] = {}
    for run in runs:
        for file in sorted(run.glob("labels/*/annotators/*.json")):
            found.setdefault(file.stem, {}).update(_labels(file))
    return found


def _labels(file: Path) -> dict[str, str]:
    labels = storage.read_json(file, dict[str, str])
    if strange := set(labels.values()) - LABELS.keys():
        raise DataError(f"{file}: {min(strange)!r} is no label; read the annotator's CSV again")
    return labels
