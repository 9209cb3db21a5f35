"""A built wheel in a bare environment, outside the checkout: its commands and its configuration."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
SHIPPED = ("dcr", "hydra_plugins", "conf", "setup.py", "pyproject.toml", "README.md", "LICENSE")
SMALL = [f"data.{part}.count=8" for part in ("seemingly_toxic", "safety", "normal")]
SMALL += ["dcr.epochs=1", "sft.epochs=1", "trainer.progress=false", "wandb.mode=disabled"]
CHAIN = f"""
import sys
# what extras bring is absent
for name in ("lm_eval", "openai", "wandb_workspaces", "mkdocs", "optuna", "submitit"):
    sys.modules[name] = None
import dcr
import hydra_plugins.dcr_launchers
from dcr import commands
print(dcr.__file__)
for words in (
    ["train", "model=tiny", "run=outputs/run", *{SMALL}],
    ["eval", "run=outputs/run", "limit=2", "gen.max_new_tokens=2", "wandb.mode=disabled"],
    ["report", "outputs/run", "out=page.html"],
):
    sys.argv = [sys.argv[0], *words]
    try:
        commands.main()
    except SystemExit as ended:
        assert not ended.code, words
sys.stderr = sys.stdout
for words in (
    ["eval", "run=outputs/run", "tasks=[ability]"],
    ["eval", "run=outputs/run", "judge=[llm]"],
    ["dashboard"],
    ["search"],
):
    sys.argv = [sys.argv[0], *words]
    try:
        commands.main()
    except SystemExit as ended:
        print("exit code", ended.code)
"""
EXTRAS = (
    "tasks=[ability]: needs lm_eval; run pip install '.[ability]' in the checkout",
    "llm: needs openai; run pip install '.[judges]' in the checkout",
    "python -m dcr.dashboard: needs wandb_workspaces; "
    "run pip install '.[dashboard]' in the checkout",
    "python -m dcr.search: needs optuna; run pip install '.[search]' in the checkout",
)


def called(*command: object, place: Path) -> str:
    """Runs a command in which no variable leads back to the checkout, and returns its output."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    words = [str(word) for word in command]
    ended = subprocess.run(words, cwd=place, env=plain, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def sources() -> list[Path]:
    """Every file of `dcr`, `hydra_plugins` and `conf`."""
    found = (file for room in SHIPPED[:3] for file in (ROOT / room).rglob("*.*"))
    return [file for file in found if file.is_file() and file.suffix != ".pyc"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built")
    for file in [*sources(), *(ROOT / name for name in SHIPPED[3:])]:
        (made := folder / "checkout" / file.relative_to(ROOT)).parent.mkdir(
            parents=True, exist_ok=True
        )
        shutil.copy(file, made)
    offline = ("--no-deps", "--no-build-isolation", "--no-index")
    called(sys.executable, "-m", "pip", "wheel", *offline, "./checkout", place=folder)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the commands in an environment that has the wheel and what it needs."""
    place = tmp_path_factory.mktemp("environment")
    venv.create(place, symlinks=True)
    programs = place / "bin"
    pip = (sys.executable, "-m", "pip", "--python", programs / "python", "install")
    called(*pip, "--no-deps", "--no-index", wheel, place=place)
    (packages,) = place.glob("lib/*/site-packages")
    # found behind the wheel, and without the checkout, whose own .pth file only a site folder has
    (packages / "locked.pth").write_text(sysconfig.get_path("purelib"))
    return programs


def test_a_wheel_holds_every_file_once_and_nothing_else(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        held = [name for name in archive.namelist() if ".dist-info/" not in name]
    wanted = [str(file.relative_to(ROOT)) for file in sources()]
    assert sorted(held) == sorted(
        f"dcr/{name}" if name.startswith("conf/") else name for name in wanted
    )


def test_outside_a_checkout_it_trains_evaluates_and_reports(programs: Path, tmp_path: Path) -> None:
    lines = called(programs / "python", "-c", CHAIN, place=tmp_path).splitlines()
    said = [line for line in lines if not line.startswith("[INFO]")]
    assert said[-2 * len(EXTRAS) :] == [
        line for told in EXTRAS for line in (f"error: {told}", "exit code 2")
    ]
    assert Path(said[0]).is_relative_to(programs.parent)
    assert {"contrastive", "sft", "eval"} <= {p.name for p in (tmp_path / "outputs/run").iterdir()}
    assert "</html>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("dcr", "dcr <command> [--help] [key=value ...]"),
        ("dcr-train --help", "train is powered by Hydra."),
    ],
)
def test_a_command_says_what_it_is(command: str, says: str, programs: Path, tmp_path: Path) -> None:
    name, *rest = command.split()
    assert called(programs / name, *rest, place=tmp_path).splitlines()[0] == says
    assert not [*tmp_path.iterdir()]
