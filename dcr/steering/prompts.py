"""The prompts that steering vectors are computed from.

Leak-free unless the released prompts are asked for: whatever is equal or close to a prompt of an
evaluation set is dropped and counted, whichever source it comes from.
"""

from collections import Counter
from dataclasses import dataclass, field

from dcr.core import contamination, sources
from dcr.core.config import ConfigError, DataConfig, Kind, SourcesByKind
from dcr.core.data import apart, evaluation_prompts
from dcr.core.sources import Example
from dcr.steering import SteeringConfig

KINDS = tuple(kind.value for kind in Kind)
SURGICAL_RELEASED = SourcesByKind(
    toxic=["surgical_harmful_train"],
    seemingly_toxic=["surgical_orbench_train"],
    normal=["alpaca"],
)
# What the released code of each method reads; evaluation prompts are among them.
RELEASED = {
    "scans": SourcesByKind(toxic=["advbench"], normal=["truthfulqa"]),
    "surgical": SURGICAL_RELEASED,
    "ablation": SURGICAL_RELEASED,
}


@dataclass(frozen=True)
class Need:
    """How many prompts of each kind a method computes its vectors from, and the key to lower."""

    toxic: int = 0
    seemingly_toxic: int = 0
    normal: int = 0
    key: str = ""


def needed(settings: SteeringConfig) -> Need:
    """Of SCANS anchors, and as many again where the threshold is calibrated on them."""
    train, validation = settings.surgical.train, settings.surgical.validation
    if settings.method == "scans":
        anchors = settings.scans.anchors * (2 if settings.scans.threshold is None else 1)
        return Need(anchors, 0, anchors, f"steering.scans.anchors={settings.scans.anchors}")
    if settings.method == "surgical":
        key = f"steering.surgical.train={train} with steering.surgical.validation={validation}"
        return Need(*[train + validation] * 3, key=key)
    if settings.method == "ablation":
        return Need(train, 0, train, f"steering.surgical.train={train}")
    if settings.method == "probe":
        train = settings.probe.train
        return Need(train, train, 0, f"steering.probe.train={train}")
    return Need()


@dataclass(frozen=True)
class Extraction:
    """Prompts in drawn order, as many as the method needs, with what was dropped and why.

    `leaked` counts the prompts that stand in an evaluation set all the same, by set: of the
    released prompts alone.
    """

    toxic: list[Example] = field(default_factory=list)
    seemingly_toxic: list[Example] = field(default_factory=list)
    normal: list[Example] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    leaked: dict[str, int] = field(default_factory=dict)

    def parts(self) -> dict[str, list[Example]]:
        """What vectors are computed from, by kind."""
        return {kind: getattr(self, kind) for kind in KINDS}


def extraction(data: DataConfig, settings: SteeringConfig, seed: int) -> Extraction:
    """The prompts of `settings.method`, none for method=none.

    Raises ConfigError where a kind has too few prompts, and whatever `sources.read` raises.
    """
    need, evaluated = needed(settings), evaluation_prompts(data)
    clean: dict[str, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for kind in KINDS:
        rows = _drawn(kind, data.extraction, data.root, seed)
        clean[kind], reasons = apart(rows, evaluated, data.near_duplicate)
        dropped.update({f"{kind}: {reason}": count for reason, count in reasons.items()})
    named, drawn = data.extraction, clean
    if settings.released_data and settings.method in RELEASED:
        named = RELEASED[settings.method]
        drawn = {
            kind: _drawn(kind, named, data.root, seed) if getattr(need, kind) else []
            for kind in KINDS
        }
        dropped.clear()
    for kind, rows in drawn.items():
        if len(rows) < getattr(need, kind):
            cure = f"name more in data.extraction.{kind}"
            if named is not data.extraction:
                cure = "leave steering.released_data out"
            gone = sum(count for why, count in dropped.items() if why.startswith(f"{kind}:"))
            lost = f" ({gone} more stand in evaluation sets)" if gone else ""
            raise ConfigError(
                f"{need.key} asks for {getattr(need, kind)} {kind} prompts: "
                f"{', '.join(getattr(named, kind)) or 'no source'} has {len(rows)}{lost}; "
                f"lower it, or {cure}"
            )
    taken = {kind: rows[: getattr(need, kind)] for kind, rows in drawn.items()}
    used = [row for rows in taken.values() for row in rows]
    overlaps = contamination.overlaps(
        [row.prompt for row in used], evaluated, near=data.near_duplicate
    )
    return Extraction(
        **taken,
        dropped=dict(dropped),
        leaked=dict(Counter(overlap.set for overlap in overlaps if overlap is not None)),
    )


def _drawn(kind: str, named: SourcesByKind, root: str | None, seed: int) -> list[Example]:
    """All distinct rows of a kind's sources in drawn order."""
    names = getattr(named, kind)
    read = [row for name in names for row in sources.read(name, root=root, kind=Kind(kind))]
    rows, _ = sources.drop_duplicates(read)
    return sources.draw(rows, len(rows), seed)
