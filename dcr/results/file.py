"""`metrics.json` as a command writes it: with what earlier ones measured of the same subject.

Blocks of an earlier command stay where they hold. Where its settings differ, its file is kept aside
under another name.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dcr.core import storage
from dcr.core.config import Kind
from dcr.core.evaluation import DISCERNMENT, PromptSet, protocols, scoring
from dcr.core.evaluation.protocols import Subject
from dcr.core.generation import Completion
from dcr.eval import LAST, OWN
from dcr.results import schema

log = logging.getLogger(__name__)


class MetricsFile(protocols.MetricsFile):
    """The file with the blocks of extensions, each as its record in `schema` says."""

    def __init__(self, subject: Subject, folder: Path, origin: Mapping[str, Any]) -> None:
        super().__init__(subject, folder, origin)
        self.before = self._read()  # now, since tasks write this command's data there

    def _read(self) -> dict[str, Any]:
        """The file as it stands there, if it does. DataError where it is damaged."""
        if not self.file.is_file():
            return {}
        return schema.read(self.file).model_dump(mode="json", exclude_unset=True)

    def kept(self) -> dict[str, Any]:
        """The blocks of the file that hold here.

        Under other settings these are only the blocks of tasks, which have settings of their own;
        on other data there are none.
        """
        before = self._read()
        if before.get("data") != self.origin["data"]:
            return {}
        of_tasks = {key: before[key] for key in self.subject.settings.table.tasks if key in before}
        same = _decided_by(before) == _decided_by(self.origin)
        return of_tasks | before if same else of_tasks

    def merged(self, blocks: Mapping[str, Any]) -> dict[str, Any]:
        kept, told_anew = self.kept(), (*self.origin, *LAST)
        older = {key: block for key, block in kept.items() if key not in told_anew}
        metrics = {**self.origin, **older, **blocks}
        if own := kept.get(OWN, {}) | blocks.get(OWN, {}):
            metrics[OWN] = own
        return metrics

    def write(self, metrics: Mapping[str, Any]) -> str:
        """Keeps the file, and one of the same answers on other data or under other settings aside.

        Raises ValueError where a block is not as its record.
        """
        made, now = _decided_by(self._read()), _decided_by(self.origin)
        if made and made != now:
            aside = self.folder / f"metrics-{storage.fingerprint(made)}.json"
            self.file.replace(aside)
            told = f"metrics of other settings ({'; '.join(storage.differences(made, now))})"
            log.warning("%s: %s are now in %s", self.folder, told, aside.name)
        return schema.write(self.file, metrics, schema.Metrics).silence

    def joined(self, counted: dict[str, Any]) -> dict[str, Any]:
        """The counts, with those of the same data where an earlier command asked the other kind.

        So over-refusal and safety come to the same in one command and in two. A block has an entry
        for each set, or for whatever else; or it is a list of records of a kind.
        """
        same = not self.before or _decided_by(self.before) == _decided_by(self.origin)
        known: dict[str, Any] = self.before.get("sets", {}) if same else {}
        kinds = {of["kind"] for of in counted["sets"].values()}
        again = {name for name, of in known.items() if of["kind"] in kinds}
        if known.keys() - again:
            for key, new in counted.items():
                if isinstance(new, list):
                    old = [each for each in self.before.get(key) or [] if each["kind"] not in kinds]
                    counted[key] = old + new
                elif isinstance(new, dict):
                    older = self.before.get(key) or {}
                    counted[key] = {n: of for n, of in older.items() if n not in again} | new
            counted[DISCERNMENT] = self._ranked(counted["sets"])
        # with prompts of one kind an earlier command's ranking stays, unless it is of other data
        if counted[DISCERNMENT] is None and same:
            del counted[DISCERNMENT]
        return counted

    def _ranked(self, counts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Discernment over sets of several commands, by their stored answers."""
        masses: dict[str, dict[str, float]] = {}
        for name, of in counts.items():
            kept = stored_answers(self.folder / f"{name}.jsonl")
            rows = [kept[i] for i in of.get("ids") or kept if i in kept]
            masses[name] = {row.id: m for row in rows if (m := row.refusal_mass) is not None}
        there = [PromptSet(name, Kind(of["kind"]), []) for name, of in counts.items()]
        trained_on = self.subject.run.record().get("in_distribution", [])
        return scoring.discernment(there, masses, trained_on, self.subject.settings.seed)


def stored_answers(path: Path) -> dict[str, Completion]:
    """The completions in a file, by id; a line torn by a kill is left out.

    Raises DataError, naming the line, for any other line that is no completion.
    """
    return {row.id: row for row in storage.read_lines(path, Completion)}


def _decided_by(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and the label of the data that decide all counts; empty without metrics."""
    return {"data": metrics.get("data"), **metrics.get("settings", {})} if metrics else {}
