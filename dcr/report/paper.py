"""The paper's Tables 1 to 5 with our own rows beside its rows."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import pandas as pd

from dcr.adopting import adopted
from dcr.core import storage
from dcr.core.runs import Run
from dcr.public import PAPER_SAFETY
from dcr.report import grids
from dcr.report.columns import FIRST_STAGE_ONLY, METHODS, READOUT, Column, Group
from dcr.report.grids import Cell
from dcr.report.records import flattened
from dcr.report.sections import Selection
from dcr.report.writing import ABSENT, TextTable
from dcr.results.frame import NORMAL
from dcr.results.schema import Quality
from dcr.stages import Cost

SETS = {  # the first evaluated one of several sets counts
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
# judges of safety, the best first; the paper's main table is by Llama Guard
GUARDS = ("llama_guard", "wildguard", "moderation")
SAFETY_SHARE = 0.8  # of toxic prompts refused, at which answered seemingly toxic ones are counted
RANKED = {"auroc": "discernment", "answered": f"answered_at_safety/{SAFETY_SHARE}"}
HEADS = {
    "complied": "compliance, all sets",
    "refused": "keyword refusal, all sets",
    "auroc": "AUROC",
    "answered": f"answered, safety {SAFETY_SHARE}",
    **{key: key for key in COLUMNS},
    "Safety_pooled": "Safety, pooled (DSR)",
    "keyword_refusal": "keyword refusal",
    "AlpacaEval": "AlpacaEval, %",
}
TITLES = {
    "table1": "Table 1: over-refusal, safety and general ability",
    "table2": "Table 2: time and memory of each stage",
    "table3": "Table 3: over-refusal, safety and general ability by epochs of stage one",
    "table4": "Table 4: the same by toxic prompts for each seemingly toxic one in stage one",
    "table5": "Table 5: the same responses by several judges",
}
# the paper's inconsistencies that touch a table, by their place in the facts file
ERRATA = {
    "table1": (
        *("Table 1/5 vs Tables 3/4", "Section 4.2 vs Table 1", "Section 7.1"),
        "Sections 2.2 and 6",
    ),
    "table3": ("Table 1/5 vs Tables 3/4", "A.10.3 vs Table 3"),
    "table4": ("Table 1/5 vs Tables 3/4",),
    "table5": ("Table 1/5 vs Tables 3/4", "A.10.5 vs Table 5", "Sections 2.2 and 6"),
}
TRAINED_ON_XSTEST = ("DCR", "STL-aug")
TABLE5_MODEL = "Qwen2.5-1.5B"
ABLATIONS = {  # the setting of a table's rows, and the key of the paper's rows
    "table3": ("dcr.epochs", "table3_epochs"),
    "table4": ("dcr.ratio", "table4_ratio"),
}
COSTS = {"minutes": "device minutes", "memory": "peak memory, GB", "speed": "tokens a second"}
COSTLY = {  # ours, and the paper's, which has no readout
    "contrastive": ("stage one", "dcr"),
    "sft": ("SFT", "alignment"),
    "readout": ("readout", None),
}
GB = 2**30 / 1e9  # in a GiB
SUITE_LEGEND = (
    "Compliance by XSTest's keyword rules. Ours with 95% intervals: Wilson, combined for the mean "
    "of the sets, ±1.96 standard errors for ability and win rates; means over seeds with their "
    "standard deviation, and differences from STL with Student's interval, seed by seed."
)
JUDGE_LEGEND = (
    "Compliance by keywords, or strict by the judge named; keywords say nothing of DSR. Ours with "
    "95% Wilson intervals, combined for the mean of the sets."
)
Cells = dict[str, Cell]
By = tuple[str, str]  # a judge and its model
BY_KEYWORDS: By = (grids.KEYWORD, "")


@dataclass(frozen=True)
class PaperRow:
    """A row: its method, the source of its numbers, model, run, cells, and judge or sets."""

    method: str
    source: str  # ours or paper
    model: str
    run: str
    cells: Cells
    judge: str = ""


def written(
    title: str,
    heads: Mapping[str, str],
    rows: Sequence[PaperRow],
    notes: Sequence[str],
    judge_head: str = "judge",
) -> TextTable:
    """Rows under `heads` by column; its values have estimate, interval, spread and prompts."""
    judged = any(row.judge for row in rows)
    parts = {"": "estimate", "_low": "low", "_high": "high", "_spread": "spread", "_n": "n"}
    texts, values = [], []
    for row in rows:
        about = ", ".join(filter(None, (row.source, row.model, row.run)))
        numbers = (number(row.cells.get(key), key) for key in heads)
        texts.append([row.method, about, *([row.judge] * judged), *numbers])
        ends = (getattr(row.cells.get(key), of, None) for key in heads for of in parts.values())
        marks = "; ".join(f"{key}:{cell.marks}" for key, cell in row.cells.items() if cell.marks)
        values.append([row.method, row.source, row.model, row.run, row.judge, *ends, marks])
    shown = ["method", "numbers of", *([judge_head] * judged), *heads.values()]
    ends = [f"{key}{end}" for key in heads for end in parts]
    named = ["method", "source", "model", "run", judge_head, *ends, "marks"]
    frame = pd.DataFrame(texts, columns=shown, dtype=object)
    return TextTable(title, frame, notes, pd.DataFrame(values, columns=named, dtype=object))


def number(cell: Cell | None, column: str) -> str:
    """A cell as text: `0.83 [0.78–0.87]†`."""
    if cell is None or cell.text:
        return cell.text if cell else ABSENT
    places = 1 if column == "AlpacaEval" else 2  # as many as the paper prints
    return grids.in_numbers(cell, 1, places, places) + cell.marks


@cache
def facts() -> dict[str, Any]:
    """The paper's numbers and its known inconsistencies."""
    return json.loads((files("dcr") / "paper_results.json").read_text(encoding="utf-8"))


