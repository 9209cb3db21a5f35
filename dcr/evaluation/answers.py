"""Answers to every prompt of every set: what is stored is kept, what is missing is asked for."""

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from tqdm.auto import tqdm

from dcr import generation
from dcr.config import EvalConfig, UserError
from dcr.evaluation import subjects
from dcr.evaluation.sets import PromptSet
from dcr.evaluation.subjects import Subject
from dcr.generation import Completion
from dcr.models import Policy
from dcr.sources import Example

log = logging.getLogger(__name__)

Answers = dict[str, list[Completion]]
# Rows in, batches of completions out, in any order; called only where something is missing.
Answerer = Callable[[list[Example]], Iterator[list[Completion]]]


def complete(
    prompt_sets: Sequence[PromptSet], answer: Answerer, folder: Path, progress: bool = True
) -> dict[str, list[Completion]]:
    """Every completion that `folder` does not hold yet, stored as it comes; then all there are.

    The sets are answered together, so that batches stay full and of one length. A row that
    `answer` leaves out (a server that failed) is absent from the result, and asked next time.
    """
    homes: dict[str, list[tuple[str, str]]] = {}  # a prompt may stand in several sets
    rows: dict[str, Example] = {}
    for prompt_set, row in _missing(prompt_sets, folder):
        homes.setdefault(row.prompt, []).append((prompt_set.name, row.id))
        rows.setdefault(row.prompt, row)
    # first what opens the weights and may fail: a bar would stand before the line that says so
    batches = answer(list(rows.values())) if rows else ()
    hidden = not (progress and rows)
    with tqdm(total=len(rows), unit="prompt", desc="generating", disable=hidden) as bar:
        for batch in batches:
            by_set: dict[str, list[Completion]] = {}
            for completion in batch:
                for name, identity in homes[completion.prompt]:
                    by_set.setdefault(name, []).append(replace(completion, id=identity))
            for name, completions in by_set.items():
                generation.store(folder / f"{name}.jsonl", completions)
            bar.update(len(batch))
    return {b.name: _of_rows(folder / f"{b.name}.jsonl", b.rows) for b in prompt_sets}


def _missing(prompt_sets: Sequence[PromptSet], folder: Path) -> list[tuple[PromptSet, Example]]:
    found: list[tuple[PromptSet, Example]] = []
    for prompt_set in prompt_sets:
        done = generation.stored(folder / f"{prompt_set.name}.jsonl")
        found += [
            (prompt_set, row)
            for row in prompt_set.rows
            if row.id not in done or done[row.id].prompt != row.prompt
        ]
    return found


def _of_rows(file: Path, rows: Sequence[Example]) -> list[Completion]:
    done = generation.stored(file)
    return [done[row.id] for row in rows if row.id in done and done[row.id].prompt == row.prompt]


def of_subject(
    settings: EvalConfig,
    subject: Subject,
    asked: list[PromptSet],
    folder: Path,
    policy: Callable[[], Policy],
) -> Answers:
    """The subject's completions of every set, kept in `folder`; only what is missing is asked."""
    ask = functools.partial(subjects.answer, settings, subject, policy)
    return complete(asked, ask, folder, settings.trainer.progress)


class Unanswered(UserError):
    """Not one prompt brought an answer."""

    exit_code = 1


def check_answered(asked: list[PromptSet], given: Answers) -> None:
    """Say which sets lack answers, as where a server failed; Unanswered where all of them do."""
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
