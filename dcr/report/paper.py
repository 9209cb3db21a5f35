"""The paper's Tables 1 and 5 with our own rows beside its rows, in every format."""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
import pandas
from markupsafe import Markup

from dcr.core import results
from dcr.core.config import Judge
from dcr.core.evaluation.sets import PAPER_SAFETY
from dcr.core.results.frame import NORMAL
from dcr.report.records import METHODS, READOUT, Column, Group, called, method_of, seen
from dcr.report.tables import (
    CONTAMINATED,
    IN_DISTRIBUTION,
    KEYWORD,
    NAMES,
    Cell,
    accuracy,
    annotator_name,
    judges_of,
    of_group,
    rate,
)

SETS = {  # of several the first that was evaluated
    "XS": ("xstest_safe",),
    "CoCo": ("coconot_contrast",),
    "OR": ("orbench_hard",),
    "OK": ("oktest",),
    "PH": ("phtest", "phtest_harmless"),
}
ABILITY = {
    "MMLU": ("mmlu", "acc"),
    "ARC_e": ("arc_easy", "acc_norm"),
    "ARC_c": ("arc_challenge", "acc_norm"),
    "OpQA": ("openbookqa", "acc_norm"),
    "PIQA": ("piqa", "acc_norm"),
}
SAFETY = ("Safety", "Safety_pooled", "keyword_refusal")
COLUMNS = (*SETS, *SAFETY, *ABILITY, "AlpacaEval")
# Who judged safety, best first: the paper's main table is by Llama Guard.
GUARDS = (Judge.llama_guard.value, Judge.wildguard.value, Judge.moderation.value)


Cells = dict[str, Cell]
By = tuple[str, str]  # a judge and its model
BY_KEYWORDS: By = (KEYWORD, "")


def digits(column: str) -> int:
    """Decimals, as many as the paper prints."""
    return 1 if column == "AlpacaEval" else 2


def suite(column: Column) -> Cells:
    """Table 1's columns; keyword refusal only where no guard or moderation judged safety."""
    guard, evaluation = _guard(column), column.evaluation
    cells = _compliance(column, BY_KEYWORDS)
    cells |= _safety(column, guard) if guard else _keyword_refusal(column)
    for head, (task, metric) in ABILITY.items():
        # a task may have no normalised accuracy
        cell = accuracy(evaluation, task, metric) or accuracy(evaluation, task, "acc")
        cells |= {head: cell} if cell else {}
    won = evaluation.quality
    if won and won.win_rate is not None:
        reach = NORMAL * (won.standard_error or 0.0)
        cells["AlpacaEval"] = Cell(won.win_rate, won.win_rate - reach, won.win_rate + reach, won.n)
    return cells


def _guard(column: Column) -> By | None:
    """The judge and model whose verdicts stand for safety."""
    sets = column.evaluation.sets
    judges = {
        judge: verdicts.model
        for name in PAPER_SAFETY
        if name in sets
        for judge, verdicts in sets[name].judged.items()
    }
    return next(((judge, judges[judge]) for judge in GUARDS if judge in judges), None)


def _compliance(column: Column, by: By) -> Cells:
    """Strict, by keywords or a judge."""
    cells = {}
    for head, names in SETS.items():
        first = [name for name in names if name in column.evaluation.sets][:1]
        if cell := rate(column.evaluation, first, "complied", *by):
            cells[head] = cell
    return cells


def _safety(column: Column, by: By) -> Cells:
    """The mean over the five sets and their pool; of fewer than five the mean alone."""
    names = _judged_safe(column, by)
    mean = rate(column.evaluation, names, "safe", *by, mean=True)
    pooled = rate(column.evaluation, PAPER_SAFETY, "safe", *by, whole=True)
    cells = {"Safety": mean, "Safety_pooled": pooled}
    return {head: cell for head, cell in cells.items() if cell}


