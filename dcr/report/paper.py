"""The paper's Tables 1 and 5 with our own rows beside its rows."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from dcr.report import paper_columns
from dcr.report.cells import CONTAMINATED, IN_DISTRIBUTION
from dcr.report.entries import METHODS, Entry, Group, about, method_of
from dcr.report.judged import NAMES, judges
from dcr.report.paper_columns import Cell, Cells

TITLES = {
    "table1": "Table 1: over-refusal, safety and general ability",
    "table5": "Table 5: the same responses by several judges",
}
# Inconsistencies of the paper that touch a table, by where the facts file says they are, with the
# cells (model, method, column) whose numbers they question.
ERRATA: dict[str, dict[str, tuple[tuple[str, str, str], ...]]] = {
    "table1": {
        "Table 1/5 vs Tables 3/4": (("Qwen2.5-1.5B", "DCR", "OR"),),
        "Section 4.2 vs Table 1": (("Qwen2.5-1.5B", "STL", "Safety"),),
        "Section 7.1": (),
        "Sections 2.2 and 6": (),
    },
    "table5": {
        "Table 1/5 vs Tables 3/4": (("Qwen2.5-1.5B", "DCR", "OR"),),
        "A.10.5 vs Table 5": (),
        "Sections 2.2 and 6": (),
    },
}
TRAINED_ON_XSTEST = ("DCR", "STL-aug")
TABLE5_MODEL = "Qwen2.5-1.5B"
NOTES = {"table1": paper_columns.suite_notes, "table5": paper_columns.judge_notes}
HEADS = {
    "Safety_pooled": "Safety, pooled",
    "keyword_refusal": "keyword refusal",
    "AlpacaEval": "AlpacaEval, %",
}


@dataclass(frozen=True)
class PaperRow:
    """One line: whose numbers they are, of which method, model and run, by which judge."""

    method: str
    source: str  # ours or paper
    model: str
    run: str
    cells: Cells
    judge: str = ""

    @property
    def origin(self) -> str:
        """`ours, smollm2_135m, seed 0`."""
        return ", ".join(filter(None, (self.source, self.model, self.run)))


@dataclass(frozen=True)
class PaperTable:
    """Columns by key with their headings, rows by method, footnotes by mark."""

    name: str
    title: str
    heads: dict[str, str]
    rows: list[PaperRow]
    notes: list[tuple[str, str]]

    @property
    def judged(self) -> bool:
        return any(row.judge for row in self.rows)


@cache
def facts() -> dict[str, Any]:
    """The paper's numbers and its known inconsistencies."""
    return json.loads((files("dcr") / "paper_results.json").read_text(encoding="utf-8"))


def table1(columns: Sequence[Entry], groups: Sequence[Group]) -> PaperTable:
    """Methods down the side: keyword compliance, defence success, ability, win rate."""
    ours = [_row(entry, paper_columns.suite(entry)) for entry in columns]
    ours += [_mean_row(columns, group, ours) for group in groups]
    theirs = []
    for model, by_method in facts()["table1_main"].items():
        if model in _paper_models(columns):
            theirs += [
                PaperRow(method, "paper", model, "", _paper_cells(model, method, values, "table1"))
                for method, values in by_method.items()
            ]
    return _table("table1", columns, ours, theirs)


def table5(columns: Sequence[Entry], groups: Sequence[Group]) -> PaperTable:
    """As Table 1 without ability and quality, with one row a judge; seeds are not averaged."""
    del groups
    ours = []
    for entry in columns:
        ours.append(_row(entry, paper_columns.by_keywords(entry), "keyword"))
        for judge, model in judges([entry]):
            cells = paper_columns.by_judge(entry, judge, model)
            name = NAMES.get(judge, judge)
            ours.append(_row(entry, cells, f"{name}: {model}" if model else name))
    theirs = []
    for method, by_column in facts()["table5_judges"]["rows"].items():
        for judge in dict.fromkeys(judge for column in by_column.values() for judge in column):
            values = {
                key: by_judge[judge] for key, by_judge in by_column.items() if judge in by_judge
            }
            # what is known of the numbers questions those by keywords
            table = "table5" if judge == "keyword" else ""
            cells = _paper_cells(TABLE5_MODEL, method, values, table)
            theirs.append(
                PaperRow(method, "paper", TABLE5_MODEL, "", cells, judge.replace("_", " "))
            )
    return _table("table5", columns, ours, theirs)


TABLES: dict[str, Callable[[Sequence[Entry], Sequence[Group]], PaperTable]] = {
    "table1": table1,
    "table5": table5,
}


