"""The prompts of an evaluation, and the records of what a model does with them.

Prompts stand in named sets or a user's files, and records in a file a set: only what lacks is
asked. `subjects` opens weights and has them answer, and `scoring` counts answers and ranks prompts
by the refusal mass of the first answer token. `protocols` says what an extension can be: another
subject, a change of its answers, a task, judges. `dcr.eval` has the order of it all.
"""

import fcntl
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from dcr.core import extending, sources, storage
from dcr.core.config import ConfigError, DataConfig, Kind, class_of, is_path
from dcr.core.sources import Example
from dcr.core.text import label_of

log = logging.getLogger(__name__)

# Shown on their own and never averaged or pooled with the others: a set whose prompts another set
# holds too, and one whose prompts a model may well refuse.
APART = ("coconot_safety", "phtest_controversial")

SetPair = tuple[tuple[str, ...], tuple[str, ...]]  # seemingly toxic and toxic sets


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
    root = config.root
    read = [
        read_set(source, TASKS[task], root, limit, seed, scored=True, key=f"data.evaluation.{task}")
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
    key: str = "",
) -> PromptSet:
    """One set, cut to a seeded sample of `limit` rows; `scored` and `key` as in `sources.read`."""
    rows = sources.read(source, root=root, kind=kind, scored=scored, key=key)
    if limit is not None and limit < len(rows):
        rows = sources.draw(rows, limit, seed)
    return PromptSet(set_name(source), kind, rows)


def pairs_of(names: Iterable[str]) -> dict[str, SetPair]:
    """The pairs of which every set is among `names`, by label: `oktest / paper_safety`.

    Their discernment is read apart from the pooled one.
    """
    there, known = set(names), extending.part("pairs")
    return {label: pair for label, pair in known.items() if there.issuperset(pair[0] + pair[1])}


def set_name(source: str) -> str:
    """The name of a set and of its file in the run folder: a source's, a file's or a class's."""
    known = source in sources.named() or is_path(source)
    return class_of(source) if known else label_of(Path(source).stem)


# --- records of prompts ---------------------------------------------------------------------------


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
    leaves out (a server that failed) is absent from the result, and asked next time. Raises
    ConfigError for two sets of one name, which would share a file.
    """
    check_names(prompt_sets)
    if any(len(_of_rows(folder, b, schema)) < len(b.rows) for b in prompt_sets):
        # two commands may need the same answers of a run, such as the reference of a calibration
        with in_turn(folder):
            _ask(prompt_sets, ask, folder, schema, doing, progress)
    return {b.name: _of_rows(folder, b, schema) for b in prompt_sets}


@contextmanager
def in_turn(folder: Path) -> Iterator[None]:
    """Waits until no other process is in this block for the folder, which is made for it.

    A folder that was made and stayed empty is removed, with the parents made for it. Raises
    UserError with the path if it cannot be made or opened.
    """
    with storage.writing(folder):
        while True:
            made = [place for place in (folder, *folder.parents) if not place.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            turn = os.open(folder, os.O_RDONLY)
            with suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    log.info("%s: another process writes there; waiting for it", folder)
                    fcntl.flock(turn, fcntl.LOCK_EX)
            if folder.exists() and os.path.samestat(folder.stat(), os.fstat(turn)):
                break
            os.close(turn)  # its owner wrote nothing, and removed the folder
    try:
        yield
    finally:
        with suppress(OSError):  # something was written
            for place in made:
                place.rmdir()
        os.close(turn)  # the last, so that who waits sees whether its folder is still there


def _ask(
    prompt_sets: Sequence[PromptSet],
    ask: Callable[[list[Example]], Iterator[list[Record]]],
    folder: Path,
    schema: type[Record],
    doing: str,
    progress: bool,
) -> None:
    """Asks for the records that `folder` lacks, and stores each as it comes."""
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


def check_names(prompt_sets: Sequence[PromptSet]) -> None:
    """Raises ConfigError for two sets of one name."""
    names = [prompt_set.name for prompt_set in prompt_sets]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"{twice[0]}: two sets have this name; rename one of their files")


def _of_rows(folder: Path, prompt_set: PromptSet, schema: type[Record]) -> list[Record]:
    """The stored records of the set's rows, in their order; none of a prompt that has changed."""
    lines = storage.read_lines(folder / f"{prompt_set.name}.jsonl", schema)
    done = {(record.id, record.prompt): record for record in lines}
    asked = ((row.id, row.prompt) for row in prompt_set.rows)
    return [done[row] for row in asked if row in done]
