"""Damaged files of a run folder: one line with the file, and what mends it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dcr.config import DataError
from dcr.report.printing import printable, reason

UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
Part = TypeVar("Part")


def damaged(
    path: Path | str, error: Exception, cure: str = "delete it, or evaluate again"
) -> DataError:
    """What a file that cannot be read ends in."""
    return DataError(f"{printable(str(path))}: damaged ({reason(error)}); {cure}")


def only(
    path: Path, key: str, raw: Mapping[str, Any], parse: Callable[[Mapping[str, Any]], Part]
) -> Part | None:
    """What stands under an optional key of its own."""
    return parts(path, key, {key: {"": raw.get(key)}}, parse).get("")


def parts(
    path: Path,
    key: str,
    raw: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], Part],
    prefix: str = "",
) -> dict[str, Part]:
    """What stands under an optional key, by name. DataError, naming the part that is damaged."""
    found = raw.get(key) or {}
    read: dict[str, Part] = {}
    for name, part in found.items():
        if part is None:
            continue
        try:
            read[printable(str(name))] = parse(part)
        except UNREADABLE as error:
            place = f"{path}: {prefix}{key}.{name}".removesuffix(".")
            raise damaged(place, error) from error
    return read
