"""The prompts that steering vectors are computed from, and the split that strengths are chosen on.

Leak-free unless the released prompts are asked for: whatever is equal or close to a prompt of an
evaluation set is dropped and counted, whichever source it comes from.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from dcr import contamination, sources
from dcr.config import (
    ConfigError,
    DataConfig,
    ExtractionSources,
    Kind,
    Steering,
    SteeringConfig,
)
from dcr.sources import Example
from dcr.text import normalise

KINDS = {
    "toxic": Kind.toxic,
    "seemingly_toxic": Kind.seemingly_toxic,
    "normal": Kind.normal,
}
SURGICAL_RELEASED = ExtractionSources(
    toxic=["surgical_harmful_train"],
    seemingly_toxic=["surgical_orbench_train"],
    normal=["alpaca"],
)
# What the released code of each method reads; evaluation prompts are among them.
RELEASED = {
    Steering.scans: ExtractionSources(toxic=["advbench"], normal=["truthfulqa"]),
    Steering.surgical: SURGICAL_RELEASED,
    Steering.ablation: SURGICAL_RELEASED,
}


@dataclass(frozen=True)
class Need:
    """How many prompts of each kind a method computes its vectors from, and the key to lower."""

    toxic: int
    seemingly_toxic: int
    normal: int
    key: str


def _scans(settings: SteeringConfig) -> Need:
    """Anchors for the vectors, and as many again to calibrate the threshold on."""
    anchors = settings.scans.anchors * (2 if settings.scans.threshold is None else 1)
    return Need(anchors, 0, anchors, f"steering.scans.anchors={settings.scans.anchors}")


def _surgical(settings: SteeringConfig) -> Need:
    train, validation = settings.surgical.train, settings.surgical.validation
    key = f"steering.surgical.train={train} with steering.surgical.validation={validation}"
    return Need(train + validation, train + validation, train + validation, key)


def _ablation(settings: SteeringConfig) -> Need:
    train = settings.surgical.train
    return Need(train, 0, train, f"steering.surgical.train={train}")


NEEDS: dict[Steering, Callable[[SteeringConfig], Need]] = {
    Steering.scans: _scans,
    Steering.surgical: _surgical,
    Steering.ablation: _ablation,
}


@dataclass(frozen=True)
class Extraction:
    """Prompts in drawn order, as many as the method needs, with what was dropped and why.

    `leaked` counts the prompts that stand in an evaluation set all the same, by set: of the
    released prompts alone.

    The validation lists hold what extraction leaves of `data.extraction`, free of evaluation
    prompts in every case. They begin at the far end of the draw, so that methods which extract from
    more or fewer prompts share their first rows.
    """

    toxic: list[Example] = field(default_factory=list)
    seemingly_toxic: list[Example] = field(default_factory=list)
    normal: list[Example] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    leaked: dict[str, int] = field(default_factory=dict)
    validation_toxic: list[Example] = field(default_factory=list)
    validation_seemingly_toxic: list[Example] = field(default_factory=list)

    def parts(self) -> dict[str, list[Example]]:
        """What vectors are computed from, by kind."""
        return {kind: getattr(self, kind) for kind in KINDS}


def extraction(data: DataConfig, settings: SteeringConfig, seed: int) -> Extraction:
    """The prompts of `settings.method`, none for Steering.none, and the validation split.

    Raises ConfigError where a kind has too few prompts, and whatever `sources.read` raises.
    """
    need = NEEDS[settings.method](settings) if settings.method in NEEDS else Need(0, 0, 0, "")
    evaluated = _evaluated(data)
    clean: dict[str, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for kind in KINDS:
        rows = _drawn(kind, getattr(data.extraction, kind), data, seed)
        clean[kind], gone = _sifted(rows, evaluated, data.near_duplicate)
        dropped.update({f"{kind}: {why}": count for why, count in gone.items()})
    if settings.released_data and settings.method in RELEASED:
        taken = _released(need, data, RELEASED[settings.method], seed)
        dropped.clear()
    else:
        taken = {
            kind: _taken(kind, rows, getattr(data.extraction, kind), need, dropped)
            for kind, rows in clean.items()
        }
    used = [row for rows in taken.values() for row in rows]
    prompts = {normalise(row.prompt) for row in used}
    left = {
        kind: [row for row in reversed(rows) if normalise(row.prompt) not in prompts]
        for kind, rows in clean.items()
    }
    found = contamination.overlaps([r.prompt for r in used], evaluated, near=data.near_duplicate)
    return Extraction(
        **taken,
        dropped=dict(dropped),
        leaked=dict(Counter(overlap.set for overlap in found if overlap is not None)),
        validation_toxic=left["toxic"],
        validation_seemingly_toxic=left["seemingly_toxic"],
    )


def _evaluated(data: DataConfig) -> dict[str, list[str]]:
    asked = (
        (Kind.seemingly_toxic, data.evaluation.over_refusal),
        (Kind.toxic, data.evaluation.safety),
    )
    return {
        name: [row.prompt for row in sources.read(name, root=data.root, kind=kind)]
        for kind, names in asked
        for name in names
    }


def _drawn(kind: str, names: Sequence[str], data: DataConfig, seed: int) -> list[Example]:
    """All distinct rows of the sources in drawn order."""
    read = [row for name in names for row in sources.read(name, root=data.root, kind=KINDS[kind])]
    rows, _ = sources.drop_duplicates(read)
    return sources.draw(rows, len(rows), seed)


def _sifted(
    rows: Sequence[Example], evaluated: Mapping[str, Sequence[str]], near: float
) -> tuple[list[Example], Counter[str]]:
    """The rows apart from evaluation prompts, and why how many others went."""
    found = contamination.overlaps([row.prompt for row in rows], evaluated, near=near)
    gone = Counter(
        f"{'is' if overlap.exact else 'is close to'} a prompt of {overlap.set}"
        for overlap in found
        if overlap is not None
    )
    return [row for row, overlap in zip(rows, found, strict=True) if overlap is None], gone


def _taken(
    kind: str,
    rows: Sequence[Example],
    names: Sequence[str],
    need: Need,
    dropped: Mapping[str, int],
) -> list[Example]:
    wanted = getattr(need, kind)
    if wanted > len(rows):
        gone = sum(count for why, count in dropped.items() if why.startswith(f"{kind}:"))
        lost = f" ({gone} more stand in evaluation sets)" if gone else ""
        raise ConfigError(
            f"{need.key} asks for {wanted} {kind} prompts: {', '.join(names) or 'no source'} has "
            f"{len(rows)}{lost}; lower it or name more in data.extraction.{kind}"
        )
    return list(rows[:wanted])


def _released(
    need: Need, data: DataConfig, named: ExtractionSources, seed: int
) -> dict[str, list[Example]]:
    taken = {}
    for kind in KINDS:
        names, wanted = getattr(named, kind), getattr(need, kind)
        rows = _drawn(kind, names, data, seed) if wanted else []
        if wanted > len(rows):
            raise ConfigError(
                f"{need.key} asks for {wanted} {kind} prompts: {', '.join(names)} has {len(rows)}; "
                "lower it, or leave steering.released_data out"
            )
        taken[kind] = rows[:wanted]
    return taken
