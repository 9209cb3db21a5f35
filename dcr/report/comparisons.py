"""Comparisons of methods: prompt by prompt, and in one sentence at equal safety."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from dcr import inference
from dcr.core import storage
from dcr.core.config import Kind
from dcr.core.statistics import Interval
from dcr.report import grids
from dcr.report.columns import Column, Group
from dcr.report.discernment import ranked_sets
from dcr.report.grids import Cell, Cells, Row
from dcr.report.records import Completions, flattened
from dcr.report.sections import Selection
from dcr.report.tables import EQUAL
from dcr.report.writing import TextTable

PAIRED_SEED = 0  # of the bootstrap, fixed so that a report is reproducible
MANY = 5  # columns or differences; a sentence names only the ends of more


@dataclass(frozen=True)
class PairedSet:
    """a - b over the same prompts: compliance if seemingly toxic, keyword refusal if toxic."""

    label: str
    kind: Kind
    n: int
    difference: Interval
    p: float
    pooled: bool


def paired(chosen: Selection) -> TextTable | None:
    """DCR against STL on the same prompts.

    Differences in percentage points over the prompts both answered, with bootstrap 95% intervals,
    and the exact two-sided p of McNemar's test, also adjusted by Holm for all sets of one
    comparison. Above zero DCR answers more seemingly toxic prompts, or refuses more toxic ones.
    """
    rows, notes, pooled = [], [], []
    for a, b, differing in partners(chosen.columns):
        name, sets = f"{a.name} − {b.name}", paired_sets(a, b, chosen.completions)
        if differing and sets:
            notes.append(
                f"{name}: besides the method they differ in settings of stage two: "
                f"{'; '.join(differing)}."
            )
        for one, holm in zip(sets, inference.holm([one.p for one in sets]), strict=True):
            quantity = "keyword refusal" if one.kind is Kind.toxic else "compliance"
            numbers = points(one.difference), p_value(one.p), p_value(holm)
            pooled += [len(rows)] * one.pooled
            rows.append((name, grids.in_words(one.label), quantity, one.n, *numbers))
    heads = ("runs", "set", "quantity", "prompts", "difference", "p", "p, Holm")
    table = TextTable.of(rows, *heads, notes=notes)
    return table and replace(table, brief=table.frame.iloc[pooled])


def partners(columns: Sequence[Column]) -> Iterator[tuple[Column, Column, list[str]]]:
    """Every DCR run with its STL run, and their other differences.

    Both have the model, seed, data and evaluation settings, and the last weights of stage two, with
    a readout or without. If there are several STL runs, only those nearest in the settings of stage
    two count.
    """
    for a in columns:
        alike = []
        for b in columns if a.about("method") == "dcr" else ():
            one, other = a.evaluation, b.evaluation
            ends = {one.weights, other.weights}
            if (
                b.about("method") == "stl"
                and all(a.about(key) == b.about(key) for key in ("model", "seed", "data"))
                and (len(ends) == 1 or ends == {"sft", "readout"})
                and one.settings == other.settings
            ):
                alike.append((a, b, differing_settings(a, b)))
        fewest = min((len(differing) for *_, differing in alike), default=0)
        yield from (pair for pair in alike if len(pair[2]) == fewest)


def differing_settings(a: Column, b: Column) -> list[str]:
    """Settings of stage two in which two runs differ, which no comparison should hide."""
    configs = []
    for column in (b, a):
        config = column.run.config
        data = node if isinstance(node := config.get("data"), dict) else {}
        sft = dict(config.get("sft") or {})
        if "readout" not in column.stages:
            sft["readout"] = {"steps": 0}
        parts = {"sft": sft} | {f"data.{rows}": data.get(rows) for rows in ("safety", "normal")}
        configs.append(flattened(parts))
    return storage.differences(*configs)


def paired_sets(a: Column, b: Column, completions: Completions) -> list[PairedSet]:
    """Each set that both answered, and all that may be pooled, by kind."""
    found = []
    for kind, wanted in grids.WANTED.items():
        names = [name for name in grids.set_names([a], kind) if name in b.evaluation.sets]
        pool, both = grids.together(names), dict[str, list[tuple[bool, bool]]]()
        for name in names:
            others = {(c.id, c.prompt): c.verdict for c in completions(b.evaluation, name)}
            both[name] = [
                (c.verdict == wanted, others[c.id, c.prompt] == wanted)
                for c in completions(a.evaluation, name)
                if (c.id, c.prompt) in others
            ]
        if len(pool) > 1:
            both["pooled"] = [pair for name in pool for pair in both[name]]
        for label, pairs in both.items():
            if pairs:
                first, second = ([bool(pair[side]) for pair in pairs] for side in (0, 1))
                difference = inference.paired_difference(first, second, seed=PAIRED_SEED)
                p, whole = inference.mcnemar(first, second), label == "pooled" or pool == [label]
                found.append(PairedSet(label, kind, len(pairs), difference, p, whole))
    return found


def points(difference: Interval) -> str:
    """`+3.0 [-1.2, +7.0]`: an interval in percentage points."""
    ends = (difference.estimate, difference.low, difference.high)
    estimate, low, high = (100 * end for end in ends)
    return f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


# --- the verdict --------------------------------------------------------------------------------


def headline(chosen: Selection) -> list[str]:
    """The sentences on top: a summary of all columns, and a warning for each that is silent."""
    blocks = chosen.section("results").blocks
    equal = [row for block in blocks if block.short == EQUAL for row in block.rows]
    at_safety = next((row for row in equal if "0.8" in row.label), None)
    sentences = []
    if at_safety:
        sentences.append(verdict(chosen.columns, chosen.groups, at_safety))
    elif chosen.columns:
        command = "python eval.py tasks=[discernment]"
        sentences.append(f"Nothing is known at equal safety, which {command} measures.")
    silent = [(column.name, column.evaluation.silence) for column in chosen.columns]
    return sentences + [f"Warning: {name}: {silence}." for name, silence in silent if silence]


def verdict(columns: Sequence[Column], groups: Sequence[Group], at_safety: Row) -> str:
    """A summary of all columns in a sentence or two; `at_safety` has what each then answers."""
    grouped = {place: group for group in groups if not group.less for place in group.places}
    cells, named = at_safety.values, dict[str, Cell | None]()
    for place, column in enumerate(columns):
        group = grouped.get(place)
        name = " ".join(group.label) if group else column.name
        named[name] = grids.of_group(group, cells) if group else cells[place]
    known = [f"{name} {grids.text_of(cell)}" for name, cell in named.items() if cell]
    if len(known) > MANY:
        ranked = sorted((cell.estimate, name) for name, cell in named.items() if cell)
        ends = (f"{name} {grids.text_of(named[name])}" for _, name in (ranked[0], ranked[-1]))
        known = [f"from {' to '.join(ends)} over {len(known)} columns"]
    lacking = [name for name, cell in named.items() if not cell]
    share = float(at_safety.label.split()[1].strip(","))
    asked = {frozenset(ranked_sets(c)) for c, cell in zip(columns, cells, strict=True) if cell}
    apart = "Not all were asked about the same sets, so these shares do not compare. "
    where = ", on sets that no column was trained on" * (grids.IN_DISTRIBUTION in at_safety.label)
    return (
        f"At equal safety (each refuses {share:.0%} of the toxic prompts, by its own threshold) "
        f"the share of seemingly toxic prompts answered is, in %{where}: {' → '.join(known)}"
        + f" (not measured: {', '.join(lacking[:MANY])})" * bool(lacking)
        + f". {apart * (len(asked) > 1)}{_differing(columns, groups, cells)}."
    )


def _differing(columns: Sequence[Column], groups: Sequence[Group], cells: Cells) -> str:
    """The differences seed by seed if there are several, else of DCR less STL by their intervals.

    The latter combine both intervals by squaring and adding (see `grids.rate`), as for independent
    prompts.
    """
    differences = {
        " ".join(group.label[:-1]): cell.interval
        for group in groups
        if group.less and (cell := grids.of_group(group, cells))
    }
    at = {column.name: cell.interval for column, cell in zip(columns, cells, strict=True) if cell}
    for a, b, differing in () if differences else partners(columns):
        if a.name in at and b.name in at:
            x, y = at[a.name], at[b.name]
            low = math.hypot(x.estimate - x.low, y.high - y.estimate)
            high = math.hypot(x.high - x.estimate, y.estimate - y.low)
            middle = x.estimate - y.estimate
            keys = [line.partition(":")[0].split(".")[:2] for line in differing]
            nodes = ", ".join(dict.fromkeys(map(".".join, keys)))
            beside = f" (also apart in {nodes})" if nodes else ""
            name = f"{a.name} − {b.name}{beside}"
            differences[name] = Interval(middle, middle - low, middle + high)
    if not differences:
        why = "No two of them are DCR and STL of one model, seed, data and evaluation"
        alone = "There is nothing beside it to compare with"
        return f"{why}, so no difference is tested" if len(columns) > 1 else alone
    above = sum(each.low > 0 for each in differences.values())
    below = sum(each.high < 0 for each in differences.values())
    if len(differences) > MANY:
        return (
            f"Of {len(differences)} differences from STL, {above} have a 95% interval above 0 and "
            f"{below} one below"
        )
    chance = "which may be chance (0 is in the interval)"
    sides = {(True, False): "more than by chance", (False, True): "fewer than by chance"}
    return "; ".join(
        f"{name}: {points(each)} points, {sides.get((each.low > 0, each.high < 0), chance)}"
        for name, each in differences.items()
    )
