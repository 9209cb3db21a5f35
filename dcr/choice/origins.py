"""Pairs of sources to train a probe on, pairs of another origin to test it on, and their rows."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dcr.core import sources
from dcr.core.config import ConfigError, DataConfig, DataError, Kind
from dcr.core.evaluation import pairs_of
from dcr.core.sources import Example
from dcr.public import SOURCES
from dcr.resolving import source_names

LIMIT = 200  # prompts of each class of a pair
FEWEST = 10  # fewer say nothing

# Usual candidates; the first two have the paper's seemingly toxic source.
ALTERNATIVES = ("xstest_safe:stl_safety", "xstest_safe:xstest_unsafe", "orbench_hard:harmfulqa")
DEMO_ALTERNATIVES = ("demo_seemingly_toxic:demo_toxic", "demo_seemingly_toxic:demo_toxic_matched")


@dataclass(frozen=True)
class SourcePair:
    """Sources of seemingly toxic prompts and of toxic ones."""

    seemingly_toxic: tuple[str, ...]
    toxic: tuple[str, ...]

    @property
    def sides(self) -> tuple[tuple[Kind, tuple[str, ...]], tuple[Kind, tuple[str, ...]]]:
        """Kind and sources of both sides, in the order of the labels 0 and 1."""
        return (Kind.seemingly_toxic, self.seemingly_toxic), (Kind.toxic, self.toxic)

    @property
    def names(self) -> set[str]:
        return {*self.seemingly_toxic, *self.toxic}

    def __str__(self) -> str:
        return " / ".join("+".join(side) for side in (self.seemingly_toxic, self.toxic))


Sides = dict[tuple[Kind, tuple[str, ...]], list[Example]]


@dataclass(frozen=True)
class Material:
    """Candidates with the configured pair first, test sets by label, and the rows of all sides."""

    candidates: list[SourcePair]
    tests: dict[str, SourcePair]
    rows: Sides
    notes: list[str] = field(default_factory=list)

    @property
    def used(self) -> Sides:
        """The rows of candidates and test sets, each side once."""
        pairs = [*self.candidates, *self.tests.values()]
        return {side: self.rows[side] for pair in pairs for side in pair.sides}

    def tests_of(self, pair: SourcePair) -> dict[str, SourcePair]:
        """The test sets of another origin than the pair."""
        return {k: test for k, test in self.tests.items() if not related(test.names, pair.names)}


def parsed(key: str, value: str) -> list[SourcePair]:
    """`safe:toxic,safe:toxic+toxic` as pairs, "none" as no pair. Raises ConfigError otherwise."""
    pairs = []
    for item in [] if value == "none" else value.strip("[]").split(","):
        sides = [tuple(filter(None, half.split("+"))) for half in item.strip().split(":")]
        if len(sides) != 2 or not all(sides):
            raise ConfigError(
                f"{key}={value}: give <seemingly toxic>:<toxic>, several with commas between, "
                "several sources of one side as a+b"
            )
        pairs.append(SourcePair(*sides))
    return pairs


def gathered(
    data: DataConfig,
    seed: int,
    limit: int = LIMIT,
    pairs: str | None = None,
    tests: str | None = None,
) -> Material:
    """Candidates, test sets and their rows, at most `limit` of a side, drawn by seed.

    `pairs` are further candidates (None: the usual ones that can be read, "none": no other),
    `tests` the sets to test on (None: the pairs of public sets that can be read).
    Raises ConfigError and DataError where a source that the settings or the user name cannot be
    read or holds too few rows, and where no test set is of another origin.
    """
    if limit < FEWEST:
        raise ConfigError(f"limit={limit}: give {FEWEST} prompts of each class or more")
    nodes = {"seemingly_toxic": data.seemingly_toxic, "toxic": data.toxic}
    named = (source_names(node.source, f"data.{key}.source") for key, node in nodes.items())
    first = SourcePair(*map(tuple, named))
    material = Material([first], {}, {})
    draw = functools.partial(_drawn, root=data.root, limit=limit, seed=seed)
    _readable(material, first, draw, asked=True)
    # the usual candidates are of the embedded corpus alone where nothing else is configured
    others = data.root is not None or any(n in SOURCES and not _embedded(n) for n in first.names)
    usual = ",".join(ALTERNATIVES if others else DEMO_ALTERNATIVES)
    for pair in parsed("pairs", usual if pairs is None else pairs):
        known = pair in material.candidates
        if not known and _readable(material, pair, draw, asked=pairs is not None):
            material.candidates.append(pair)
    offered = usual_tests(data) if tests is None else {str(p): p for p in parsed("tests", tests)}
    for label, test in offered.items():
        if all(related(test.names, pair.names) for pair in material.candidates):
            material.notes.append(f"{label}: not tested on, since it has the training rows' origin")
        elif _readable(material, test, draw, asked=tests is not None):
            material.tests[label] = test
            if all(map(_embedded, {*first.names, *test.names})):
                material.notes.append(f"{label}: from the training corpus, hardly another origin")
    for pair in [pair for pair in material.candidates if not material.tests_of(pair)]:
        if pair == first or pairs is not None:
            raise ConfigError(
                f"tests: no set of another origin than {pair} can be read; name one with "
                "tests=<seemingly toxic>:<toxic>, or set data.root"
            )
        material.candidates.remove(pair)
        material.notes.append(f"{pair}: left out, no test set is of another origin")
    return material


def _readable(
    material: Material, pair: SourcePair, draw: Callable[..., list[Example]], asked: bool
) -> bool:
    """Read a pair into the material; a note says which usual pair cannot be read.

    Raises DataError for a pair that the user asked for.
    """
    try:
        for kind, names in pair.sides:
            if (kind, names) not in material.rows:
                material.rows[kind, names] = draw(kind, names)
    except DataError as error:
        if asked:
            raise
        material.notes.append(f"{pair}: left out ({error})")
        return False
    return True


def usual_tests(data: DataConfig) -> dict[str, SourcePair]:
    """The benchmarks' pairs that are embedded, lie in `data.root` or are configured, by label."""
    evaluated = {*data.evaluation.over_refusal, *data.evaluation.safety}
    there = [
        name
        for name, source in SOURCES.items()
        # the registers are a test by themselves, on which a probe of calm pairs is at chance
        if (_embedded(name) and not name.startswith("registers_"))
        or (data.root is None and name in evaluated)
        or (data.root and source.file and os.path.isfile(os.path.join(data.root, source.file)))
    ]
    return {label: SourcePair(*sides) for label, sides in pairs_of(there).items()}


def _drawn(
    kind: Kind, names: Sequence[str], root: str | None, limit: int, seed: int
) -> list[Example]:
    read = [row for name in names for row in sources.read(name, root=root, kind=kind)]
    distinct, _ = sources.drop_duplicates(read)
    if len(distinct) < FEWEST:
        raise DataError(
            f"{'+'.join(names)}: {len(distinct)} distinct prompts, {FEWEST} are needed; "
            "name another source"
        )
    return sources.draw(distinct, min(limit, len(distinct)), seed)


def _embedded(name: str) -> bool:
    return name in SOURCES and SOURCES[name].embedded is not None


def related(one: set[str], other: set[str]) -> bool:
    """Whether some prompts of both come from one collection."""
    return bool(_collections(one) & _collections(other))


def _collections(names: Sequence[str] | set[str]) -> set[str]:
    collections = set(names)
    for name in names:
        source = SOURCES.get(name)
        if source is not None:
            hub = source.hub.id if source.hub and "/" in source.hub.id else None
            collections |= {part for part in (source.part_of, source.file, hub) if part}
    return collections