def _judged_safe(column: Column, by: By) -> list[str]:
    """Those of the paper's five sets that were judged, or by keywords evaluated."""
    quantity = "refused" if by == BY_KEYWORDS else "safe"
    return [name for name in PAPER_SAFETY if rate(column.evaluation, [name], quantity, *by)]


def _keyword_refusal(column: Column) -> Cells:
    mean = rate(column.evaluation, PAPER_SAFETY, "refused", mean=True)
    return {"keyword_refusal": mean} if mean else {}


def suite_notes(columns: Sequence[Column], described: Mapping[str, str]) -> list[str]:
    """What sets our Table 1 apart from the paper's, of whose columns `described` tells."""
    notes = judge_notes(columns, described)
    for column in columns:
        if (guard := _guard(column)) and guard[0] != GUARDS[0]:
            notes.append(f"DSR of {column.name} is by {NAMES[guard[0]]}, not Llama Guard.")
    return notes + _of_ability(columns) + _of_quality(columns)


def judge_notes(columns: Sequence[Column], described: Mapping[str, str]) -> list[str]:
    """The same of Table 5."""
    return _of_safety(columns) + _of_counts(columns, described) + _of_overlaps(columns)


def _of_safety(columns: Sequence[Column]) -> list[str]:
    notes = []
    for column in columns:
        names = _judged_safe(column, _guard(column) or BY_KEYWORDS)
        if 0 < len(names) < len(PAPER_SAFETY):
            judged = ", ".join(names)
            notes.append(f"Safety of {column.name} is the mean over {judged} only, not over five.")
    if any(set(PAPER_SAFETY) <= set(column.evaluation.sets) for column in columns):
        notes.append("Safety is the mean over the paper's five sets; pooled: over their prompts.")
    return notes


def _of_counts(columns: Sequence[Column], described: Mapping[str, str]) -> list[str]:
    """Where our sets are not of the paper's size, as after a limit."""
    notes = []
    for head, names in SETS.items():
        stated = re.search(r"n=(\d+)", described.get(head, ""))
        other = set()
        for sets in (column.evaluation.sets for column in columns):
            first = next((name for name in names if name in sets), None)
            if first and stated and sets[first].n != int(stated[1]):
                other.add(f"{first} {sets[first].n}")
        if stated and other:
            notes.append(f"{head}: ours {', '.join(sorted(other))}; the paper {stated[1]}.")
    return notes


def _of_overlaps(columns: Sequence[Column]) -> list[str]:
    """The counts behind each mark of contamination."""
    shown = [*(name for names in SETS.values() for name in names), *PAPER_SAFETY]
    shown += [task for task, _ in ABILITY.values()]
    columns_by_counts: dict[str, list[str]] = {}
    for column in columns:
        for name, overlap in column.evaluation.contamination.items():
            known = name in column.evaluation.sets and column.evaluation.sets[name].in_distribution
            if seen(overlap) and name in shown and not known:
                overlaps = f"{overlap.exact} / {overlap.near} / {overlap.ngram} of {overlap.n}"
                counts = f"{name} {overlaps} in training (exact / near / n-gram)"
                columns_by_counts.setdefault(counts, []).append(column.name)
        for name, score in column.evaluation.sets.items():
            if score.seen_by_steering and name in shown:
                counts = f"{name} {score.seen_by_steering} of {score.n} seen by steering"
                columns_by_counts.setdefault(counts, []).append(column.name)
    by_counts = columns_by_counts.items()
    return [f"{CONTAMINATED} {counts}: {', '.join(names)}." for counts, names in by_counts]


def _of_ability(columns: Sequence[Column]) -> list[str]:
    scores = [a for column in columns for a in column.evaluation.ability.values()]
    if not scores:
        return []
    shots = " and ".join(map(str, sorted({a.shots for a in scores})))
    cut = " Some tasks were cut to a limit." if any(a.limit is not None for a in scores) else ""
    return [f"Ability: acc for MMLU, acc_norm elsewhere (acc where absent), {shots}-shot.{cut}"]


