"""The prompts that steering vectors are computed from.

A prompt that is equal or close to one of an evaluation set is dropped and counted, whichever source
it comes from, unless the settings ask for the released prompts.
"""

from collections import Counter
from dataclasses import dataclass, field

from dcr.core import sources
from dcr.core.config import ConfigError, DataConfig, Kind, SourcesByKind
from dcr.core.data import apart, evaluation_prompts
from dcr.core.sources import Example
from dcr.overlaps import overlaps
from dcr.steering import SteeringConfig

KINDS = tuple(kind.value for kind in Kind)
SURGICAL_RELEASED = SourcesByKind(
    toxic=["surgical_harmful_train"], seemingly_toxic=["surgical_orbench_train"], normal=["alpaca"]
)
# The sources that each method's released code reads; they contain evaluation prompts.
RELEASED = {
    "scans": SourcesByKind(toxic=["advbench"], normal=["truthfulqa"]),
    "surgical": SURGICAL_RELEASED,
    "ablation": SURGICAL_RELEASED,
}


def needed(settings: SteeringConfig) -> tuple[Counter[str], str]:
    """How many prompts of each kind `settings.method` needs, and the key to lower.

    SCANS needs twice the anchors to calibrate its threshold.
    """
    train, validation = settings.surgical.train, settings.surgical.validation
    if settings.method == "scans":
        anchors = settings.scans.anchors * (2 if settings.scans.threshold is None else 1)
        key = f"steering.scans.anchors={settings.scans.anchors}"
        return Counter(toxic=anchors, normal=anchors), key
    if settings.method == "surgical":
        key = f"steering.surgical.train={train} with steering.surgical.validation={validation}"
        return Counter(dict.fromkeys(KINDS, train + validation)), key
    if settings.method == "ablation":
        return Counter(toxic=train, normal=train), f"steering.surgical.train={train}"
    if settings.method == "probe":
        train = settings.probe.train
        return Counter(toxic=train, seemingly_toxic=train), f"steering.probe.train={train}"
    return Counter(), ""


@dataclass(frozen=True)
class Extraction:
    """Prompts in drawn order, as many as the method needs, and the counts of dropped ones.

    `leaked` counts, by evaluation set, the prompts that stand in it all the same; only released
    prompts do.
    """

    toxic: list[Example] = field(default_factory=list)
    seemingly_toxic: list[Example] = field(default_factory=list)
    normal: list[Example] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    leaked: dict[str, int] = field(default_factory=dict)

    def parts(self) -> dict[str, list[Example]]:
        """The prompts by kind."""
        return {kind: getattr(self, kind) for kind in KINDS}


def extraction(data: DataConfig, settings: SteeringConfig, seed: int) -> Extraction:
    """The prompts of `settings.method`, none for method=none.

    Raises ConfigError if a kind has too few prompts, and whatever `sources.read` raises.
    """
    (need, key), evaluated = needed(settings), evaluation_prompts(data)
    clean: dict[str, list[Example]] = {}
    dropped: Counter[str] = Counter()
    for kind in KINDS:
        rows = _drawn(kind, data.extraction, data.root, seed)
        clean[kind], reasons = apart(rows, evaluated, data.near_duplicate)
        dropped.update({f"{kind}: {reason}": count for reason, count in reasons.items()})
    named, drawn = data.extraction, clean
    if settings.released_data and settings.method in RELEASED:
        named = RELEASED[settings.method]
        drawn = {k: _drawn(k, named, data.root, seed) if need[k] else [] for k in KINDS}
        dropped.clear()
    for kind, rows in drawn.items():
        if len(rows) < need[kind]:
            cure = f"name more in data.extraction.{kind}"
            if named is not data.extraction:
                cure = "leave steering.released_data out"
            count = sum(n for why, n in dropped.items() if why.startswith(f"{kind}:"))
            more = f" ({count} more stand in evaluation sets)" if count else ""
            raise ConfigError(
                f"{key} asks for {need[kind]} {kind} prompts: "
                f"{', '.join(getattr(named, kind)) or 'no source'} has {len(rows)}{more}; "
                f"lower it, or {cure}"
            )
    chosen = {kind: rows[: need[kind]] for kind, rows in drawn.items()}
    used = [row for rows in chosen.values() for row in rows]
    leaked = overlaps([row.prompt for row in used], evaluated, near=data.near_duplicate)
    return Extraction(
        **chosen,
        dropped=dict(dropped),
        leaked=dict(Counter(overlap.set for overlap in leaked if overlap is not None)),
    )


def _drawn(kind: str, named: SourcesByKind, root: str | None, seed: int) -> list[Example]:
    """All distinct rows of a kind's sources in drawn order."""
    names = getattr(named, kind)
    read = [row for name in names for row in sources.read(name, root=root, kind=Kind(kind))]
    rows, _ = sources.drop_duplicates(read)
    return sources.draw(rows, len(rows), seed)
