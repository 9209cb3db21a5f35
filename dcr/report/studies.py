"""The paper's Tables 2 to 4: what the stages cost, and Table 1's columns by epochs and by ratio."""

from collections.abc import Sequence
from functools import partial

from dcr.core import storage
from dcr.core.results.schema import interval
from dcr.core.runs import Cost, Run
from dcr.report import paper
from dcr.report.paper import PaperRow, PaperTable
from dcr.report.records import Column, Group, flattened
from dcr.report.tables import IN_DISTRIBUTION, WANTED, Cell, rate, set_names, together

# By the name of a table: the setting, the paper's rows, and the inconsistencies that touch these.
ABLATIONS = {
    "table3": ("dcr.epochs", "table3_epochs", ("Table 1/5 vs Tables 3/4", "A.10.3 vs Table 3")),
    "table4": ("dcr.ratio", "table4_ratio", ("Table 1/5 vs Tables 3/4",)),
}
SAFETY = 0.8  # of toxic prompts refused, where the seemingly toxic ones answered are counted
TITLES = {
    "table2": "Table 2: time and memory of each stage",
    "table3": "Table 3: over-refusal, safety and general ability by epochs of stage one",
    "table4": "Table 4: the same by toxic prompts for each seemingly toxic one in stage one",
}
# Beside Table 1's columns, which know the paper's sets alone.
POOLED = {
    "complied": "compliance, all sets",
    "refused": "keyword refusal, all sets",
    "auroc": "AUROC",
    "answered": f"answered, safety {SAFETY}",
}
COSTS = {"minutes": "device minutes", "memory": "peak memory, GB", "speed": "tokens a second"}
STAGES = {"contrastive": ("stage one", "dcr"), "sft": ("SFT", "alignment")}  # ours, the paper's
GB = 2**30 / 1e9  # in a GiB


def ablation(name: str, columns: Sequence[Column], groups: Sequence[Group]) -> PaperTable:
    """A row for each value of a setting of stage one, behind those without that stage."""
    key, theirs, errata = ABLATIONS[name]
    facts, whole = paper.facts(), paper.table1(columns, groups)
    ours = [
        paper.our_row(one, _pooled(one) | paper.suite(one), _value(one, key)) for one in columns
    ]
    rows = ours + [paper.mean_row(group, ours) for group in groups]
    for value, numbers in facts[theirs]["rows"].items():
        cells = {
            head: Cell(number, percent=False, marks=IN_DISTRIBUTION if head == "XS" else "")
            for head, number in numbers.items()
        }
        rows.append(PaperRow("DCR", "paper", facts[theirs]["model"], "", cells, value))
    rows.sort(key=lambda row: (row.judge != "", _number(row.judge)))
    notes = [
        note for note in whole.notes if not note[1].startswith(tuple(paper.ERRATA["table1"]))
    ] + [
        ("", f"{known['where']}: {known['what']}")
        for known in facts["inconsistencies"]
        if known["where"] in errata
    ]
    heads = {head: text for head, text in POOLED.items() if any(head in row.cells for row in rows)}
    return PaperTable(name, TITLES[name], heads | whole.heads, rows, notes, judge_head=key)


def _pooled(column: Column) -> dict[str, Cell]:
    """What is wanted of each kind of prompt over all sets, and how well the kinds are ranked."""
    cells = {}
    for kind, quantity in WANTED.items():
        names = together(set_names([column], kind))
        if cell := rate(column.evaluation, names, quantity):
            cells[quantity] = cell
    ranked = column.evaluation.discernment
    if ranked and ranked.pooled:
        answered = ranked.pooled.answered.get(str(SAFETY))
        for head, estimate in (("auroc", ranked.pooled.auroc), ("answered", answered)):
            if estimate:
                found = interval(estimate)
                cells[head] = Cell(found.estimate, found.low, found.high, percent=False)
    return cells


def _value(column: Column, key: str) -> str:
    if column.about("method") != "dcr":
        return ""
    value = flattened(column.run.config).get(key)
    return "all" if value is None else f"{value:g}"


def _number(value: str) -> float:
    """Of `3`, of the paper's `3:1`, and behind them of `all`."""
    return float(value.split(":")[0]) if value[:1].isdecimal() else float(value == "all") * 1e9


def costs(columns: Sequence[Column], groups: Sequence[Group]) -> PaperTable:
    """What the steps of each stage took: measured here, and in the paper."""
    rows: list[PaperRow] = []
    devices: list[str] = []
    for stage, (name, theirs) in STAGES.items():
        ours = [paper.our_row(one, _cost(one, stage, devices), name) for one in columns]
        ours += [paper.mean_row(group, ours) for group in groups if not group.less]
        rows += [row for row in ours if row.cells]
        for model, by_stage in paper.facts()["table2_cost"].items():
            if model != "units":
                told = by_stage[theirs]
                minutes = Cell(float(told["time"].strip("<~")), text=told["time"])
                memory = Cell(told["memory_gb"], percent=False)
                cells = {"minutes": minutes, "memory": memory}
                rows.append(PaperRow("DCR", "paper", model, "", cells, name))
    cited = paper.facts()["paper"]
    notes = [
        f"Paper: {cited['title']}, arXiv {cited['arxiv']}, in GPU minutes, approximate.",
        f"Ours on {', '.join(dict.fromkeys(devices)) or 'no device'}: the steps of a stage without "
        "opening, saving and validation, and the most memory that its process held.",
        "A stage that was taken over from another run, or of which steps were taken by a process "
        "that was stopped, is told once or scaled to all steps.",
    ]
    told = [("", note) for note in notes]
    return PaperTable("table2", TITLES["table2"], COSTS, rows, told, judge_head="stage")


def _cost(column: Column, stage: str, devices: list[str]) -> dict[str, Cell]:
    run = Run(column.run.folder)
    adopted = stage == "contrastive" and run.adopted_file.exists()
    if adopted or not run.cost_file(stage).exists():
        return {}
    cost = storage.read_json(run.cost_file(stage), Cost)
    devices += [cost.device] if cost.device else []
    found = {
        "minutes": cost.seconds * cost.of_all_steps(stage, column.run.metrics) / 60,
        "memory": cost.peak_memory_gib * GB,
        "speed": cost.tokens_per_second,
    }
    return {head: Cell(value, percent=False) for head, value in found.items()}


TABLES = {"table2": costs, **{name: partial(ablation, name) for name in ABLATIONS}}
