"""The rows of a run: read, cleaned of what is evaluated on, and drawn into disjoint parts.

Overlap with what is evaluated means equal and nearly equal prompts. The caller decides which to
drop, and which sets are in-distribution by design (XSTest safe for stage one) and only marked.
`rows` tokenises and orders the rows of a stage, and pads them as batches.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dcr.core import extending, sources
from dcr.core.config import ConfigError, DataConfig, Kind, Method
from dcr.core.config.training import ReadoutConfig, TrainConfig
from dcr.core.refusal.keywords import is_refusal
from dcr.core.sources import Example
from dcr.core.text import normalise

CONTRASTIVE_NODES = ("seemingly_toxic", "toxic")
PAIR_NODES = ("safety", "normal")  # whose rows are learnt with their responses
RARE = ("augmented", "readout")  # beginnings of the names of lists that few runs have
HELD_OUT_PAIRS = 64  # prompts a class that stage one is watched on; more would only cost time


@dataclass(frozen=True)
class Splits:
    """The rows of a run: disjoint, drawn by seed, with what was dropped and why."""

    seemingly_toxic: list[Example] = field(default_factory=list)
    toxic: list[Example] = field(default_factory=list)
    seemingly_toxic_heldout: list[Example] = field(default_factory=list)
    toxic_heldout: list[Example] = field(default_factory=list)
    normal: list[Example] = field(default_factory=list)
    refusals: list[Example] = field(default_factory=list)
    normal_heldout: list[Example] = field(default_factory=list)
    refusals_heldout: list[Example] = field(default_factory=list)
    augmented: list[Example] = field(default_factory=list)  # STL-aug's, as often as they are learnt
    readout_seemingly_toxic: list[Example] = field(default_factory=list)
    readout_toxic: list[Example] = field(default_factory=list)
    readout_seemingly_toxic_heldout: list[Example] = field(default_factory=list)
    readout_toxic_heldout: list[Example] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)
    fewer: dict[str, int] = field(default_factory=dict)  # rows that defaults asked for, and got
    in_distribution: list[str] = field(default_factory=list)
    unseen_groups: list[str] = field(default_factory=list)

    def told(self) -> list[str]:
        """A line for whatever was left out or is lacking."""
        lacking = ", ".join(f"{asked}, {count} are there" for asked, count in self.fewer.items())
        return [
            *(f"dropped {count} rows of {reason}" for reason, count in self.dropped.items()),
            *([f"defaults give way to what there is: {lacking}"] if lacking else []),
        ]

    def parts(self) -> dict[str, list[Example]]:
        """Every list of rows by its name; those that few runs have only where there are any."""
        about = ("dropped", "fewer", "in_distribution", "unseen_groups")
        return {
            name: rows
            for name, rows in vars(self).items()
            if name not in about and (rows or not name.startswith(RARE))
        }


def evaluation_prompts(config: DataConfig) -> dict[str, list[str]]:
    """The prompts of every evaluation set by its name."""
    evaluated: dict[str, list[str]] = {}
    for task, kind in (("over_refusal", Kind.seemingly_toxic), ("safety", Kind.toxic)):
        key = f"data.evaluation.{task}"
        for name in getattr(config.evaluation, task):
            rows = sources.read(name, root=config.root, kind=kind, scored=True, key=key)
            evaluated[name] = [row.prompt for row in rows]
    return evaluated


def apart(
    rows: Sequence[Example], evaluated: Mapping[str, Sequence[str]], near: float
) -> tuple[list[Example], Counter[str]]:
    """The rows that are no prompt of these sets, and the counts of the others by reason."""
    found = extending.part("overlaps")([row.prompt for row in rows], evaluated, near=near)
    reasons = Counter(
        f"{'is' if overlap.exact else 'is close to'} a prompt of {overlap.set}"
        for overlap in found
        if overlap is not None
    )
    return [row for row, overlap in zip(rows, found, strict=True) if overlap is None], reasons


class Cleaning:
    """Reads, cleans and draws the rows of one run, counting what it drops and what is lacking."""

    def __init__(self, config: DataConfig, seed: int, at_most: Sequence[str]) -> None:
        self.config, self.seed, self.at_most = config, seed, at_most
        self.dropped: Counter[str] = Counter()
        self.fewer: dict[str, int] = {}
        self.evaluated = evaluation_prompts(config)

    def clean(self, node: str, kind: Kind, names: Sequence[str] | None = None) -> list[Example]:
        """The rows of a node's or the named sources, without evaluation prompts and repeats."""
        rows: list[Example] = []
        key = f"data.{node}.source" if names is None else node.replace("readout_", "sft.readout.")
        for name in names or getattr(self.config, node).source:
            pairs = node in PAIR_NODES
            read = sources.read(name, root=self.config.root, kind=kind, pairs=pairs, key=key)
            exempt = self.holding({name})
            if names is not None:
                exempt |= self.contrasts(name)
            elif node in CONTRASTIVE_NODES:
                exempt |= self.holding(self._used(CONTRASTIVE_NODES)) | self.contrasts(name)
            rows += self.apart_from_evaluation(node, read, exempt)
        return self.once(node, rows)

    def draw(
        self, rows: list[Example], count: int | None, asked: str, unseen: Sequence[Example] = ()
    ) -> tuple[list[Example], list[Example]]:
        """`count` rows (all for None) and those left, both in drawn order.

        `asked` is the setting that asks for them, `unseen` the rows of groups held out. Where there
        are fewer it gives way, or raises ConfigError if it is none of `at_most`.
        """
        if count is not None and count > len(rows):
            named = f"{asked} asks for {count} rows"
            if asked.partition("=")[0] not in self.at_most:
                held = f" and {len(unseen)} held out by data.group_holdout" if unseen else ""
                raise ConfigError(f"{named}: only {len(rows)} are left{held}; ask for fewer")
            self.fewer[named] = len(rows)
        drawn = _shuffled(rows, self.seed)
        return drawn[:count], drawn[count:] if count is not None else []

    def once(self, node: str, rows: list[Example]) -> list[Example]:
        kept, repeated = sources.drop_duplicates(rows)
        if repeated:
            self.dropped[f"{node}: repeats another row"] += len(repeated)
        return kept

    def of_one_kind(self, node: str, toxic: list[Example], safe: list[Example]) -> list[Example]:
        """The toxic rows whose prompts are no seemingly toxic ones too, which have no one label."""
        kept = without(toxic, safe)
        if len(kept) < len(toxic):
            self.dropped[f"{node}: is a seemingly toxic prompt as well"] += len(toxic) - len(kept)
        return kept

    def apart_from_evaluation(
        self, node: str, rows: list[Example], exempt: set[str]
    ) -> list[Example]:
        against = {s: prompts for s, prompts in self.evaluated.items() if s not in exempt}
        if not self.config.drop_contaminated or not against:
            return rows
        kept, reasons = apart(rows, against, self.config.near_duplicate)
        self.dropped.update({f"{node}: {why}": count for why, count in reasons.items()})
        return kept

    def contrasts(self, name: str) -> set[str]:
        """XSTest's safe and unsafe prompts are contrasts, near each other by design.

        To drop one for the other's sake would take the very rows that are meant to be learnt.
        """
        known = sources.named()
        own = known.get(name)
        return {
            n
            for n in known.keys() & self.evaluated
            if own and own.file and own.file == known[n].file and own.kind is not known[n].kind
        }

    def holding(self, names: Iterable[str]) -> set[str]:
        """The evaluation sets that are these sources, or parts of them, or have them as a part.

        They are evaluated in-distribution. Rows that are kept apart are no such part.
        """
        wholes = {n: of.part_of for n, of in sources.named().items() if not of.final}
        return {
            n
            for n in self.evaluated
            for name in names
            if n == name or wholes.get(n) == name or wholes.get(name) == n
        }

    def _used(self, nodes: Sequence[str]) -> set[str]:
        return {name for node in nodes for name in getattr(self.config, node).source}

    def in_distribution(self, contrastive: bool) -> list[str]:
        """Evaluation sets that a run is trained on."""
        nodes = ("safety", "normal", *(CONTRASTIVE_NODES if contrastive else ()))
        return sorted(self.holding(self._used(nodes)))