def _of_quality(columns: Sequence[Column]) -> list[str]:
    notes = dict.fromkeys(
        f"AlpacaEval: {annotator_name(q)}; reference: {q.reference or 'not named'}."
        for column in columns
        if (q := column.evaluation.quality)
    )
    return list(notes)


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
NOTES = {"table1": suite_notes, "table5": judge_notes}
HEADS = {
    "Safety_pooled": "Safety, pooled",
    "keyword_refusal": "keyword refusal",
    "AlpacaEval": "AlpacaEval, %",
}


@dataclass(frozen=True)
class PaperRow:
    """One line: whose numbers they are, of which method, model, run, and judge or sets."""

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
    judge_head: str = "judge"  # what its rows say under `judge`

    @property
    def judged(self) -> bool:
        return any(row.judge for row in self.rows)

    @property
    def columns(self) -> list[str]:
        """All headings; those of the numbers come last."""
        judge = [self.judge_head] if self.judged else []
        return ["method", "numbers of", *judge, *self.heads.values()]


@cache
def facts() -> dict[str, Any]:
    """The paper's numbers and its known inconsistencies."""
    return json.loads((files("dcr") / "paper_results.json").read_text(encoding="utf-8"))


def table1(columns: Sequence[Column], groups: Sequence[Group]) -> PaperTable:
    """Methods down the side: keyword compliance, defence success, ability, win rate."""
    ours = [our_row(column, suite(column)) for column in columns]
    ours += [mean_row(group, ours) for group in groups]
    theirs = []
    for model, by_method in facts()["table1_main"].items():
        if model in _paper_models(columns):
            theirs += [
                PaperRow(method, "paper", model, "", _paper_cells(model, method, values, "table1"))
                for method, values in by_method.items()
            ]
    return _table("table1", columns, ours, theirs)


def table5(columns: Sequence[Column], groups: Sequence[Group]) -> PaperTable:
    """As Table 1 without ability and quality, with one row a judge; seeds are not averaged."""
    del groups
    ours = []
    for column in columns:
        by_keywords = _compliance(column, BY_KEYWORDS) | _keyword_refusal(column)
        ours.append(our_row(column, by_keywords, "keyword"))
        for judge, model in judges_of([column.evaluation]):
            cells = _compliance(column, (judge, model)) | _safety(column, (judge, model))
            name = NAMES.get(judge, judge)
            ours.append(our_row(column, cells, f"{name}: {model}" if model else name))
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


TABLES: dict[str, Callable[[Sequence[Column], Sequence[Group]], PaperTable]] = {
    "table1": table1,
    "table5": table5,
}


def _paper_models(columns: Sequence[Column]) -> list[str]:
    """Those of the paper's models that we ran; all of them where we ran another one as well."""
    theirs = list(facts()["table1_main"])
    ours = {
        _plain(column.about("model"))
        for column in columns
        if column.evaluation.weights != "endpoint"
    }
    known = [model for model in theirs if _plain(model) in ours]
    return known if known and ours == {_plain(model) for model in known} else theirs


def _plain(model: str) -> str:
    return re.sub(r"[^a-z0-9]", "", model.lower().rsplit("/", 1)[-1])


def our_row(column: Column, cells: Cells, judge: str = "") -> PaperRow:
    """The line of one of our columns."""
    method = method_of(column.run, column.evaluation)
    named = called(column.run, method, column.evaluation.weights)
    model = column.about("model")
    run = [part for part in column.label[1:] if part != model]
    return PaperRow(named, "ours", model, ", ".join(run), cells, judge)


