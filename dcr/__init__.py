"""Discernment via contrastive refinement: train, measure and explain less over-refusing models."""

import sys
from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

__version__ = "0.1.0"


def on_demand(package: str, *modules: str) -> Callable[[str], Any]:
    """A `__getattr__` of a package that offers names of modules which few of its users need.

    Such a module takes seconds to import, with torch or transformers, and is when a name of it is
    first asked for.
    """

    places = sys.modules[package].__path__
    own = {module.name for module in iter_modules(places)}  # which `import` finds by itself

    def found(name: str) -> Any:
        if not name.startswith("__") and name not in own:
            for module in modules:
                offered = vars(import_module(f"{package}.{module}"))
                if name in offered:
                    return offered[name]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return found
