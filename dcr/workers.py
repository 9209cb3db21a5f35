"""Prompts shared among processes of this machine, each with the whole model, on a GPU of its own.

The first process hands out batches, and alone writes the results, in the order of the batches. No
answer depends on the process that gave it.
"""

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from dcr import ending
from dcr.core import generation, passes
from dcr.core.config import UserError
from dcr.core.config.evaluation import EvalConfig
from dcr.core.evaluation.subjects import Local, Opening
from dcr.core.generation import Completion
from dcr.core.passes import Passes
from dcr.core.refusal import opening as refusal
from dcr.core.sources import Example

Row = TypeVar("Row")
Done = TypeVar("Done")

SUBJECT: list[Local] = []  # the subject of a worker process
Cut = Callable[[Local, list[Row], int], list[list[Row]]]
Work = Callable[[Local, list[Row]], Iterator[list[Done]]]


class WorkerEnded(UserError):
    """A process ended before it returned its result."""

    exit_code = 1


class Shared(Local):
    """Weights that `trainer.devices` processes open, each for its share of the prompts."""

    workers: "Workers"

    def __enter__(self) -> None:
        self.workers = self._contexts.enter_context(Workers(self))

    def answer(self, rows: list[Example]) -> Iterator[list[Completion]]:
        return shared(self, _cut, Local.answer, rows)

    def openings(self, rows: list[Example]) -> Iterator[list[Opening]]:
        return shared(self, _cut_openings, Local.openings, rows)


def _cut(subject: Local, rows: list[Example], processes: int) -> list[list[Example]]:
    """The batches of `generation.complete`; without a set size, enough for all processes."""
    policy, chat, gen = subject.policy(), subject.chat(), subject.settings.gen
    waiting, size = generation.ordered(policy, chat, rows, gen, subject.decoding())
    if gen.batch_size is None:
        size = min(size, math.ceil(len(waiting) / processes)) or 1
    firsts = range(0, len(waiting), size)
    return [[row for row, _ in waiting[first : first + size]] for first in firsts]


def _cut_openings(subject: Local, rows: list[Example], _processes: int) -> list[list[Example]]:
    chat = subject.plain_chat()
    encoded = [chat.prompt_ids(row.prompt) for row in rows]
    batches = refusal.opening_batches(subject.policy().model, encoded)
    return [[rows[place] for place in places] for places in batches]


def shared(
    subject: Local, cut: Cut[Row], work: Work[Row, Done], rows: list[Row]
) -> Iterator[list[Done]]:
    """The results of `work` for the rows, by this process or by those that share the subject."""
    if isinstance(subject, Shared):
        return subject.workers.shared(subject.settings, cut, work, rows)
    return work(subject, rows)


class Workers:
    """`trainer.devices` processes that open the subject's weights, under its edits, when needed.

    They begin with the first batch and end with the `with` block, or with this process.
    """

    def __init__(self, subject: Local) -> None:
        self.subject = subject
        self.count = subject.settings.trainer.devices
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        self.others = set(multiprocessing.active_children())
        return self

    def __exit__(self, *_: object) -> None:
        for process in set(multiprocessing.active_children()) - self.others:
            process.kill()  # it may be in the middle of a long batch
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def shared(
        self, settings: EvalConfig, cut: Cut[Row], work: Work[Row, Done], rows: list[Row]
    ) -> Iterator[list[Done]]:
        """The results of `work` for each batch that `cut` makes of the rows, in their order.

        Both run in the processes, on the subject `under` these settings, so they, their arguments
        and their results must pickle. Raises their exceptions, and WorkerEnded if a process was
        killed; earlier results are whole.
        """
        (batches,) = self.each(_under, [(settings, cut, rows, self.count)])
        yield from self.each(_under, [(settings, _whole, work, batch) for batch in batches])

    def each(
        self, function: Callable[..., Done], jobs: Sequence[tuple[Any, ...]]
    ) -> Iterator[Done]:
        """The results of the function for a process's subject and each job, in their order."""
        self.pool = self.pool or self._started()
        try:
            yield from self.pool.map(_call, [function] * len(jobs), jobs)
        except BrokenProcessPool as error:
            raise WorkerEnded(
                f"trainer.devices={self.count}: one of these processes was killed, perhaps for "
                "lack of memory; what is answered is kept, and the same command goes on"
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        numbers = context.SimpleQueue()
        for number in range(self.count):
            numbers.put(number)
        threads = max(1, torch.get_num_threads() // self.count)
        mine = self.subject
        subject = Local(mine.settings, mine.run, mine.weights, mine.source, mine.step)
        subject.bias = mine.bias  # and nothing that is open here
        arguments = (os.getpid(), numbers, threads, subject, passes.current())
        return ProcessPoolExecutor(self.count, context, _begin, arguments)


def _begin(parent: int, numbers: Any, threads: int, subject: Local, current: Passes) -> None:
    """Prepares a new process: one GPU, its share of threads, the subject."""
    ending.end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all; the first one ends us
    trainer, number = subject.settings.trainer, numbers.get()
    torch.set_num_threads(threads)
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(number)
    passes.use(current)
    SUBJECT[:] = [subject]


def _call(function: Callable[..., Done], job: tuple[Any, ...]) -> Done:
    return function(SUBJECT[0], *job)


def _under(
    subject: Local, settings: EvalConfig, function: Callable[..., list[Done]], *job: Any
) -> list[Done]:
    return function(subject.under(settings), *job)


def _whole(subject: Local, work: Work[Row, Done], batch: list[Row]) -> list[Done]:
    return [each for part in work(subject, batch) for each in part]
