"""Prompts shared among processes of this machine, each with the whole model, on a GPU of its own.

The first process cuts them into batches, hands these out, and alone writes what comes back, in the
order in which it was cut: which process answered a batch makes no difference to any answer.
"""

import copy
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import torch

from dcr.core import ending, passes
from dcr.core.config import UserError
from dcr.core.evaluation.subjects import Local
from dcr.core.passes import Passes

Row = TypeVar("Row")
Done = TypeVar("Done")

SUBJECT: list[Local] = []  # of a worker process


class WorkerEnded(UserError):
    """A process ended before it gave back what it was given."""

    exit_code = 1


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
            process.kill()  # which may be in the middle of a long batch
        if self.pool:
            self.pool.shutdown(cancel_futures=True)

    def shared(
        self,
        cut: Callable[[Local, list[Row], int], list[list[Row]]],
        work: Callable[[Local, list[Row]], Iterator[list[Done]]],
        rows: list[Row],
    ) -> Iterator[list[Done]]:
        """What `work` gives of each of the batches that `cut` makes of the rows, in their order.

        Both run in the processes, so they and what they take and give must pickle. Raises what
        they raise, and WorkerEnded where a process was killed: what was given before is whole.
        """
        (batches,) = self.each(cut, [(rows, self.count)])
        yield from self.each(_whole, [(work, batch) for batch in batches])

    def each(
        self, function: Callable[..., Done], givens: Sequence[tuple[Any, ...]]
    ) -> Iterator[Done]:
        """What the function makes of a process's subject and each of the tuples, in their order."""
        self.pool = self.pool or self._started()
        try:
            yield from self.pool.map(_call, [function] * len(givens), givens)
        except BrokenProcessPool as error:
            raise WorkerEnded(
                f"trainer.devices={self.count}: one of these processes was killed, as where memory "
                "runs out; what is answered is kept, and the same command goes on"
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        numbers = context.SimpleQueue()
        for number in range(self.count):
            numbers.put(number)
        threads = max(1, torch.get_num_threads() // self.count)
        given = (os.getpid(), numbers, threads, copy.copy(self.subject), passes.current())
        return ProcessPoolExecutor(self.count, context, _begin, given)


def _begin(parent: int, numbers: Any, threads: int, subject: Local, told: Passes) -> None:
    """Make a new process ready: one GPU, its share of threads, the subject."""
    ending.end_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all; the first one ends us
    trainer, number = subject.settings.trainer, numbers.get()
    torch.set_num_threads(trainer.threads or threads)
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(number)
    passes.use(told)
    SUBJECT[:] = [subject]


def _call(function: Callable[..., Done], given: tuple[Any, ...]) -> Done:
    return function(SUBJECT[0], *given)


def _whole(
    subject: Local, work: Callable[[Local, list[Row]], Iterator[list[Done]]], batch: list[Row]
) -> list[Done]:
    return [each for part in work(subject, batch) for each in part]
