"""Records of what a model does with each prompt, kept in a file a set: only what lacks is asked."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from dcr.core import storage
from dcr.core.config import UserError
from dcr.core.evaluation.sets import PromptSet
from dcr.core.sources import Example

log = logging.getLogger(__name__)


class OfPrompt(Protocol):
    """A record of what a model does with one prompt."""

    @property
    def id(self) -> str: ...

    @property
    def prompt(self) -> str: ...


Record = TypeVar("Record", bound=OfPrompt)


def kept(
    prompt_sets: Sequence[PromptSet],
    ask: Callable[[list[Example]], Iterator[list[Record]]],
    folder: Path,
    schema: type[Record],
    doing: str,
    progress: bool,
) -> dict[str, list[Record]]:
    """Every record of each set's file in `folder`; what is missing is asked for and stored.

    The sets are asked together, so that batches stay full and of one length. A row that `ask`
    leaves out (a server that failed) is absent from the result, and asked next time.
    """
    homes: dict[str, list[tuple[str, str]]] = {}  # a prompt may stand in several sets
    rows: dict[str, Example] = {}
    for prompt_set in prompt_sets:
        done = {record.id for record in _of_rows(folder, prompt_set, schema)}
        for row in prompt_set.rows:
            if row.id not in done:
                homes.setdefault(row.prompt, []).append((prompt_set.name, row.id))
                rows.setdefault(row.prompt, row)
    # before the bar, since it opens the weights: a bar would stand before the line of a fault
    batches = ask(list(rows.values())) if rows else ()
    hidden = not (progress and rows)
    with tqdm(total=len(rows), unit="prompt", desc=doing, disable=hidden) as bar:
        for batch in batches:
            by_set: dict[str, list[Any]] = {}
            for record in batch:
                for name, identity in homes[record.prompt]:
                    copied: Any = record
                    by_set.setdefault(name, []).append(replace(copied, id=identity))
            for name, records in by_set.items():
                storage.append_lines(folder / f"{name}.jsonl", records)
            bar.update(len(batch))
    return {b.name: _of_rows(folder, b, schema) for b in prompt_sets}


def put_in_order(asked: Sequence[PromptSet], folder: Path, schema: type[OfPrompt]) -> None:
    """Puts the rows of the files of `kept` in order, whichever server answered first."""
    for prompt_set in asked:
        file = folder / f"{prompt_set.name}.jsonl"
        storage.put_in_order(file, schema, [row.id for row in prompt_set.rows])


def _of_rows(folder: Path, prompt_set: PromptSet, schema: type[Record]) -> list[Record]:
    """The stored records of the set's rows, in their order; none of a prompt that has changed."""
    lines = storage.read_lines(folder / f"{prompt_set.name}.jsonl", schema)
    done = {record.id: record for record in lines}
    return [
        done[row.id]
        for row in prompt_set.rows
        if row.id in done and done[row.id].prompt == row.prompt
    ]


class Unanswered(UserError):
    """Not one prompt brought an answer."""

    exit_code = 1


def check_answered(asked: Sequence[PromptSet], given: Mapping[str, Sequence[OfPrompt]]) -> None:
    """Warns of sets that lack answers, as when a server failed; raises Unanswered if all do."""
    lacking = {b.name: (len(b.rows) - len(given[b.name]), len(b.rows)) for b in asked}
    missing, total = (sum(counts[i] for counts in lacking.values()) for i in (0, 1))
    if total and missing == total:
        raise Unanswered(
            f"none of {total} prompts was answered, so there is nothing to count; see to the "
            "reason above, and give the same command again"
        )
    for name, (without, of) in lacking.items():
        if without:
            log.warning("%s: %d of %d prompts without an answer", name, without, of)
