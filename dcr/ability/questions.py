"""Multiple-choice rows of a local folder, checked line by line, as data sets for the harness.

The task files in `harness/` name the reader here. They give the prompts, choices, targets and
metrics of the harness's own tasks of the same names, and serve its command line as well:
`lm_eval --include_path dcr/ability/harness --metadata '{"root": "<data>"}' --tasks arc_easy …`
"""

import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from dcr.core import sources as jsonl
from dcr.core.config import DataError
from dcr.core.sources import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalSet:
    """The files of a task's rows below `data.root`, and the hub set that the harness reads else."""

    hub: str
    asked: str  # file of the questions
    asked_split: str
    asked_rows: int
    shown: str  # file of the examples, which only shots above 0 need
    shown_split: str
    by_subject: bool = False  # one task for each `category`, which asks for a letter, A to D


class Question(TypedDict):
    """A row with the columns that the task files name and the prompt needs.

    It has no `id`: with one, the harness would not recognise and leave out a question among its
    examples.
    """

    prompt: str
    choices: list[str]
    answer: int  # the place of the right choice
    category: NotRequired[str]  # a subject of MMLU


# fmt: off
SETS = {
    "mmlu": LocalSet(
        "cais/mmlu", "mmlu/mmlu.jsonl", "test", 14042, "mmlu/mmlu.jsonl", "dev", by_subject=True
    ),
    "arc_easy": LocalSet(
        "allenai/ai2_arc", "arc_easy/arc_easy_test.jsonl", "test", 2376,
        "arc_easy/arc_easy_train.jsonl", "train",
    ),
    "arc_challenge": LocalSet(
        "allenai/ai2_arc", "arc_challenge/arc_challenge_test.jsonl", "test", 1172,
        "arc_challenge/arc_challenge_train.jsonl", "train",
    ),
    "openbookqa": LocalSet(
        "allenai/openbookqa", "openbookqa/openbookqa_test.jsonl", "test", 500,
        "openbookqa/openbookqa_train.jsonl", "train",
    ),
    "piqa": LocalSet(
        "baber/piqa", "piqa/piqa_validation.jsonl", "validation", 1838,
        "piqa/piqa_train.jsonl", "train",
    ),
}
# fmt: on


def splits(name: str, root: str, subject: str | None = None, **_: Any) -> Any:
    """A DatasetDict of a task's questions and examples, in the files' order.

    The harness calls it with a task's metadata beside `dataset_kwargs`, as the task files say.

    Raises DataError for a missing file, a malformed row, or no question.
    """
    from datasets import Dataset, DatasetDict

    local = SETS[name]
    rows: dict[str, list[dict[str, Any]]] = {local.asked_split: [], local.shown_split: []}
    for file in files(name, root):
        status = file.stat()
        for split, row in _rows(str(file), local, (status.st_mtime_ns, status.st_size)):
            if split in rows and subject in (None, row.get("category")):
                rows[split].append(dict(row))
    if not rows[local.asked_split]:
        category = f" and category={subject}" if subject else ""
        raise DataError(
            f"{Path(root, local.asked)}: no row with split={local.asked_split}{category}, which "
            f"ability.tasks={name} asks; add the rows, or leave data.root out to read {local.hub}"
        )
    return DatasetDict({split: Dataset.from_list(part) for split, part in rows.items()})


def files(name: str, root: str) -> list[Path]:
    """The task's existing files, the questions' first. DataError if that one is missing."""
    local = SETS[name]
    asked, shown = Path(root, local.asked), Path(root, local.shown)
    if not asked.is_file():
        raise DataError(
            f"{asked}: no such file, which ability.tasks={name} asks for; put it there, or leave "
            f"data.root out to read {local.hub}"
        )
    return [asked, shown] if shown != asked and shown.is_file() else [asked]


def compare(name: str, count: int) -> None:
    """Logs a warning if a local file has another number of questions than the harness asks."""
    local = SETS[name]
    if count != local.asked_rows:
        log.warning(
            "ability.tasks=%s: %d questions in %s, %d in %s; the scores cannot be compared",
            *(name, count, local.asked, local.asked_rows, local.hub),
        )


@lru_cache(maxsize=4)  # MMLU's one file is asked for by each of its 57 subjects
def _rows(path: str, local: LocalSet, stamp: tuple[int, int]) -> tuple[tuple[str, Question], ...]:
    """The (split, question) of every line; `stamp` tells a changed file from the cached one."""
    checked = []
    with open(path, "rb") as stream:
        for line, row in jsonl.rows(stream, path):
            where = f"{path}:{line}"
            question = _question(row, where, 4 if local.by_subject else None)
            if local.by_subject:
                question["category"] = _named(row, "category", where, "the subject")
            split = _named(row, "split", where, "test, validation, dev or train")
            checked.append((split, question))
    return tuple(checked)


def _question(row: Row, where: str, options: int | None) -> Question:
    """The row as a question with so many options (None: two or more). Raises DataError."""
    prompt, choices, answer = jsonl.prompt(row, where), row.get("choices"), row.get("answer")
    if not isinstance(choices, list) or not all(isinstance(c, str) and c for c in choices):
        raise DataError(f"{where}: choices: not a list of texts; list the options")
    if options and len(choices) != options:
        raise DataError(f"{where}: choices: {len(choices)} of them, not four; it asks for A to D")
    if len(choices) < 2:
        raise DataError(f"{where}: choices: {len(choices)} of them; list two or more options")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise DataError(
            f"{where}: answer: {answer!r}; give the right option's place, 0 to {len(choices) - 1}"
        )
    return Question(prompt=prompt, choices=choices, answer=answer)


def _named(row: Row, key: str, where: str, what: str) -> str:
    name = jsonl.text(row, key, where)
    if name is None:
        raise DataError(f"{where}: {key}: missing; name {what}")
    return name
