"""The bar of a long work, which where a command shows one over several works tells that instead."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

# Who is told the name of a work, the share of it that is done, and whether it only begins.
_LISTENERS: list[Callable[[str, float, bool], None]] = []


class Bar(tqdm):
    """tqdm's bar, hidden while another is shown for several works."""

    def __init__(self, *, desc: str, total: int, initial: int = 0, **options: Any) -> None:
        self.work, self.whole, self.past = desc, total, initial
        options["disable"] = options.get("disable") or bool(_LISTENERS)
        super().__init__(desc=desc, total=total, initial=initial, **options)
        self._tell(begins=True)

    def update(self, n: float | None = 1) -> bool | None:
        self.past += n or 0
        self._tell(begins=False)
        return super().update(n)

    def _tell(self, begins: bool) -> None:
        for listener in _LISTENERS:
            listener(self.work, self.past / self.whole if self.whole else 1.0, begins)


@contextmanager
def told_to(listener: Callable[[str, float, bool], None]) -> Iterator[None]:
    """Every bar inside is hidden, and how far it is goes to `listener`."""
    _LISTENERS.append(listener)
    try:
        yield
    finally:
        _LISTENERS.remove(listener)