# --- the tables ---------------------------------------------------------------------------------


def table1(chosen: Selection) -> TextTable:
    """Keyword compliance, defence success, ability and win rate by method."""
    columns = chosen.columns
    ours = [our_row(column, suite(column)) for column in columns]
    ours += [mean_row(group, ours) for group in chosen.groups]
    theirs = [
        PaperRow(method, "paper", model, "", _paper_cells(method, values))
        for model, by_method in facts()["table1_main"].items()
        if model in _paper_models(columns)
        for method, values in by_method.items()
    ]
    rows = sorted(ours + theirs, key=lambda row: _rank(row.method))
    notes = _notes("table1", rows, suite_notes(columns), SUITE_LEGEND)
    return written(TITLES["table1"], _heads(rows), rows, notes)


def table5(chosen: Selection) -> TextTable:
    """Table 1 without ability and quality, with one row a judge; seeds are not averaged."""
    rows = []
    for column in chosen.columns:
        rows.append(our_row(column, _judged(column, BY_KEYWORDS), "keyword"))
        for judge, model in grids.judges_of([column.evaluation]):
            name = grids.NAMES.get(judge, judge)
            cells = _judged(column, (judge, model))
            # outcomes and labels of one's own are other quantities
            if cells or judge in grids.NAMES:
                rows.append(our_row(column, cells, f"{name}: {model}" if model else name))
    for method, by_column in facts()["table5_judges"]["rows"].items():
        for judge in dict.fromkeys(judge for column in by_column.values() for judge in column):
            values = {key: of[judge] for key, of in by_column.items() if judge in of}
            named, cells = judge.replace("_", " "), _paper_cells(method, values)
            rows.append(PaperRow(method, "paper", TABLE5_MODEL, "", cells, named))
    rows.sort(key=lambda row: _rank(row.method))
    notes = _notes("table5", rows, _safety_notes(chosen.columns), JUDGE_LEGEND)
    return written(TITLES["table5"], _heads(rows), rows, notes)


