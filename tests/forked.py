"""Work that is killed midway: in a fork of this process, so that nothing is imported anew."""

import multiprocessing
import time
import warnings
from collections.abc import Callable

PATIENCE = 500.0  # seconds: only against hangs, and less than pytest's own


def killed(
    work: Callable[[], object], enough: Callable[[], bool], patience: float = PATIENCE
) -> None:
    """Start `work` and end it as `kill -9` does once `enough()` holds; it must not end before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of threads
        child = multiprocessing.get_context("fork").Process(target=work)
        child.start()
    until = time.monotonic() + patience
    try:
        while not enough():
            assert child.is_alive(), "ended before it could be killed"
            assert time.monotonic() < until
            time.sleep(0.002)
    finally:
        child.kill()
        child.join()
