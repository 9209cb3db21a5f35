"""How an extension is found by its dotted path, `package.module:Name`: ours, or a user's own part.

A part is a dataclass below one of our bases in a file outside the package: `protocols.Judge`,
`Task` and `Change`, `sources.Rows`, the report's `Figure` and `Table`. Its fields are its settings,
`own.<Name>.<field>=value`. Only what the user's own command or YAML names is imported: its path is
a `config.OwnPath`, which `dcr.own` loads.
"""

import dataclasses
import functools
import hashlib
import importlib
import inspect
from pathlib import Path
from typing import Any, TypeVar

from dcr import PARTS
from dcr.core.config import DataError, OwnPath

Part = TypeVar("Part")


def ours(path: str) -> Any:
    """The object that a path of our own tables names; None for no path."""
    if not path:
        return None
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def part(name: str) -> Any:
    """The function or table that an extension hands the core under this name, see `dcr.PARTS`."""
    return ours(PARTS[name])


def made(path: str, base: type[Part], key: str = "") -> Part:
    """An instance of the part that the user has named by this path, with its settings.

    `key` is the setting that names it. Raises ConfigError for each mistake in one line, and
    DataError for a path that only a run's `config.yaml` names, which imports nothing.
    """
    if not isinstance(path, OwnPath):
        raise DataError(
            f"{path}: this command does not name it, and a run's config.yaml imports nothing; "
            f"where you trust it, write it out, such as data.toxic.source={path}"
        )
    return path.made(base, key)


@functools.cache
def sha256(own: type) -> str:
    """The hash of the source file of a user's class, as it is when the class is loaded."""
    return hashlib.sha256(Path(inspect.getsourcefile(own) or "").read_bytes()).hexdigest()


def origin(part: Any) -> dict[str, Any]:
    """Path, source hash and settings of a part: they tell its versions apart in fingerprints."""
    own = type(part)
    return {
        "path": f"{own.__module__}:{own.__qualname__}",
        "sha256": sha256(own),
        "settings": dataclasses.asdict(part),
    }