Added = Callable[[TrainConfig, Splits, Cleaning], Splits]


def rows_of(settings: TrainConfig) -> Splits:
    """Read every source and draw the rows that a run learns from and is watched on (A.2, A.3).

    The safety pairs of SFT are drawn first and the toxic prompts of stage one from the rest, so
    the two are disjoint and a ratio sweep leaves SFT untouched. Rows too near an evaluation
    prompt are dropped and counted, save those of a source that is itself evaluated on, which
    make that set in-distribution.

    Without stage one its lists stay empty. The method of an extension adds its rows and leaves
    every other list as it is, as the readout does with its pairs.
    Raises ConfigError when a source holds fewer rows than asked for by a setting that is not among
    `at_most`, and DataError for a pair without a response.
    """
    config, contrastive = settings.data, settings.method is Method.dcr
    cleaning = Cleaning(config, settings.seed, settings.at_most)
    normal = cleaning.clean("normal", Kind.normal)
    pairs = _refusals(cleaning.clean("safety", Kind.toxic), cleaning)
    refusals, refusals_left = cleaning.draw(pairs, config.safety.count, "data.safety.count")
    general, general_left = cleaning.draw(normal, config.normal.count, "data.normal.count")
    rows = Splits(
        normal=general,
        refusals=refusals,
        normal_heldout=general_left[: round(config.validation * len(general))],
        refusals_heldout=refusals_left[: round(config.validation * len(refusals))],
        in_distribution=cleaning.in_distribution(contrastive),
    )
    if contrastive:
        rows = _with_stage_one(rows, settings.dcr.ratio, cleaning)
    added: Added | None = extending.ours(settings.table.rows.get(settings.method.value, ""))
    if added:
        rows = added(settings, rows, cleaning)
    if settings.sft.readout.steps:
        rows = with_readout(rows, settings.sft.readout, settings.seed, cleaning)
    # stage one alone holds groups out; another stage may have learnt them
    learnt = {group_of(row) for row in (*rows.refusals, *rows.augmented)}
    unseen = [group for group in rows.unseen_groups if group not in learnt]
    return replace(rows, dropped=dict(cleaning.dropped), fewer=cleaning.fewer, unseen_groups=unseen)