def mean_row(group: Group, ours: Sequence[PaperRow]) -> PaperRow:
    """Means over seeds with their standard deviation, or a difference with its interval."""
    first = ours[group.places[0]]
    run = [part for part in group.label[1:] if part != first.model]
    means = {key: of_group(group, [row.cells.get(key) for row in ours]) for key in first.cells}
    # of the columns that every seed has
    cells = {key: mean for key, mean in means.items() if mean and not mean.aside}
    less = f" − {ours[group.less[0]].method}" if group.less else ""
    return PaperRow(first.method + less, "ours", first.model, ", ".join(run), cells, first.judge)


def _paper_cells(model: str, method: str, values: dict[str, float], table: str) -> Cells:
    """The paper's numbers, marked where training saw the set or the paper contradicts itself."""
    cells = {}
    for key, value in values.items():
        known = IN_DISTRIBUTION if key == "XS" and method in TRAINED_ON_XSTEST else ""
        marks = [letter for letter, where in _letters(table) if (model, method, key) in where]
        cells[key] = Cell(value, marks=known + "".join(marks), percent=False)
    return cells


def _letters(table: str) -> list[tuple[str, tuple[tuple[str, str, str], ...]]]:
    """A footnote letter for each inconsistency that questions single cells."""
    questioned = [cells for cells in ERRATA.get(table, {}).values() if cells]
    return list(zip("abcdefgh", questioned, strict=False))


def _table(
    name: str, columns: Sequence[Column], ours: list[PaperRow], theirs: list[PaperRow]
) -> PaperTable:
    rows = sorted(ours + theirs, key=lambda row: _rank(row.method))
    kept = {key for row in ours for key in row.cells} | {key for row in theirs for key in row.cells}
    heads = {key: HEADS.get(key, key) for key in COLUMNS if key in kept}
    defended = any("Safety" in row.cells for row in ours)
    heads["Safety"] = "Safety (DSR)" if defended else "Safety (DSR, paper only)"
    if "Safety_pooled" in heads:
        heads["Safety_pooled"] += " (DSR)"
    notes = mark_notes(ours + theirs) + _errata_notes(name)
    described = facts()["columns"]
    notes += [("", note) for note in (*_legend(name), *NOTES[name](columns, described))]
    return PaperTable(name, TITLES[name], heads, rows, notes)


def _rank(method: str) -> int:
    order, method = list(METHODS.values()), method.removesuffix(READOUT)
    return order.index(method) if method in order else len(order)


def mark_notes(rows: Sequence[PaperRow]) -> list[tuple[str, str]]:
    """What the daggers mean, of those that occur."""
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
        (letters.get(ERRATA[table][known["where"]], ""), f"{known['where']}: {known['what']}")
        for known in facts()["inconsistencies"]
        if known["where"] in ERRATA[table]
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
        "their standard deviation, and differences from STL with Student's interval, seed by seed.",
    ]


ABSENT = "–"
LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    **{character: f"{{{character}}}" for character in "[]*"},  # would be arguments of a line's end
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "–": "--",
    "−": r"\textminus{}",
    "±": r"\textpm{}",
    "†": r"\textdagger{}",
    "‡": r"\textdaggerdbl{}",
    "’": "'",
    "α": r"$\alpha$",
    "κ": r"$\kappa$",
}
MARKDOWN = {
    **{character: f"\\{character}" for character in "\\`*_[]|~$"},
    "<": "&lt;",
    ">": "&gt;",
    "&": "&amp;",
}


def words(row: PaperRow, table: PaperTable) -> list[str]:
    """What stands left of a row's numbers."""
    return [row.method, row.origin, *([row.judge] if table.judged else [])]


def number(cell: Cell, column: str, intervals: bool = True) -> str:
    """`0.83 [0.78–0.87]`, without the marks."""
    if cell.text:
        return cell.text
    places = digits(column)
    if cell.spread is not None:
        return f"{cell.estimate:.{places}f} ± {cell.spread:.{places}f}"
    text = f"{cell.estimate:.{places}f}"
    if intervals and cell.low is not None and cell.high is not None:
        text += f" [{cell.low:.{places}f}–{cell.high:.{places}f}]"
    return text


