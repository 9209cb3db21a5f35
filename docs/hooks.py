"""Pages of the documentation site that are made from the code when it is built."""

import io
import tokenize
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from enum import Enum
from inspect import getdoc, getsource
from typing import Any, get_args

import omegaconf
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from dcr import launching
from dcr.core.config import CONF
from dcr.extensions import EvalSettings, TrainSettings

SCRIPTS = {"train.py": TrainSettings, "eval.py": EvalSettings}
LAUNCHERS = {"joblib": launching.JoblibOptions, "slurm": launching.SlurmOptions}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    files.append(File.generated(config, "configuration.md", content=reference()))
    return files


def reference() -> str:
    """Every setting of both scripts: a table a node, as the dataclasses and their comments say."""
    parts = [
        "# Every setting",
        "Made from the dataclasses of `dcr/core/config/` and extensions when this page was built. "
        "A default in dots, such as `model.layer`, is taken from there. `key=null` gives none.",
        "## Files to choose from",
        "A name on the command line takes the file: `model=llama3_8b`.",
        _table(("group", "files"), _groups()),
    ]
    shown: set[str] = set()
    for script, schema in SCRIPTS.items():
        parts += [f"## {script}", *_node("", schema(), shown)]
    for name, schema in LAUNCHERS.items():
        parts += [f"## -m hydra/launcher={name}", *_node("hydra.launcher", schema(), shown)]
    return "\n\n".join(parts) + "\n"


def _groups() -> Iterator[tuple[str, str]]:
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir()):
        names = ", ".join(f"`{file.stem}`" for file in sorted(folder.glob("*.yaml")))
        if names:
            yield f"`{folder.name}=`", names


def _node(path: str, node: Any, shown: set[str]) -> Iterator[str]:
    """A node: heading, what it is, its settings, the nodes below it; a link where it is `shown`."""
    schema = type(node)
    anchor = f"{path.replace('.', '-')}-{schema.__name__.lower()}"
    if anchor in shown:
        yield f"[`{path}`](#{anchor}) is that of `train.py`."
        return
    shown.add(anchor)
    if path:
        yield f"### `{path}` {{ #{anchor} }}"
    if (told := getdoc(schema)) and not told.startswith(f"{schema.__name__}("):
        yield told
    said, below, rows = comments(schema), [], []
    for entry in fields(schema):
        if entry.name.startswith("_"):  # Hydra's own
            continue
        key = f"{path}.{entry.name}" if path else entry.name
        made = getattr(node, entry.name)
        if is_dataclass(made):
            below.append((key, made))
        else:
            rows.append((f"`{key}`", _type(entry.type), _default(made), said.get(entry.name, "")))
    if rows:
        yield _table(("setting", "type", "default", "meaning"), rows)
    for key, inner in below:
        yield from _node(key, inner, shown)


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    cells = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _type(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, Enum):
        return " ".join(f"`{member.value}`" for member in kind)
    if getattr(kind, "__origin__", None) is dict:
        return "mapping"
    if inner := get_args(kind):
        named = " or ".join(_type(each) for each in inner if each is not type(None))
        return f"list of {named}" if getattr(kind, "__origin__", None) is list else named
    names = {"str": "text", "int": "whole number", "float": "number", "bool": "yes or no"}
    name = getattr(kind, "__name__", str(kind))
    return names.get(name, "any" if name == "Any" else name)


def _default(made: Any) -> str:
    if made == omegaconf.MISSING:
        return "needed"
    if isinstance(made, str) and made.startswith("${"):
        return f"`{made[2:-1]}`"
    if isinstance(made, list):
        plain = [each.value if isinstance(each, Enum) else each for each in made]
        return f"`[{', '.join(map(str, plain))}]`"
    if isinstance(made, Enum):
        return f"`{made.value}`"
    words = {None: "none", True: "yes", False: "no", "": "empty"}
    if made is None or isinstance(made, bool) or made == "":
        return words[made]
    return f"`{made:.3g}`" if isinstance(made, float) else f"`{made}`"


def comments(schema: type) -> dict[str, str]:
    """The comment above or behind each field, inherited ones included."""
    said: dict[str, str] = {}
    for owner in reversed([each for each in schema.__mro__ if is_dataclass(each)]):
        above: list[str] = []
        name, begins, depth = "", True, 0
        for token in tokenize.generate_tokens(io.StringIO(getsource(owner)).readline):
            if token.type == tokenize.COMMENT:
                text = token.string.lstrip("# ")
                if begins:
                    above.append(text)
                elif name:
                    said[name] = " ".join(filter(None, [said.get(name, ""), text]))
            elif token.type == tokenize.NAME and begins:
                name, begins = token.string, False
                if above:
                    said[name] = " ".join(above)
                above = []
            elif token.type == tokenize.NEWLINE:
                begins, name = True, name if depth else ""
    return said