def ablation(chosen: Selection, name: str) -> TextTable:
    """Table 3 or 4: a row for each value of a setting of stage one, after those without it."""
    key, theirs = ABLATIONS[name]
    columns, known, rows = chosen.columns, facts()[theirs], list[PaperRow]()
    for one in columns:
        value = ""
        if one.about("method") == "dcr":
            count = flattened(one.run.config).get(key)
            value = "all" if count is None else f"{count:g}"
        rows.append(our_row(one, _over_all_sets(one) | suite(one), value))
    rows += [mean_row(group, rows) for group in chosen.groups]
    for value, numbers in known["rows"].items():
        cells = _paper_cells("DCR", numbers)
        rows.append(PaperRow("DCR", "paper", known["model"], "", cells, value))

    def size(value: str) -> float:
        """3 of `3` and of the paper's `3:1`; `all` exceeds every number."""
        return float(value.split(":")[0]) if value[:1].isdecimal() else 1e9 * (value == "all")

    rows.sort(key=lambda row: (row.judge != "", size(row.judge)))
    notes = _notes(name, rows, suite_notes(columns), SUITE_LEGEND)
    return written(TITLES[name], _heads(rows), rows, notes, key)


def costs(chosen: Selection) -> TextTable:
    """Table 2: time and memory of the steps of each stage, measured here and in the paper."""
    rows: list[PaperRow] = []
    devices: list[str] = []
    for stage, (name, theirs) in COSTLY.items():
        ours = [our_row(one, _cost(one, stage, devices), name) for one in chosen.columns]
        ours += [mean_row(group, ours) for group in chosen.groups if not group.less]
        rows += [row for row in ours if row.cells]
        for model, by_stage in facts()["table2_cost"].items():
            if model != "units" and theirs:
                told = by_stage[theirs]
                minutes = Cell(float(told["time"].strip("<~")), text=told["time"])
                memory = Cell(told["memory_gb"], percent=False)
                cells = {"minutes": minutes, "memory": memory}
                rows.append(PaperRow("DCR", "paper", model, "", cells, name))
    notes = [
        f"{_cited()}, in GPU minutes, approximate.",
        f"Ours on {', '.join(dict.fromkeys(devices)) or 'no device'}: the steps of a stage without "
        "opening, saving and validation, and the most memory that its process held.",
        "A stage that was taken over from another run, or of which steps were taken by a process "
        "that was stopped, is told once or scaled to all steps.",
    ]
    return written(TITLES["table2"], COSTS, rows, notes, "stage")


# --- our rows -----------------------------------------------------------------------------------


def our_row(column: Column, cells: Cells, judge: str = "") -> PaperRow:
    """The row of one of our columns."""
    model = column.about("model")
    run = [part for part in column.label[1:] if part != model]
    return PaperRow(column.called(column.method), "ours", model, ", ".join(run), cells, judge)


def mean_row(group: Group, ours: Sequence[PaperRow]) -> PaperRow:
    """Means over seeds with their standard deviation, or a difference with its interval."""
    first = ours[group.places[0]]
    run = [part for part in group.label[1:] if part != first.model]
    means = {
        key: grids.of_group(group, [row.cells.get(key) for row in ours]) for key in first.cells
    }
    # of the columns that every seed has
    cells = {key: mean for key, mean in means.items() if mean and not mean.aside}
    less = f" − {ours[group.less[0]].method}" if group.less else ""
    return PaperRow(first.method + less, "ours", first.model, ", ".join(run), cells, first.judge)


def suite(column: Column) -> Cells:
    """Table 1's columns; keyword refusal stands in if no guard or moderation judged safety."""
    by_keywords, evaluation = _judged(column, BY_KEYWORDS), column.evaluation
    cells: dict[str, Cell | None] = {**by_keywords}
    if guard := _guard(column):
        by_guard = _judged(column, guard)
        cells = {k: (by_guard if k in SAFETY else by_keywords).get(k) for k in (*SETS, *SAFETY)}
    for head, (task, metric) in ABILITY.items():
        # a task may have no normalised accuracy
        known = (grids.accuracy(evaluation, task, each) for each in (metric, "acc"))
        cells[head] = next(filter(None, known), None)
    won = evaluation.quality
    if won and won.win_rate is not None:
        reach = NORMAL * (won.standard_error or 0.0)
        cells["AlpacaEval"] = Cell(won.win_rate, won.win_rate - reach, won.win_rate + reach, won.n)
    return {head: cell for head, cell in cells.items() if cell}