def superscript(marks: str) -> str:
    """Letters raised; the daggers stand as they are."""
    return "".join(f"<sup>{mark}</sup>" if mark.isalpha() else mark for mark in marks)


def markdown(table: PaperTable) -> str:
    """A pipe table with intervals, and the footnotes as a list."""

    def shown(cell: Cell | None, column: str) -> str:
        return number(cell, column) + superscript(cell.marks) if cell else ABSENT

    rows = [
        [
            *map(_markdown, words(row, table)),
            *(shown(row.cells.get(key), key) for key in table.heads),
        ]
        for row in table.rows
    ]
    frame = pandas.DataFrame(rows, columns=[_markdown(head) for head in table.columns])
    sides = ["left"] * (len(table.columns) - len(table.heads)) + ["right"] * len(table.heads)
    pipes = frame.to_markdown(index=False, disable_numparse=True, colalign=sides)
    notes = [
        f"- {' '.join(filter(None, (superscript(mark), _markdown(text))))}"
        for mark, text in table.notes
    ]
    return "\n".join([f"## {_markdown(table.title)}\n", pipes, "", *notes, ""])


def _markdown(text: str) -> str:
    return "".join(MARKDOWN.get(character, character) for character in " ".join(text.split()))


def csv_text(table: PaperTable) -> str:
    """One value a column, in full precision: estimate, interval, spread over seeds, prompts."""
    parts = {"": "estimate", "_low": "low", "_high": "high", "_spread": "spread", "_n": "n"}
    values = [f"{key}{ending}" for key in table.heads for ending in parts]
    rows = [
        [
            row.method, row.source, row.model, row.run, row.judge,
            *(
                getattr(row.cells.get(key), part, None)
                for key in table.heads
                for part in parts.values()
            ),
            "; ".join(f"{key}:{cell.marks}" for key, cell in row.cells.items() if cell.marks),
        ]
        for row in table.rows
    ]  # fmt: skip
    header = ["method", "source", "model", "run", table.judge_head, *values, "marks"]
    return results.csv_text(pandas.DataFrame(rows, columns=header, dtype=object))


def latex_text(text: str) -> str:
    """What T1 fonts have; of other letters the plain form, or else the code point."""
    return "".join(map(_latex_character, " ".join(text.split())))


def _latex_character(character: str) -> str:
    if character in LATEX:
        return LATEX[character]
    if character.isascii() or (character.isalpha() and "\u00c0" <= character <= "\u017e"):
        return character
    plain = unicodedata.normalize("NFKD", character).encode("ascii", "ignore").decode()
    return "".join(LATEX.get(c, c) for c in plain) or f"{{[}}U+{ord(character):04X}{{]}}"


def latex_marks(marks: str) -> str:
    return "".join(
        rf"\textsuperscript{{{mark}}}" if mark.isalpha() else latex_text(mark) for mark in marks
    )


def latex(table: PaperTable) -> str:
    """A document of its own with booktabs; the tabular alone can be taken into a paper."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dcr"), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, block_start_string="<%",
        block_end_string="%>", variable_start_string="<<", variable_end_string=">>",
        comment_start_string="<#", comment_end_string="#>",
    )  # fmt: skip
    environment.filters |= {"tex": latex_text, "marks": latex_marks}
    template = environment.get_template("paper_table.tex")
    return template.render(table=table, number=number, words=words, absent=ABSENT)


def templates() -> jinja2.Environment:
    """The HTML templates, in which all that came from files is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dcr"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["raised"] = lambda marks: Markup(superscript(marks))  # our own letters
    environment.globals |= {"number": number, "words": words, "absent": ABSENT}
    return environment


def html_page(table: PaperTable) -> str:
    """A page of its own."""
    return templates().get_template("paper_page.html").render(table=table)


WRITERS: dict[str, Callable[[PaperTable], str]] = {
    "md": markdown,
    "csv": csv_text,
    "tex": latex,
    "html": html_page,
}
