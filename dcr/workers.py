"""Prompts shared among processes of this machine, each with the whole model, on a GPU of its own.

The first process cuts them into batches, hands these out, and alone writes what comes back, in the
order in which it was cut: which process answered a batch makes no difference to any answer.
"""

import copy
import logging
import multiprocessing
import pickle
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import torch

from dcr.core import extending, passes
from dcr.core.config import UserError
from dcr.core.evaluation.subjects import Local
from dcr.core.passes import Passes

log = logging.getLogger(__name__)

Row = TypeVar("Row")
Done = TypeVar("Done")


class Lost(UserError):
    """A process ended before it gave back what it was given."""

    exit_code = 1


class Workers:
    """`trainer.devices` processes that open the subject's weights, under its edits, when needed.

    They begin with the first batch and end with the `with` block, or with this process.
    """

    def __init__(self, subject: Local) -> None:
        self.subject = subject
        self.count = subject.settings.trainer.devices
        self.processes: dict[Connection, BaseProcess] = {}

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in self.processes.items():
            process.kill()
            connection.close()
        self.processes = {}

    def shared(
        self,
        cut: Callable[[Local, list[Row], int], list[list[Row]]],
        work: Callable[[Local, list[Row]], Iterator[list[Done]]],
        rows: list[Row],
    ) -> Iterator[list[Done]]:
        """What `work` gives of each of the batches that `cut` makes of the rows, in their order.

        Both run in the processes, so they and what they take and give must pickle. Raises what
        they raise, and Lost where a process was killed: what was given back before is whole.
        """
        (batches,) = self.each(cut, [(rows, self.count)])
        yield from self.each(_whole, [(work, batch) for batch in batches])

    def each(
        self, function: Callable[..., Done], givens: Sequence[tuple[Any, ...]]
    ) -> Iterator[Done]:
        """What the function makes of a process's subject and each of the tuples, in their order."""
        waiting, idle = deque(enumerate(givens)), self._started()
        found: dict[int, Any] = {}
        under_way: set[Connection] = set()
        for turn in range(len(givens)):
            while turn not in found:
                while waiting and idle:
                    place, given = waiting.popleft()
                    with self._living(idle[-1]):
                        idle[-1].send_bytes(pickle.dumps((place, function, given)))
                    under_way.add(idle.pop())
                for connection in wait(under_way):
                    assert isinstance(connection, Connection)
                    with self._living(connection):
                        answer = connection.recv_bytes()
                    # by value, since shared memory can be small
                    place, result, fault = pickle.loads(answer)
                    if fault is not None:
                        raise fault
                    found[place] = result
                    under_way.discard(connection)
                    idle.append(connection)
            yield found.pop(turn)

    @contextmanager
    def _living(self, connection: Connection) -> Iterator[None]:
        """Raises Lost where the process at the other end has ended."""
        try:
            yield
        except (EOFError, OSError):
            process = self.processes[connection]
            process.join(5)
            code = process.exitcode or 0
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise Lost(
                f"trainer.devices={self.count}: one of these processes was ended {how}; what is "
                "answered is kept, and the same command goes on"
            ) from None

    def _started(self) -> list[Connection]:
        threads = max(1, torch.get_num_threads() // self.count)
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        for number in range(0 if self.processes else self.count):
            ours, theirs = context.Pipe()
            named = extending.NAMED
            given = (theirs, number, threads, copy.copy(self.subject), passes.current(), named)
            process = context.Process(target=_serve, args=given, daemon=True)
            process.start()
            theirs.close()
            self.processes[ours] = process
        return list(self.processes)


def _whole(
    subject: Local, work: Callable[[Local, list[Row]], Iterator[list[Done]]], batch: list[Row]
) -> list[Done]:
    return [each for part in work(subject, batch) for each in part]


def _serve(
    asked: Connection,
    number: int,
    threads: int,
    subject: Local,
    told: Passes,
    named: dict[str, dict[str, Any]],
) -> None:
    """What each process does until the first one closes its end or ends."""
    extending.NAMED.update(named)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C reaches all; the first one ends us
    trainer = subject.settings.trainer
    torch.set_num_threads(trainer.threads or threads)
    if trainer.accelerator != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(number)
    passes.use(told)
    while True:
        try:
            place, function, given = pickle.loads(asked.recv_bytes())
        except EOFError:
            return
        try:
            result, fault = function(subject, *given), None
        except UserError as error:
            result, fault = None, error
        except Exception:  # of any kind: the first process waits for an answer, and raises it
            result, fault = None, RuntimeError(traceback.format_exc())
        asked.send_bytes(pickle.dumps((place, result, fault)))
