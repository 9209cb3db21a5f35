"""The report as one self-contained HTML page, and the sections that only the page has."""

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from markupsafe import Markup
from typing_extensions import TypedDict

import dcr
from dcr.balance import Balance
from dcr.core import storage
from dcr.core.runs import RESTORE, Run
from dcr.ending import printable
from dcr.report import comparisons, figures
from dcr.report.columns import of_run, told
from dcr.report.grids import WANTED, in_words, set_names, text_of
from dcr.report.records import Answer, flattened
from dcr.report.sections import Section, Selection
from dcr.report.writing import TextTable, templates

DRAWN, DIFFERING = 20, 30  # prompts of a set whose answers are shown
OVERVIEW = ("results", "judges", "general")  # grids whose sums are beside each run


class Examined(TypedDict):
    """The part of a run's `rows.json` that `dcr.balance` adds."""

    balance: Balance


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
        return getattr(self.made, "title", "") or self.section.words[0]

    @property
    def about(self) -> str:
        """The words below a section's heading, where it has some."""
        return "" if getattr(self.made, "title", "") else self.section.words[1]

    @property
    def source(self) -> str:
        """A printed figure as a picture of its own, whose names cannot clash with the page's."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.files['svg']).decode()}"


@dataclass(frozen=True)
class OnPage:
    """A part that the page alone shows, by one of its template's macros."""

    macro: str
    held: Any

    def __bool__(self) -> bool:
        return bool(self.held)


def render(chosen: Selection, parts: Sequence[Part]) -> str:
    """The page's HTML, in which all text from files is escaped."""
    environment, columns = templates(), chosen.columns
    environment.globals |= {
        "text_of": text_of,
        "in_words": in_words,
        "glyphs": figures.GLYPHS,
        "drawing": lambda drawing: Markup(figures.inline(drawing)),  # our own, its texts escaped
    }
    evaluated = [column for run in chosen.records for column in of_run(run)]
    models, data = (
        list(dict.fromkeys(filter(None, (column.about(key) for column in evaluated))))
        for key in ("model", "data")
    )
    sets = [column.evaluation.sets.keys() for column in columns]
    alike = [(i, j) for j, of in enumerate(sets) for i in range(j) if sets[i] & of]
    compared = alike[-1] if alike else (0, max(0, len(columns) - 1))  # places of two columns
    if pair := next(comparisons.partners(columns), None):
        compared = columns.index(pair[1]), columns.index(pair[0])
    return environment.get_template("report.html").render(
        parts=parts, columns=columns, notes=chosen.notes, headline=comparisons.headline(chosen),
        models=models, data=data, compared=compared, version=dcr.__version__,
    )  # fmt: skip


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


def answers(chosen: Selection) -> OnPage:
    """Answers.

    20 prompts a set, drawn by a hash of their text so that nobody chooses them, and up to 30 more
    on which verdicts differ, with every run's answer. Of two runs side by side those prompts come
    first on which their verdicts differ, then those whose words differ most; words that the other
    one has not are marked. Toxic prompts are folded away.
    """
    held = []
    for kind in WANTED:
        for name in set_names(chosen.columns, kind):
            stored = [
                {(c.id, c.prompt): c for c in chosen.completions(column.evaluation, name)}
                if name in column.evaluation.sets
                else {}
                for column in chosen.columns
            ]
            keys = list(dict.fromkeys(key for by_key in stored for key in by_key))
            samples = {key: Sample(key[1], [own.get(key) for own in stored]) for key in keys}
            differing = [key for key in keys if samples[key].verdicts.endswith("differ")]
            shown = {*drawn(keys, DRAWN), *evenly(differing, DIFFERING)}
            held.append((kind.value, name, [samples[key] for key in keys if key in shown]))
    return OnPage("answers", held)


def drawn(keys: Sequence[tuple[str, str]], count: int) -> list[tuple[str, str]]:
    """`count` pairs of id and prompt, those of lowest SHA-256: the same in every report."""
    return sorted(keys, key=lambda key: hashlib.sha256(key[1].encode()).digest())[:count]


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """`count` items at even distances, first and last among them; all if there are fewer."""
    if len(items) <= count:
        return list(items)
    return [items[round(place * (len(items) - 1) / (count - 1))] for place in range(count)]


def overview(chosen: Selection) -> OnPage:
    """Runs.

    Click a heading to sort by it. Unticked runs, and those that the filter leaves out, are hidden
    in all tables and among the answers.
    """
    summed = []  # by block and row, with a value a column
    for block in (block for name in OVERVIEW for block in chosen.section(name).blocks):
        rows = [row for row in block.rows if row.summary and not row.page_only]
        summed += [(block.short, row.label, list(row.values)) for row in rows or block.rows]
    return OnPage("overview", {"sums": summed} if chosen.columns else None)


def evaluations(chosen: Selection) -> TextTable | None:
    """The evaluated runs."""
    rows, columns = [], chosen.columns
    for column in columns:
        evaluation = column.evaluation
        settings = flattened(evaluation.settings)
        words = ", ".join(f"{key}={told(settings, key)}" for key in settings)
        if evaluation.seconds is not None:
            words += f"; {evaluation.seconds:.0f} s"
        if evaluation.tokens_per_second is not None:
            words += f", {evaluation.tokens_per_second:.0f} tokens/s"
        rows.append((column.name, printable(str(column.run.folder)), printable(words)))
    plans = Counter(of.evaluation.settings.get("plan") for of in columns)
    looks = [
        f"{count} of these evaluations looked at rows kept apart under {printable(str(plan))}; "
        "the ledger beside the plan counts every look."
        for plan, count in plans.items()
        if plan
    ]
    return TextTable.of(rows, "run", "folder", "evaluation settings", notes=looks)


def rows_used(chosen: Selection) -> TextTable | None:
    """Rows used."""
    rows, notes = [], []
    for run in chosen.records:
        name, parts = printable(str(run.folder)), run.rows.get("rows") or {}
        rows += [(name, part, of["count"], of["fingerprint"])
                 for part, of in parts.items() if of["count"]]  # fmt: skip
        dropped = [f"{n} of {reason}" for reason, n in (run.rows.get("dropped") or {}).items()]
        told = [f"dropped: {', '.join(dropped) or 'none'}"] if parts else []
        if known := run.rows.get("in_distribution"):
            told.append(f"in-distribution: {', '.join(known)}")
        if unseen := run.rows.get("unseen_groups"):
            told.append(f"template groups kept unseen: {len(unseen)}")
        if "balance" in run.rows:
            found = storage.read_json(Run(run.folder).rows_file, Examined, RESTORE)["balance"]
            told += [f"stage one's {what} {value}" for what, value in found.rows()]
        notes += [f"{name}: {'; '.join(told)}."] if told else []
    return TextTable.of(rows, "run", "rows", "count", "fingerprint", notes=notes)


def configurations(chosen: Selection) -> OnPage:
    """Configurations."""
    texts = {}
    for run in chosen.records:
        if run.config:
            plain = json.loads(json.dumps(run.config, default=str))
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
            texts[printable(str(run.folder))] = printable(text)
    return OnPage("texts", texts)
