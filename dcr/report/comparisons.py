"""Comparisons of methods, paired prompt by prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from dcr import statistics, storage
from dcr.config import Kind
from dcr.report.records import Answer, Column, flattened
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

    a: Column
    b: Column
    lines: list[PairedLine]
    differing: list[str]


def comparisons(
    columns: Sequence[Column], completions: Callable[[Column, str], list[Answer]]
) -> list[Comparison]:
    """DCR against STL of the same model, seed, data and evaluation settings, prompt by prompt.

    Of several STL runs only those nearest in the settings of stage two are compared with.
    """
    compared = []
    for a in columns:
        if a.about("method") != "dcr":
            continue
        partners = [
            (differing_settings(a, b), b)
            for b in columns
            if b.about("method") == "stl" and _comparable(a, b)
        ]
        fewest = min((len(differing) for differing, _ in partners), default=0)
        for differing, b in partners:
            if len(differing) == fewest:
                lines = _paired_lines(a, b, completions)
                if lines:
                    compared.append(Comparison(a, b, lines, differing))
    return compared


def _comparable(a: Column, b: Column) -> bool:
    same = all(a.about(key) == b.about(key) for key in ("model", "seed", "data"))
    one, other = a.evaluation, b.evaluation
    return same and (one.weights, one.settings) == (other.weights, other.settings)


def differing_settings(a: Column, b: Column) -> list[str]:
    """Settings of stage two in which two runs differ, which no comparison should hide."""
    configs = []
    for column in (a, b):
        config = column.run.config
        data = node if isinstance(node := config.get("data"), dict) else {}
        parts = {"sft": config.get("sft"), "data.safety": data.get("safety")}
        configs.append(flattened(parts | {"data.normal": data.get("normal")}))
    return storage.differences(configs[1], configs[0])


def _paired_lines(
    a: Column, b: Column, completions: Callable[[Column, str], list[Answer]]
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


def _verdicts(a: list[Answer], b: list[Answer], kind: Kind) -> tuple[list[bool], list[bool]]:
    """What is wanted of a kind of prompt, for the prompts that both runs answered."""
    others = {(completion.id, completion.prompt): completion for completion in b}
    both = [(c, others[c.id, c.prompt]) for c in a if (c.id, c.prompt) in others]
    wanted = kind is Kind.toxic
    return (
        [(first.verdict == "refused") is wanted for first, _ in both],
        [(second.verdict == "refused") is wanted for _, second in both],
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
