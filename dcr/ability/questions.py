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

from dcr.core.config import DataError
from dcr.core.sources import jsonl
from dcr.core.sources.jsonl import Row

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalSet:
    """Where a task's rows lie below `data.root`, and what the harness reads instead."""

    hub: str
    asked: str  # file of the questions
    asked_split: str
    asked_rows: int
    shown: str  # file of the examples, wanted for shots above 0 alone
    shown_split: str
    by_subject: bool = False  # asks for a letter, A to D, one task for each `category`


class Question(TypedDict):
    """A row as the task files name its columns, which are those that the prompt needs.

    With an `id`, the harness would not recognise a question among its examples, which it leaves
    out.
    """

    prompt: str
    choices: list[str]
    answer: int  # the place of the right one
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

    The harness calls it as the task files say, with a task's metadata beside `dataset_kwargs`.

    Raises DataError at a missing file, a malformed row, and where there is no question.
    """
    from datasets import Dataset, DatasetDict

    made = SETS[name]
    rows: dict[str, list[dict[str, Any]]] = {made.asked_split: [], made.shown_split: []}
    for file in files(name, root):
        status = file.stat()
        for split, row in _rows(str(file), made, (status.st_mtime_ns, status.st_size)):
            if split in rows and subject in (None, row.get("category")):
                rows[split].append(dict(row))
    if not rows[made.asked_split]:
        of = f" and category={subject}" if subject else ""
        raise DataError(
            f"{Path(root, made.asked)}: no row with split={made.asked_split}{of}, which "
            f"ability.tasks={name} asks; add the rows, or leave data.root out to read {made.hub}"
        )
    return DatasetDict({split: Dataset.from_list(of_split) for split, of_split in rows.items()})


def files(name: str, root: str) -> list[Path]:
    """The task's files that are there, the questions' first. DataError when that one is missing."""
    made = SETS[name]
    asked, shown = Path(root, made.asked), Path(root, made.shown)
    if not asked.is_file():
        raise DataError(
            f"{asked}: no such file, which ability.tasks={name} asks for; put it there, or leave "
            f"data.root out to read {made.hub}"
        )
    return [asked, shown] if shown != asked and shown.is_file() else [asked]


def compare(name: str, count: int) -> None:
    """Log a warning where a local file has another number of questions than the harness asks."""
    made = SETS[name]
    if count != made.asked_rows:
        log.warning(
            "ability.tasks=%s: %d questions in %s, %d in %s; the scores cannot be compared",
            *(name, count, made.asked, made.asked_rows, made.hub),
        )


@lru_cache(maxsize=4)  # MMLU's one file is asked for by each of its 57 subjects
def _rows(path: str, made: LocalSet, stamp: tuple[int, int]) -> tuple[tuple[str, Question], ...]:
    """(split, question) of every line; `stamp` makes a changed file another one."""
    checked = []
    with open(path, "rb") as stream:
        for line, row in jsonl.rows(stream, path):
            where = f"{path}:{line}"
            question = _question(row, where, 4 if made.by_subject else None)
            if made.by_subject:
                question["category"] = _named(row, "category", where, "the subject")
            split = _named(row, "split", where, "test, validation, dev or train")
            checked.append((split, question))
    return tuple(checked)


def _question(row: Row, where: str, options: int | None) -> Question:
    """The row as a question with so many options; None: two or more."""
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