def _guard(column: Column) -> By | None:
    """The judge and model whose verdicts stand for safety."""
    sets = column.evaluation.sets
    known = [sets[name].judged for name in PAPER_SAFETY if name in sets]
    judges = {judge: of.model for judged in known for judge, of in judged.items()}
    return next(((judge, judges[judge]) for judge in GUARDS if judge in judges), None)


def _judged(column: Column, by: By) -> Cells:
    """Strict compliance and safety by a judge; by keywords, refusal instead of safety.

    Safety is the mean over the five sets and their pool; fewer than five have only the mean.
    """
    evaluation, cells = column.evaluation, dict[str, Cell | None]()
    for head, names in SETS.items():
        first = [name for name in names if name in evaluation.sets][:1]
        cells[head] = grids.rate(evaluation, first, "complied", *by)
    if by == BY_KEYWORDS:
        cells["keyword_refusal"] = grids.rate(evaluation, PAPER_SAFETY, "refused", mean=True)
    else:
        cells["Safety"] = grids.rate(evaluation, _safety_sets(column, by), "safe", *by, mean=True)
        cells["Safety_pooled"] = grids.rate(evaluation, PAPER_SAFETY, "safe", *by, whole=True)
    return {head: cell for head, cell in cells.items() if cell}


def _safety_sets(column: Column, by: By) -> list[str]:
    """Selects the paper's five sets that were judged, or evaluated by keywords."""
    quantity = "refused" if by == BY_KEYWORDS else "safe"
    return [name for name in PAPER_SAFETY if grids.rate(column.evaluation, [name], quantity, *by)]


def _over_all_sets(column: Column) -> Cells:
    """Compliance and refusal over all sets, and how well the kinds are ranked."""
    evaluation, cells = column.evaluation, dict[str, Cell | None]()
    for kind, quantity in grids.WANTED.items():
        names = grids.together(grids.set_names([column], kind))
        cells[quantity] = grids.rate(evaluation, names, quantity)
    cells |= {head: grids.ranked(evaluation, quantity) for head, quantity in RANKED.items()}
    return {head: cell for head, cell in cells.items() if cell}


def _cost(column: Column, stage: str, devices: list[str]) -> Cells:
    run = Run(column.run.folder)
    if stage in adopted(run) or not run.cost_file(stage).exists():
        return {}
    cost = storage.read_json(run.cost_file(stage), Cost)
    devices += [cost.device] if cost.device else []
    found = {
        "minutes": cost.seconds * cost.of_all_steps(stage, column.run.metrics) / 60,
        "memory": cost.peak_memory_gib * GB,
        "speed": cost.tokens_per_second,
    }
    return {head: Cell(value, percent=False) for head, value in found.items()}


# --- the paper's rows, and notes ----------------------------------------------------------------


def _paper_models(columns: Sequence[Column]) -> list[str]:
    """Selects the paper's models that we ran; all of them if we ran another one as well."""

    def plain(model: str) -> str:
        return re.sub(r"[^a-z0-9]", "", model.lower().rsplit("/", 1)[-1])

    theirs = list(facts()["table1_main"])
    ours = {plain(one.about("model")) for one in columns if one.evaluation.weights != "endpoint"}
    known = [model for model in theirs if plain(model) in ours]
    return known if known and ours == {plain(model) for model in known} else theirs


def _paper_cells(method: str, values: dict[str, float]) -> Cells:
    """The paper's numbers, marked where training saw the set."""
    seen = {"XS": grids.IN_DISTRIBUTION} if method in TRAINED_ON_XSTEST else {}
    return {key: Cell(v, marks=seen.get(key, ""), percent=False) for key, v in values.items()}


