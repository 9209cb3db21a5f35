"""How an extension is found by its dotted path, `package.module:Name`."""

import importlib
from typing import Any


def ours(path: str) -> Any:
    """What a path of our own tables names; None for no path."""
    if not path:
        return None
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
