"""The documents name what there is: files, modules, settings, commands."""

import ast
import importlib.util
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from dcr.core import config
from dcr.extensions import EvalSettings, TrainSettings
from dcr.public import SOURCES

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {ROOT / "docs/configuration.md"}  # by docs/hooks.py, when the site is built
FOLDERS = ("dcr", "docs", "tests", "conf", "examples", "benchmarks")
# `dcr/core/losses.py`, `docs/data.md`, `tests/campaign`, `conf/model/`
PATHS = re.compile(rf"(?<![\w/<>$-])((?:{'|'.join(FOLDERS)})/[\w./-]*\w/?|train\.py|eval\.py)")
LINKS = re.compile(r"\]\(([^)#:\s]+)\)")
BLOCKS = re.compile(r"```python\n(.*?)```", re.DOTALL)
MODULES = re.compile(r"(?:python -m |`)(dcr(?:\.[a-z_]+)+)")
COMMANDS = re.compile(r"python (train|eval)\.py ([^\n`]*)")
GROUPS = ("model", "data", "preset", "sweep", "steering")
SCHEMAS = {"train": TrainSettings, "eval": EvalSettings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_and_module_named_is_there(document: Path) -> None:
    text = document.read_text()
    named = {ROOT / path for path in PATHS.findall(text)}
    linked = {document.parent / path for path in LINKS.findall(text)} - GENERATED
    missing = [str(path.relative_to(ROOT)) for path in named | linked if not path.exists()]
    assert not missing
    dotted = MODULES.findall(text)  # a module, what is in one, or a setting of stage one
    assert not [d for d in dotted if not is_there(d) and not exists(d, TrainSettings)]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_name_of_ours_that_a_page_imports_is_there(document: Path) -> None:
    for code in BLOCKS.findall(document.read_text()):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("dcr"):
                for name in node.names:
                    assert is_there(f"{node.module}.{name.name}"), f"{node.module}: {name.name}"
            elif isinstance(node, ast.Import):
                ours = [name.name for name in node.names if name.name.startswith("dcr")]
                assert all(map(is_there, ours)), ours


def test_no_page_installs_the_package_that_bears_our_name_on_the_index() -> None:
    for document in DOCUMENTS:
        assert not re.findall(r"pip install [^\n`]*?['\" ]dcr\b", document.read_text()), document


def is_there(dotted: str) -> bool:
    """Whether a module of this name can be imported, or a module that has this attribute."""
    try:
        if importlib.util.find_spec(dotted) is not None:
            return True
    except ModuleNotFoundError:
        pass
    module, _, attribute = dotted.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError:
        return False


def written() -> list[tuple[str, str, str]]:
    """Every setting of a documented command: the document, the script and `key=value`."""
    found = []
    for document in DOCUMENTS:
        for script, rest in COMMANDS.findall(document.read_text()):
            for argument in re.split(r"\s+", rest.partition("#")[0].split("|")[0]):
                if "=" in argument and "…" not in argument:
                    found.append((document.name, script, argument.rstrip(",;:)")))
    return list(dict.fromkeys(found))


def test_every_setting_of_a_documented_command_exists() -> None:
    """A key, or a file of conf/, each of which test_config composes."""
    wrong = []
    for document, script, argument in written():
        key, _, value = argument.lstrip("+").partition("=")
        if key.startswith(("hydra.", "hydra/", '"', "'")):
            continue
        if key in GROUPS and (key != "steering" or script == "eval"):
            names = [name for name in value.split(",") if not name.startswith(("<", "["))]
            known = all((ROOT / "conf" / key / f"{name}.yaml").is_file() for name in names)
        else:
            known = exists(key, SCHEMAS[script])
        if not known:
            wrong.append(f"{document}: {script}.py {argument}")
    assert not wrong


def exists(key: str, schema: type) -> bool:
    """Whether a dotted key is one of a typed tree's; below a free mapping any name is."""
    node: object = schema
    for part in key.split("."):
        fields = getattr(node, "__dataclass_fields__", None)
        if fields is None:
            return "dict" in str(node)
        if part not in fields:
            return False
        kind = fields[part].type
        node = kind if not isinstance(kind, str) else getattr(config, kind, kind)
    return True


def test_the_table_of_sets_has_the_number_of_rows_of_each_source() -> None:
    """`test_sources.py` counts the rows of the files."""
    text = (ROOT / "docs/data.md").read_text()
    counted, seen = {}, set[str]()
    for name, source in SOURCES.items():
        whole, file = source.hub.rows if source.hub else None, source.rows
        told = f"{whole:,}" if whole else None
        counted[name] = f"{told}; file: {file:,}" if file and file != whole else told
    for line in re.findall(r"^\| (`(?:.* \| ){5}.*)", text, re.MULTILINE):
        named, _, rows, *_ = line.split(" | ")
        names = re.findall(r"`([\w<>*]+)`", named)
        parts = [n.removeprefix("<name>") for n in names if n.startswith("<name>")]
        if parts:
            names = [n + part for part in parts for n in names if not n.startswith("<")]
        elif names[-1].startswith("_"):
            names = [names[0], *(names[0].rpartition("_")[0] + end for end in names[1:])]
        shown = re.split(r", | and ", rows)
        if names[0] in SOURCES and counted[names[0]]:
            assert [counted[name] for name in names] == shown, line
            seen.update(names)
    assert [name for name, count in counted.items() if count and name not in seen] == []


def leaves(tree: object, path: str = "") -> list[str]:
    if not isinstance(tree, dict) or not tree:
        return [path.strip(".")]
    return [leaf for key, below in tree.items() for leaf in leaves(below, f"{path}.{key}")]


def test_the_reference_has_a_row_for_every_setting() -> None:
    """As OmegaConf sees both trees; mappings of the user's own are one setting."""
    rows = runpy.run_path(str(ROOT / "docs/hooks.py"))["reference"]()
    for schema in SCHEMAS.values():
        tree = OmegaConf.to_container(OmegaConf.structured(schema), resolve=False)
        named = {re.sub(r"(parameters)\..*", r"\1", leaf) for leaf in leaves(tree)}
        assert not [key for key in named if f"| `{key}` |" not in rows]
    told = "of one pass, with padding; another number draws other dropout masks"
    assert f"| `sft.micro_tokens` | whole number | `2048` | {told} |" in rows
    own = "| `tracking.entk.prompts` | whole number | `5` | of each kind |"  # not KernelConfig's 25
    assert own in rows
    assert "| `llm.url` | text | none | its address; null: OpenAI's own |" in rows


def test_no_page_of_the_site_loads_anything_from_elsewhere(tmp_path: Path) -> None:
    """So that it is whole from a disk, its search included, which the theme would break there."""
    build = [sys.executable, "-m", "mkdocs", "--quiet", "build", "--strict", "-d", str(tmp_path)]
    subprocess.run(build, check=True, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})
    loads = re.compile(
        r"<(?:script|img|iframe)[^>]* src=\"([^\"]+)|<link rel=\"?stylesheet[^>]*href=\"([^\"]+)"
    )
    pages = [page for page in tmp_path.glob("*.html") if page.name != "404.html"]  # a server's
    named = {(page, "".join(found)) for page in pages for found in loads.findall(page.read_text())}
    assert (tmp_path / "index.html", "iframe-worker.js") in named
    assert not [str(page) for page, file in named if not (page.parent / file).is_file()]


def test_a_key_that_there_is_not_would_be_found() -> None:
    assert exists("dcr.optim.lr", TrainSettings)
    assert exists("llm.parameters.top_p", EvalSettings)
    assert not exists("dcr.optim.rate", TrainSettings)
    assert not exists("dcr.margin", EvalSettings)
    assert not is_there("dcr.nothing")
    assert {"dcr/core/losses.py", "train.py"} <= set(
        PATHS.findall("`dcr/core/losses.py` and train.py")
    )