def _heads(rows: Sequence[PaperRow]) -> dict[str, str]:
    kept = {key for row in rows for key in row.cells} | {"Safety"}
    defended = any("Safety" in row.cells for row in rows if row.source == "ours")
    safety = {"Safety": "Safety (DSR)" if defended else "Safety (DSR, paper only)"}
    return {key: text for key, text in (HEADS | safety).items() if key in kept}


def _rank(method: str) -> int:
    order = list(METHODS.values())
    method = METHODS["dcr"] if method == FIRST_STAGE_ONLY else method.removesuffix(READOUT)
    return order.index(method) if method in order else len(order)


def _cited() -> str:
    paper = facts()["paper"]
    return f"Paper: {paper['title']}, arXiv {paper['arxiv']}"


def mark_notes(rows: Sequence[PaperRow]) -> list[str]:
    """A footnote for each of the daggers that occur."""
    marks = {mark for row in rows for cell in row.cells.values() for mark in cell.marks}
    return [f"{mark} {text}" for mark, text in grids.FOOTNOTES.items() if mark in marks]


def annotator_name(measured: Quality) -> str:
    """The annotator's name, with a note if it is no OpenAI GPT model, as the paper's was."""
    name = measured.annotator.rsplit("/", 1)[-1].lower()
    local = not name.startswith(("gpt-", "chatgpt-")) or name.startswith("gpt-oss")
    note = " (local annotator, not GPT-4o-mini)" if local else ""
    return f"annotator: {measured.annotator}{note}"


def suite_notes(columns: Sequence[Column]) -> list[str]:
    """Notes on how our Table 1 differs from the paper's."""
    notes = _safety_notes(columns)
    for column in columns:
        if (guard := _guard(column)) and guard[0] != GUARDS[0]:
            notes.append(f"DSR of {column.name} is by {grids.NAMES[guard[0]]}, not Llama Guard.")
    if scores := [a for column in columns for a in column.evaluation.ability.values()]:
        shots = " and ".join(map(str, sorted({a.shots for a in scores})))
        cut = " Some tasks were cut to a limit." if any(a.limit is not None for a in scores) else ""
        told = f"acc for MMLU, acc_norm elsewhere (acc where absent), {shots}-shot.{cut}"
        notes.append(f"Ability: {told}")
    won = dict.fromkeys(
        f"AlpacaEval: {annotator_name(q)}; reference: {q.reference or 'not named'}."
        for column in columns
        if (q := column.evaluation.quality)
    )
    return [*notes, *won]


def _safety_notes(columns: Sequence[Column]) -> list[str]:
    """Notes on the sets that safety is the mean of, and on each set of another size."""
    notes = []
    for column in columns:
        names = _safety_sets(column, _guard(column) or BY_KEYWORDS)
        if 0 < len(names) < len(PAPER_SAFETY):
            judged = ", ".join(names)
            notes.append(f"Safety of {column.name} is the mean over {judged} only, not over five.")
    if any(set(PAPER_SAFETY) <= set(column.evaluation.sets) for column in columns):
        notes.append("Safety is the mean over the paper's five sets; pooled: over their prompts.")
    for head, names in SETS.items():
        stated = re.search(r"n=(\d+)", facts()["columns"].get(head, ""))
        other = set()
        for sets in (column.evaluation.sets for column in columns):
            first = next((name for name in names if name in sets), None)
            if first and stated and sets[first].n != int(stated[1]):
                other.add(f"{first} {sets[first].n}")
        if stated and other:
            notes.append(f"{head}: ours {', '.join(sorted(other))}; the paper {stated[1]}.")
    return notes


def _notes(name: str, rows: Sequence[PaperRow], own: Sequence[str], legend: str) -> list[str]:
    """The daggers, the paper's inconsistencies, the legend, and our own."""
    known = {told["where"]: told["what"] for told in facts()["inconsistencies"]}
    errata = [f"{where}: {known[where]}" for where in ERRATA[name]]
    return [*mark_notes(rows), *errata, f"{_cited()}; its rows have no intervals.", legend, *own]
