"""The prompts of each task: named sets, a user's files, and which of them belong together."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dcr.core import sources
from dcr.core.config import ConfigError, DataConfig, Kind, class_of, is_path
from dcr.core.sources import Example
from dcr.core.text import label_of

# The sets of the paper's tables: 938 toxic prompts, and five over-refusal sets. Its PHTest also
# counts the controversial tier, which is told apart here.
PAPER_SAFETY: tuple[str, ...] = (
    "i_malicious_instructions",
    "i_cona",
    "i_controversial",
    "q_harm",
    "advbench",
)
PAPER_OVER_REFUSAL: tuple[str, ...] = (
    "xstest_safe",
    "coconot_contrast",
    "orbench_hard",
    "oktest",
    "phtest_harmless",
)

# Shown on their own and never averaged or pooled with the others: a set whose prompts another set
# holds too, and one whose prompts a model may well refuse.
APART = ("coconot_safety", "phtest_controversial")

# Sets that belong together, seemingly toxic and toxic: their discernment is read apart from the
# pooled one. OR-Bench's own toxic prompts are on the hub alone, so HarmfulQ stands in for them;
# OKTest was written without a toxic side.
Pair = tuple[tuple[str, ...], tuple[str, ...]]
PAIRS: tuple[Pair, ...] = (
    (("demo_seemingly_toxic_heldout",), ("demo_toxic_heldout",)),
    (("xstest_safe",), ("xstest_unsafe",)),
    (("coconot_contrast",), ("coconot_original",)),
    (("coconot_safety",), ("coconot_original",)),
    (("orbench_hard",), ("orbench_toxic",)),
    (("orbench_hard",), ("harmfulq",)),
    (("oktest",), PAPER_SAFETY),
    (("jailbreakbench_benign",), ("jailbreakbench",)),
)
SIDES: dict[tuple[str, ...], str] = {
    PAPER_SAFETY: "paper_safety"
}  # names of sides that hold several sets


@dataclass(frozen=True)
class PromptSet:
    """A named set of prompts of one kind."""

    name: str
    kind: Kind
    rows: list[Example]


# A model answers the prompts of these tasks: it should comply with harmless ones that look harmful,
# and refuse toxic ones. Discernment ranks both.
TASKS = {"over_refusal": Kind.seemingly_toxic, "safety": Kind.toxic}
DISCERNMENT = "discernment"


def of_tasks(
    tasks: Sequence[str], config: DataConfig, limit: int | None, seed: int
) -> list[PromptSet]:
    """The sets of the tasks, each cut to a seeded sample of `limit` rows.

    Tasks without prompts of either kind (ability, quality) bring none. Raises ConfigError when two
    sets would have one name.
    """
    read = [
        read_set(source, TASKS[task], config.root, limit, seed, scored=True)
        for task in tasks
        if task in TASKS
        for source in getattr(config.evaluation, task)
    ]
    names = [prompt_set.name for prompt_set in read]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"data.evaluation: {sorted(twice)[0]} stands there twice; rename one")
    return read


def read_set(
    source: str,
    kind: Kind,
    root: str | None,
    limit: int | None,
    seed: int,
    scored: bool = False,
) -> PromptSet:
    """One set, cut to a seeded sample of `limit` rows; `scored` as in `sources.read`."""
    rows = sources.read(source, root=root, kind=kind, scored=scored)
    if limit is not None and limit < len(rows):
        rows = sources.draw(rows, limit, seed)
    return PromptSet(set_name(source), kind, rows)


def pairs_of(names: Iterable[str]) -> dict[str, Pair]:
    """The pairs of which every set is among `names`, by label: `oktest / paper_safety`."""
    there = set(names)
    return {
        " / ".join(SIDES.get(side, " + ".join(side)) for side in pair): pair
        for pair in PAIRS
        if there.issuperset(pair[0] + pair[1])
    }


def set_name(source: str) -> str:
    """The name of a set and of its file in the run folder: a source's, a file's or a class's."""
    known = source in sources.SOURCES or is_path(source)
    return class_of(source) if known else label_of(Path(source).stem)
