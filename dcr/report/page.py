"""The report as one self-contained HTML page, and the sections that only the page has."""

import base64
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml
from markupsafe import Markup

import dcr
from dcr.balance import Balance
from dcr.core.config import Kind
from dcr.core.text import printable
from dcr.report import comparisons, figures
from dcr.report.records import Answer, about, evaluations_of, flattened
from dcr.report.sections import Section, Selection
from dcr.report.tables import Cell, in_words, set_names, text_of
from dcr.report.writing import TextTable, templates

PROMPTS_A_SET = 30
OVERVIEW = ("results", "judges", "general")  # grids whose sums are beside each run


@dataclass(frozen=True)
class Part:
    """The result of one section, with its anchor, its files by ending, and the command for it."""

    name: str
    section: Section
    made: Any
    files: dict[str, bytes]
    command: str = ""

    @property
    def title(self) -> str:
        return self.section.title or self.made.title

    @property
    def source(self) -> str:
        """A printed figure as a picture of its own, whose names cannot clash with the page's."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.files['svg']).decode()}"


def render(chosen: Selection, parts: Sequence[Part]) -> str:
    """The page's HTML, in which all text from files is escaped."""
    environment = templates()
    environment.globals |= {
        "text_of": text_of,
        "in_words": in_words,
        "glyphs": figures.GLYPHS,
        "drawing": lambda drawing: Markup(figures.inline(drawing)),  # our own, its texts escaped
    }
    evaluated = [(run, e) for run in chosen.records for e in evaluations_of(run)]
    models, data = (
        list(dict.fromkeys(filter(None, (about(run, e, key) for run, e in evaluated))))
        for key in ("model", "data")
    )
    return environment.get_template("report.html").render(
        parts=parts,
        columns=chosen.columns,
        notes=chosen.notes,
        headline=comparisons.headline(chosen),
        models=models,
        data=data,
        version=dcr.__version__,
    )


# --- answers ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """One prompt with the answer of every column, or None if a column has none."""

    prompt: str
    answers: list[Answer | None]

    @property
    def verdicts(self) -> str:
        """Words to filter by: the verdicts that occur, and whether they differ."""
        verdicts = sorted({answer.verdict for answer in self.answers if answer})
        return " ".join([*verdicts, "differ"] if len(verdicts) > 1 else verdicts)


@dataclass(frozen=True)
class Answers:
    """Samples by kind and set, and the places of the two columns that are compared at first."""

    macro: ClassVar[str] = "answers"
    samples: list[tuple[str, str, list[Sample]]]
    compared: tuple[int, int]

    def __bool__(self) -> bool:
        return bool(self.samples)


def answers(chosen: Selection) -> Answers:
    columns = chosen.columns
    compared = max(0, len(columns) - 2), max(0, len(columns) - 1)
    for a, b, _ in itertools.islice(comparisons.partners(columns), 1):
        compared = columns.index(b), columns.index(a)
    kinds = (Kind.seemingly_toxic, Kind.toxic)
    names = [(kind.value, name) for kind in kinds for name in set_names(columns, kind)]
    return Answers([(kind, name, _sample(chosen, name)) for kind, name in names], compared)


def _sample(chosen: Selection, name: str) -> list[Sample]:
    """Up to PROMPTS_A_SET prompts, evenly over the set, and as many of different verdicts."""
    stored = [
        {(c.id, c.prompt): c for c in chosen.completions(column, name)}
        if name in column.evaluation.sets
        else {}
        for column in chosen.columns
    ]
    keys = list(dict.fromkeys(key for answers in stored for key in answers))
    samples = {key: Sample(key[1], [answers.get(key) for answers in stored]) for key in keys}
    differing = [key for key in keys if samples[key].verdicts.endswith("differ")]
    shown = {*evenly(keys, PROMPTS_A_SET), *evenly(differing, PROMPTS_A_SET)}
    return [samples[key] for key in keys if key in shown]


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances, first and last among them; all if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


# --- runs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Overview:
    """The summary rows of each grid, by block and row, with a value a column."""

    macro: ClassVar[str] = "overview"
    sums: list[tuple[str, str, list[Cell | None]]]


def overview(chosen: Selection) -> Overview | None:
    summed = []
    for block in (block for name in OVERVIEW for block in chosen.section(name).blocks):
        rows = [row for row in block.rows if row.summary and not row.page_only]
        summed += [(block.short, row.label, list(row.values)) for row in rows or block.rows]
    return Overview(summed) if chosen.columns else None


def evaluations(chosen: Selection) -> TextTable | None:
    """The folder of every column, and how it was evaluated."""
    rows = []
    for column in chosen.columns:
        evaluation = column.evaluation
        settings = flattened(evaluation.settings)
        words = ", ".join(f"{key}={'all' if v is None else v}" for key, v in settings.items())
        if evaluation.seconds is not None:
            words += f"; {evaluation.seconds:.0f} s"
        if evaluation.tokens_per_second is not None:
            words += f", {evaluation.tokens_per_second:.0f} tokens/s"
        rows.append((column.name, column.run.folder.name, printable(words)))
    return TextTable.of(rows, "run", "folder", "evaluation settings")


def rows_used(chosen: Selection) -> TextTable | None:
    """The rows that each run learnt from, and as notes those dropped and how kinds differ."""
    rows, notes = [], []
    for run in chosen.records:
        name, (parts, dropped) = (
            run.folder.name,
            (run.rows.get(k) or {} for k in ("rows", "dropped")),
        )
        rows += [(name, part, of["count"], of["fingerprint"])
                 for part, of in parts.items() if of["count"]]  # fmt: skip
        told = [f"{count} of {reason}" for reason, count in dropped.items()]
        told = [f"dropped: {', '.join(told) or 'none'}"] if parts else []
        if known := run.rows.get("in_distribution"):
            told.append(f"in-distribution: {', '.join(known)}")
        if unseen := run.rows.get("unseen_groups"):
            told.append(f"template groups kept unseen: {len(unseen)}")
        if balance := run.rows.get("balance"):
            told += [f"stage one's {what} {value}" for what, value in Balance(**balance).rows()]
        notes += [f"{name}: {'; '.join(told)}."] if told else []
    return TextTable.of(rows, "run", "rows", "count", "fingerprint", notes=notes)


@dataclass(frozen=True)
class Texts:
    """Long texts to open by a click, by their heading."""

    macro: ClassVar[str] = "texts"
    texts: dict[str, str]

    def __bool__(self) -> bool:
        return bool(self.texts)


def configurations(chosen: Selection) -> Texts:
    """Every run's configuration as YAML."""
    texts = {}
    for run in chosen.records:
        if run.config:
            plain = json.loads(json.dumps(run.config, default=str))
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
            texts[printable(str(run.folder))] = printable(text)
    return Texts(texts)
