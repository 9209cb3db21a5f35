"""Sources read and cleaned: apart from what is evaluated on, and each prompt once."""

from collections import Counter
from collections.abc import Sequence

from dcr import contamination, sources
from dcr.config import DataConfig, Kind
from dcr.sources import Example

CONTRASTIVE_NODES = ("seemingly_toxic", "toxic")


class Sift:
    """Reads and cleans the sources of one run, counting what it drops."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.dropped: Counter[str] = Counter()
        asked = (
            (Kind.seemingly_toxic, config.evaluation.over_refusal),
            (Kind.toxic, config.evaluation.safety),
        )
        self.evaluated = {
            name: [row.prompt for row in sources.read(name, root=config.root, kind=kind)]
            for kind, names in asked
            for name in names
        }

    def clean(self, node: str, kind: Kind) -> list[Example]:
        """The rows of a node's sources, apart from evaluation prompts and each other."""
        rows: list[Example] = []
        for name in getattr(self.config, node).source:
            read = sources.read(name, root=self.config.root, kind=kind)
            exempt = {name}
            if node in CONTRASTIVE_NODES:
                exempt |= self._used(CONTRASTIVE_NODES) | self._cut_from_the_same_file(name)
            rows += self._apart_from_evaluation(node, read, exempt)
        return self._once(node, rows)

    def answers(self, rows: list[Example], name: str) -> list[Example]:
        """STL-aug's rows, apart from prompts of sets other than those that it answers by design."""
        exempt = {name}
        for source in self.config.seemingly_toxic.source:
            exempt |= {source} | self._cut_from_the_same_file(source)
        return self._once("augmented", self._apart_from_evaluation("augmented", rows, exempt))

    def holding(self, rows: list[Example]) -> list[str]:
        """The evaluation sets that hold a prompt of STL-aug's rows.

        Of the sets that these answer by design a prompt close to one counts as well.
        """
        prompts, own = [row.prompt for row in rows], self._used(("seemingly_toxic",))
        return [
            name
            for name, asked in self.evaluated.items()
            if any(
                found is not None and (found.exact or name in own)
                for found in contamination.overlaps(
                    prompts, {name: asked}, near=self.config.near_duplicate
                )
            )
        ]

    def _once(self, node: str, rows: list[Example]) -> list[Example]:
        kept, repeated = sources.drop_duplicates(rows)
        if repeated:
            self.dropped[f"{node}: repeats another row"] += len(repeated)
        return kept

    def _apart_from_evaluation(
        self, node: str, rows: list[Example], exempt: set[str]
    ) -> list[Example]:
        against = {s: prompts for s, prompts in self.evaluated.items() if s not in exempt}
        if not self.config.drop_contaminated or not against:
            return rows
        found = contamination.overlaps(
            [row.prompt for row in rows], against, near=self.config.near_duplicate
        )
        for overlap in found:
            if overlap is not None:
                how = "is" if overlap.exact else "is close to"
                self.dropped[f"{node}: {how} a prompt of {overlap.set}"] += 1
        return [row for row, overlap in zip(rows, found, strict=True) if overlap is None]

    def _cut_from_the_same_file(self, name: str) -> set[str]:
        """XSTest's safe and unsafe prompts are contrasts, near each other by design.

        To drop one for the other's sake would take the very rows that are meant to be learnt.
        """
        files = {
            n: sources.SOURCES[n].file for n in [name, *self.evaluated] if n in sources.SOURCES
        }
        file = files.get(name)
        return {n for n, other in files.items() if file is not None and other == file}

    def _used(self, nodes: Sequence[str]) -> set[str]:
        return {name for node in nodes for name in getattr(self.config, node).source}

    def in_distribution(self, contrastive: bool) -> list[str]:
        """Evaluation sets that a run is trained on."""
        used = self._used(("safety", "normal", *(CONTRASTIVE_NODES if contrastive else ())))
        wholes = {name: s.part_of for name, s in sources.SOURCES.items()}
        return sorted(n for n in self.evaluated if n in used or wholes.get(n) in used)