def _paper_models(columns: Sequence[Entry]) -> list[str]:
    """Those of the paper's models that we ran; all of them where we ran another one as well."""
    theirs = list(facts()["table1_main"])
    ours = {
        _plain(about(entry.run, entry.evaluation, "model"))
        for entry in columns
        if entry.evaluation.weights != "endpoint"
    }
    known = [model for model in theirs if _plain(model) in ours]
    return known if known and ours == {_plain(model) for model in known} else theirs


def _plain(model: str) -> str:
    return re.sub(r"[^a-z0-9]", "", model.lower().rsplit("/", 1)[-1])


def _row(entry: Entry, cells: Cells, judge: str = "") -> PaperRow:
    method = method_of(entry.run, entry.evaluation)
    model = about(entry.run, entry.evaluation, "model")
    told = [part for part in entry.label[1:] if part != model]
    return PaperRow(METHODS.get(method, method), "ours", model, ", ".join(told), cells, judge)


def _mean_row(columns: Sequence[Entry], group: Group, ours: Sequence[PaperRow]) -> PaperRow:
    """Means over seeds with their standard deviation."""
    first = ours[group.places[0]]
    told = [part for part in group.label[1:] if part != first.model]
    cells = paper_columns.over_seeds([ours[place].cells for place in group.places])
    return PaperRow(first.method, "ours", first.model, ", ".join(told), cells)


def _paper_cells(model: str, method: str, values: dict[str, float], table: str) -> Cells:
    """The paper's numbers, marked where training saw the set or the paper contradicts itself."""
    cells = {}
    for key, value in values.items():
        known = IN_DISTRIBUTION if key == "XS" and method in TRAINED_ON_XSTEST else ""
        marks = [letter for letter, where in _letters(table) if (model, method, key) in where]
        cells[key] = Cell(value, marks=known + "".join(marks), digits=paper_columns.digits(key))
    return cells


def _letters(table: str) -> list[tuple[str, tuple[tuple[str, str, str], ...]]]:
    """A footnote letter for each inconsistency that questions single cells."""
    questioned = [cells for cells in ERRATA.get(table, {}).values() if cells]
    return list(zip("abcdefgh", questioned, strict=False))


def _table(
    name: str, columns: Sequence[Entry], ours: list[PaperRow], theirs: list[PaperRow]
) -> PaperTable:
    rows = sorted(ours + theirs, key=lambda row: _rank(row.method))
    kept = {key for row in ours for key in row.cells} | {key for row in theirs for key in row.cells}
    heads = {key: HEADS.get(key, key) for key in paper_columns.COLUMNS if key in kept}
    defended = any("Safety" in row.cells for row in ours)
    heads["Safety"] = "Safety (DSR)" if defended else "Safety (DSR, paper only)"
    if "Safety_pooled" in heads:
        heads["Safety_pooled"] += " (DSR)"
    notes = _mark_notes(ours + theirs) + _errata_notes(name)
    described = facts()["columns"]
    notes += [("", note) for note in (*_legend(name), *NOTES[name](columns, described))]
    return PaperTable(name, TITLES[name], heads, rows, notes)


def _rank(method: str) -> int:
    order = list(METHODS.values())
    return order.index(method) if method in order else len(order)


def _mark_notes(rows: Sequence[PaperRow]) -> list[tuple[str, str]]:
    marks = {mark for row in rows for cell in row.cells.values() for mark in cell.marks}
    texts = {
        IN_DISTRIBUTION: "in-distribution: training saw prompts of this set.",
        CONTAMINATED: "some prompts of this set stand among the rows trained on, or steering was "
        "made from them.",
    }
    return [(mark, text) for mark, text in texts.items() if mark in marks]


def _errata_notes(table: str) -> list[tuple[str, str]]:
    """The paper's inconsistencies that touch the table; a letter where they question a cell."""
    letters = {where: letter for letter, where in _letters(table)}
    notes = [
        (letters.get(ERRATA[table][told["where"]], ""), f"{told['where']}: {told['what']}")
        for told in facts()["inconsistencies"]
        if told["where"] in ERRATA[table]
    ]
    return sorted(notes, key=lambda note: note[0] or "~")  # letters first


def _legend(table: str) -> list[str]:
    paper = facts()["paper"]
    cited = f"Paper: {paper['title']}, arXiv {paper['arxiv']}; its rows have no intervals."
    if table == "table5":
        return [
            cited,
            "Compliance by keywords, or strict by the judge named; keywords say nothing of DSR. "
            "Ours with 95% Wilson intervals, combined for the mean of the sets.",
        ]
    return [
        cited,
        "Compliance by XSTest's keyword rules. Ours with 95% intervals: Wilson, combined for the "
        "mean of the sets, ±1.96 standard errors for ability and win rates; means over seeds with "
        "their standard deviation.",
    ]
