"""The law of the house: who imports whom, and that the contracts which say so bite."""

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import grimp
import pytest
import torch
from beartype.roar import BeartypeCallHintViolation

from dcr.core.losses import circle_loss

ROOT = Path(__file__).parent.parent
CORE = {"core", "train", "eval"}
# files, and lines that a few mends may still add to: of the core, and of what a command opens
CORE_SIZE = (35, 8000)
OPENED = {"dcr.train": (25, 5500), "dcr.eval": (25, 5500)}


def contract() -> dict[str, list[str]]:
    """The contract of pyproject.toml that keeps the core apart."""
    written = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (found,) = (c for c in written["contracts"] if c["name"] == "the core imports no extension")
    return found


def test_the_contract_names_every_extension() -> None:
    places = [p for p in (ROOT / "dcr").iterdir() if p.suffix == ".py" or any(p.glob("*.py"))]
    there = {f"dcr.{place.stem}" for place in places} - {"dcr.__init__"}
    core = {f"dcr.{name}" for name in CORE}
    assert set(contract()["source_modules"]) == core
    assert set(contract()["forbidden_modules"]) == there - core


@pytest.mark.parametrize(
    ("file", "imported", "told"),
    [
        ("core/losses.py", "dcr.report", "dcr.core.losses -> dcr.report"),
        ("looks/counting.py", "dcr.gating", "dcr.looks is not allowed to import dcr.gating"),
    ],
    ids=["core", "extension"],
)
def test_a_contract_fails_when_a_function_imports_an_extension(
    tmp_path: Path, file: str, imported: str, told: str
) -> None:
    shutil.copytree(ROOT / "dcr", tmp_path / "dcr", ignore=shutil.ignore_patterns("*.jsonl"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "dcr" / file).open("a") as source:
        source.write(f"def _broken() -> None:\n    import {imported}\n")
    checked = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert checked.returncode == 1
    assert told in checked.stdout


def size(modules: set[str]) -> tuple[int, int]:
    """The number of their files and of the lines in them."""
    places = [ROOT.joinpath(*module.split(".")) for module in modules]
    files = [p / "__init__.py" if p.is_dir() else p.with_suffix(".py") for p in places]
    return len(files), sum(len(file.read_text().splitlines()) for file in files)


def test_the_core_is_no_larger_than_a_reader_holds_in_an_afternoon() -> None:
    graph = grimp.build_graph("dcr", cache_dir=None)
    core = graph.find_descendants("dcr.core") | {"dcr.core", "dcr.train", "dcr.eval"}
    files, lines = size(core)
    assert files <= CORE_SIZE[0]
    assert lines <= CORE_SIZE[1]


def opened_by(command: str) -> set[str]:
    """The command and all that it imports, lazily too.

    Python runs the packages around a module with it, which are therefore among these.
    """
    graph, found, waiting = grimp.build_graph("dcr", cache_dir=None), set[str](), {command}
    while waiting:
        module = waiting.pop()
        found.add(module)
        around = [str(place).replace("/", ".") for place in Path(module.replace(".", "/")).parents]
        waiting |= {*graph.find_modules_directly_imported_by(module), *around[:-1]} - found
    return found


@pytest.mark.parametrize("command", OPENED)
def test_no_command_opens_more_than_it_does_today(command: str) -> None:
    opened = opened_by(command)
    files, lines = size(opened)
    assert files <= OPENED[command][0], sorted(opened)
    assert lines <= OPENED[command][1]


@pytest.mark.parametrize(
    ("features", "labels"),
    [
        (torch.zeros(3, 2), torch.zeros(4, dtype=torch.long)),  # of another batch
        (torch.zeros(3), torch.zeros(3, dtype=torch.long)),
        (torch.zeros(3, 2), torch.zeros(3)),
    ],
)
def test_tests_check_the_shapes_in_signatures(features: torch.Tensor, labels: torch.Tensor) -> None:
    with pytest.raises(BeartypeCallHintViolation):
        circle_loss(features, labels, 0.25, 16.0)


def test_contributing_names_every_room() -> None:
    told = re.findall(r"`(?:dcr/)?([\w./]+)`", (ROOT / "CONTRIBUTING.md").read_text())
    names = {Path(name).stem for name in told}
    places = [*(ROOT / "dcr").iterdir(), *(ROOT / "dcr/core").iterdir()]
    there = {place.stem for place in places if not place.name.startswith(("__", "."))}
    assert there <= names, there - names
