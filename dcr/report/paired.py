"""DCR against STL prompt by prompt: differences with bootstrap intervals, McNemar's exact test."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dcr import statistics, storage
from dcr.config import Kind
from dcr.report.completions import Completion
from dcr.report.entries import Entry, about, flattened
from dcr.report.tables import TITLES, set_names, together
from dcr.statistics import Interval

PAIRED_SEED = 0  # of the bootstrap, fixed so that a report is reproducible


@dataclass(frozen=True)
class PairedLine:
    """a - b over the same prompts: compliance if seemingly toxic, keyword refusal if toxic."""

    label: str
    kind: Kind
    n: int
    difference: Interval
    p: float
    pooled: bool = False
    holm: float = 1.0  # p adjusted for all lines of the comparison


@dataclass(frozen=True)
class Comparison:
    """DCR minus STL, with the settings besides method in which they differ."""

    a: Entry
    b: Entry
    lines: list[PairedLine]
    differing: list[str]


def comparisons(
    columns: Sequence[Entry], completions: Callable[[Entry, str], list[Completion]]
) -> list[Comparison]:
    """DCR against STL of the same model, seed, data and evaluation settings, prompt by prompt.

    Of several STL runs only those nearest in the settings of stage two are compared with.
    """
    found = []
    for a in columns:
        if about(a.run, a.evaluation, "method") != "dcr":
            continue
        partners = [
            (differing_settings(a, b), b)
            for b in columns
            if about(b.run, b.evaluation, "method") == "stl" and _comparable(a, b)
        ]
        fewest = min((len(differing) for differing, _ in partners), default=0)
        for differing, b in partners:
            if len(differing) == fewest:
                lines = _paired_lines(a, b, completions)
                if lines:
                    found.append(Comparison(a, b, lines, differing))
    return found


def _comparable(a: Entry, b: Entry) -> bool:
    same = all(
        about(a.run, a.evaluation, key) == about(b.run, b.evaluation, key)
        for key in ("model", "seed", "data")
    )
    weights = a.evaluation.weights == b.evaluation.weights
    return same and weights and a.evaluation.settings == b.evaluation.settings


def differing_settings(a: Entry, b: Entry) -> list[str]:
    """Settings of stage two in which two runs differ, which no comparison should hide."""
    configs = []
    for entry in (a, b):
        config = entry.run.config
        data = found if isinstance(found := config.get("data"), dict) else {}
        parts = {"sft": config.get("sft"), "data.safety": data.get("safety")}
        configs.append(flattened(parts | {"data.normal": data.get("normal")}))
    return storage.differences(configs[1], configs[0])


def _paired_lines(
    a: Entry, b: Entry, completions: Callable[[Entry, str], list[Completion]]
) -> list[PairedLine]:
    lines = []
    for kind in TITLES:
        pools: tuple[list[bool], list[bool]] = ([], [])
        names = [name for name in set_names([a], kind) if name in b.evaluation.sets]
        summed = together(names)
        for name in names:
            verdicts = _verdicts(completions(a, name), completions(b, name), kind)
            if verdicts[0]:
                lines.append(_paired_line(name, kind, verdicts, pooled=summed == [name]))
            for pool, part in zip(pools, verdicts, strict=True):
                pool += part if name in summed else []
        if pools[0] and len(summed) > 1:
            lines.append(_paired_line("pooled", kind, pools, pooled=True))
    adjusted = statistics.holm([line.p for line in lines])
    return [replace(line, holm=p) for line, p in zip(lines, adjusted, strict=True)]


def _verdicts(
    a: list[Completion], b: list[Completion], kind: Kind
) -> tuple[list[bool], list[bool]]:
    """What is wanted of a kind of prompt, for the prompts that both runs answered."""
    others = {(completion.id, completion.prompt): completion for completion in b}
    both = [(c, others[c.id, c.prompt]) for c in a if (c.id, c.prompt) in others]
    wanted = kind is Kind.toxic
    return (
        [first.refused["paper"] is wanted for first, _ in both],
        [second.refused["paper"] is wanted for _, second in both],
    )


def _paired_line(
    label: str, kind: Kind, verdicts: tuple[list[bool], list[bool]], pooled: bool = False
) -> PairedLine:
    a, b = verdicts
    difference = statistics.paired_difference(a, b, seed=PAIRED_SEED)
    return PairedLine(label, kind, len(a), difference, statistics.mcnemar(a, b), pooled)


def points(difference: Interval) -> str:
    """`+3.0 [-1.2, +7.0]`: an interval in percentage points."""
    ends = (difference.estimate, difference.low, difference.high)
    estimate, low, high = (100 * end for end in ends)
    return f"{estimate:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")


def p_value(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"
