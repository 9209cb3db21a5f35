"""A source of one's own: python train.py data.toxic.source=examples.sources:Spreadsheet
data.seemingly_toxic.source=examples.sources:Spreadsheet own.Spreadsheet.file=prompts.csv

A CSV file, as annotators hand it over, with a column that says what each prompt is.
"""

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dcr.core.config import DataError, Kind
from dcr.core.sources import Rows


@dataclass
class Spreadsheet(Rows):
    """The rows of a kind, under the headings that the file has."""

    file: str
    prompt: str = "prompt"  # headings
    response: str = "response"
    label: str = "kind"
    # What the label says of each kind; its own name where none is given.
    words: dict[str, str] = field(default_factory=dict)
    delimiter: str = ","

    def rows(self, kind: Kind) -> Iterator[dict[str, str]]:
        wanted = self.words.get(kind.value, kind.value)
        with Path(self.file).open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=self.delimiter)
            for heading in (self.prompt, self.label):
                if heading not in (reader.fieldnames or ()):
                    known = ", ".join(reader.fieldnames or ())
                    raise DataError(f"{self.file}: no column {heading}; it has {known}")
            for number, row in enumerate(reader, 1):
                if row[self.label] == wanted:
                    found = {"id": f"{kind.value}-{number}", "prompt": row[self.prompt]}
                    if row.get(self.response):
                        found["response"] = row[self.response]
                    yield found


@dataclass
class Harmless(Spreadsheet):
    """The same under another name: evaluated beside it, each set needs a name of its own."""
