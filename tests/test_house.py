"""The law of the house: the core imports no extension, and the contract that says so bites."""

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
CORE = {"core", "train", "eval"}


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


def test_the_contract_fails_when_the_core_imports_an_extension_in_a_function(
    tmp_path: Path,
) -> None:
    shutil.copytree(ROOT / "dcr", tmp_path / "dcr", ignore=shutil.ignore_patterns("*.jsonl"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "dcr/core/losses.py").open("a") as losses:
        losses.write("def _broken() -> None:\n    import dcr.report\n")
    checked = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert checked.returncode == 1
    assert "dcr.core.losses -> dcr.report" in checked.stdout
