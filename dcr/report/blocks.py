"""The optional parts of a `metrics.json`: each is read, or skipped with a note that says why."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from dcr.report.printing import printable, reason

UNREADABLE = (ValueError, KeyError, TypeError, AttributeError)
Part = TypeVar("Part")


def only(
    path: Path,
    key: str,
    raw: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], Part],
    notes: list[str],
) -> Part | None:
    """What stands under an optional key of its own."""
    return parts(path, key, {key: {"": raw.get(key)}}, parse, notes).get("")


def parts(
    path: Path,
    key: str,
    raw: Mapping[str, Any],
    parse: Callable[[Mapping[str, Any]], Part],
    notes: list[str],
    prefix: str = "",
) -> dict[str, Part]:
    """What stands under an optional key, by name; what cannot be read is skipped with a note."""
    found = raw.get(key) or {}
    if not isinstance(found, Mapping):
        notes.append(f"{path}: {prefix}{key} skipped, not a mapping")
        return {}
    read: dict[str, Part] = {}
    for name, part in found.items():
        if part is None:
            continue
        try:
            read[printable(str(name))] = parse(part)
        except UNREADABLE as error:
            place = f"{prefix}{key}.{name}".removesuffix(".")
            notes.append(f"{path}: {place} skipped, unreadable ({reason(error)})")
    return read