def _refusals(pairs: list[Example], cleaning: Cleaning) -> list[Example]:
    """The pairs that `data.safety` asks for. Raises ConfigError where none of them refuses."""
    if not cleaning.config.safety.refusals_only:
        return pairs
    kept = [row for row in pairs if row.response and is_refusal(row.response)]
    if pairs and not kept:
        raise ConfigError(
            f"data.safety.refusals_only=true: none of {len(pairs)} answers refuses by the keyword "
            "rules; set it to false to learn them as they are"
        )
    if len(kept) < len(pairs):
        cleaning.dropped["safety: its answer is no refusal"] += len(pairs) - len(kept)
    return kept


def _with_stage_one(rows: Splits, ratio: float | None, cleaning: Cleaning) -> Splits:
    """The prompts of stage one, `ratio` toxic ones for each other; None for all that are left."""
    config, seed = cleaning.config, cleaning.seed
    safe = cleaning.clean("seemingly_toxic", Kind.seemingly_toxic)
    toxic = cleaning.of_one_kind("toxic", cleaning.clean("toxic", Kind.toxic), safe)
    toxic = without(toxic, [*rows.refusals, *rows.refusals_heldout])
    safe, safe_unseen = split_by_group(safe, config.group_holdout, seed)
    toxic, toxic_unseen = split_by_group(toxic, config.group_holdout, seed)
    unseen = (_shuffled(safe_unseen, seed), _shuffled(toxic_unseen, seed))
    count = config.seemingly_toxic.count
    safe, safe_left = cleaning.draw(safe, count, "data.seemingly_toxic.count", unseen[0])
    asked = None if ratio is None else round(ratio * len(safe))
    toxic, toxic_left = cleaning.draw(toxic, asked, f"dcr.ratio={ratio}", unseen[1])
    for name, drawn, held in (("seemingly toxic", safe, unseen[0]), ("toxic", toxic, unseen[1])):
        if not drawn:
            cure = "name another source, or leave it some with a lower data.safety.count"
            if drawn is toxic and asked == 0:
                cure = f"dcr.ratio={ratio} asks for none; raise it"
            elif held:
                cure = f"data.group_holdout={config.group_holdout} holds out all; lower it"
            raise ConfigError(f"data: no {name} row is left for stage one; {cure}")
    heldout = (unseen[0] or safe_left, unseen[1] or toxic_left)
    if not all(heldout):  # the paper trains on all of XSTest: one class alone has no pairs to watch
        heldout = ([], [])
    return replace(
        rows,
        seemingly_toxic=safe,
        toxic=toxic,
        seemingly_toxic_heldout=heldout[0][:HELD_OUT_PAIRS],
        toxic_heldout=heldout[1][:HELD_OUT_PAIRS],
        unseen_groups=sorted({group_of(row) for part in unseen for row in part}),
    )


def with_readout(rows: Splits, readout: ReadoutConfig, seed: int, cleaning: Cleaning) -> Splits:
    """The rows with the readout's pairs, of which a share of the topics is held out."""
    return extending.part("readout_pairs")(rows, readout, seed, cleaning)


def split_by_group(
    examples: Iterable[Example], holdout: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(train, held out), with about a `holdout` share of the groups held out.

    A group's side depends on its name and the seed alone, so safe and unsafe prompts of one
    template, split in separate calls, land on the same side. A row without a group is its own.
    """
    train: list[Example] = []
    heldout: list[Example] = []
    for example in examples:
        group = example.id if example.group is None else example.group
        digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
        position = int.from_bytes(digest[:8], "big") / 2**64
        (heldout if position < holdout else train).append(example)
    return train, heldout


def group_of(row: Example) -> str:
    return row.group or row.id


def _shuffled(rows: list[Example], seed: int) -> list[Example]:
    return sources.draw(rows, len(rows), seed)


def row_record(rows: Splits, about: Mapping[str, Any] | None = None) -> dict[str, object]:
    """Ids, sources and fingerprint of every list of rows, and what else is told `about` them."""
    recorded = {name: sources.record(part) for name, part in rows.parts().items()}
    for name, part in rows.parts().items():
        recorded[name]["sources"] = of = sorted({row.source for row in part})
        if len(of) > 1:  # two files may hold one id
            recorded[name]["places"] = [of.index(row.source) for row in part]
    named = sorted({row.source for part in rows.parts().values() for row in part})
    own = {name: made for name in named if (made := sources.origin(name))}
    return {
        "rows": recorded,
        "dropped": rows.dropped,
        "in_distribution": rows.in_distribution,
        "unseen_groups": rows.unseen_groups,
        **(about or {}),
        **({"own": own} if own else {}),
    }


def without(rows: Sequence[Example], others: Sequence[Example]) -> list[Example]:
    """The rows whose prompts are none of the others'."""
    taken = {normalise(row.prompt) for row in others}
    return [row for row in rows if normalise(row.prompt) not in taken]
