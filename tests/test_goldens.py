"""What commands printed, wrote and measured when they were last looked at.

Nothing here is true by itself: the goldens say only that a change of code changed no result. When
one is meant to change, `python tests/test_goldens.py [name ...]` writes it anew and prints what
changed, and the commit says why. All is observed through commands and files.
"""

import csv
import difflib
import io
import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from safetensors.torch import load_file

from dcr import commands

ROOT = Path(__file__).parent.parent
GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = 2e-3  # relative: other CPUs round otherwise, and training carries that on
# Absolute, of an AUROC's interval: where two scores are level on one CPU and a last bit apart on
# another, the bootstrap draws other resamples, by which its ends moved by up to 0.0035.
INTERVAL = 5e-3
TRAINED = (
    *("model=tiny", "precision=fp32", "run=run", "seed=0", "trainer.threads=1"),
    "trainer.accelerator=cpu",
    *("trainer.progress=false", "wandb.mode=disabled", "data.normal.count=16"),
    *("data.safety.count=8", "data.seemingly_toxic.count=10", "dcr.batch_size=8"),
)
EVALUATED = (
    *("run=run", "wandb.mode=disabled", "limit=12", "gen.max_new_tokens=6", "precision=fp32"),
    *("tasks=[over_refusal,safety,refusal_probability,separability]", "sep.prompts=16"),
)


def command(script: str, *arguments: str) -> str:
    """The output of a command that runs in this process and the current folder.

    `script` is `train.py`, `eval.py`, `dcr` or a module. Raises AssertionError where it fails.
    """
    package = (ROOT / script.replace(".", "/")).is_dir()
    module = f"{script}.__main__" if package else script
    imported = sys.modules.pop(module, None)  # runpy warns of what another test has imported
    before, sys.argv = sys.argv, [str(ROOT / script), *arguments]
    GlobalHydra.instance().clear()
    said, complained = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(complained):
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            elif script == "dcr":
                commands.main()
            else:
                runpy.run_module(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            told = said.getvalue() + complained.getvalue()
            raise AssertionError(f"{script} {arguments}: {told}") from ended
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
        if imported is not None:
            sys.modules[module] = imported
    return said.getvalue()


# --- settings and help ----------------------------------------------------------------------------

SHOWN = (
    "train.py",
    "train.py preset=recommended model=llama3_8b data=paper --resolve",
    "eval.py",
    "eval.py model=qwen2_5_7b data=paper steering=surgical --resolve",
)


def settings(_: Path) -> dict[str, str]:
    """Every key of the two scripts with its value, as they stand and composed of other files."""
    lines = [f"{line} --cfg job" for line in SHOWN]
    return {line: command(*line.split()) for line in lines}


def helps(_: Path) -> dict[str, str]:
    """Every `--help`: of the two scripts, of `dcr` and of each command that it lists."""
    listed = command("dcr", "--help")
    names = [line.split()[0] for line in listed.splitlines()[2:]]
    modules = [f"dcr.{name}" for name in names if name not in ("train", "eval")]
    told = {script: command(script, "--help") for script in ("train.py", "eval.py", *modules)}
    return {f"{script} --help": text for script, text in ({"dcr": listed} | told).items()}


# --- both stages ----------------------------------------------------------------------------------


def chain(place: Path) -> dict[str, Any]:
    """Both stages, an evaluation and the report: everything that must not change unseen."""
    os.chdir(place)
    plan = command("train.py", *TRAINED, "plan=true")
    command("train.py", *TRAINED)
    command("eval.py", *EVALUATED)
    command("dcr.report", "run", "--table", "table1", "out=shown/report.html")
    (evaluation,) = Path("run/eval").iterdir()
    metrics = json.loads((evaluation / "metrics.json").read_text())
    return {
        "plan": told(plan),
        "config": yaml.safe_load(Path("run/config.yaml").read_text()),
        "rows": {
            name: [part["count"], part["fingerprint"][:12]]
            for name, part in json.loads(Path("run/rows.json").read_text())["rows"].items()
        },
        "logged": last_logged(Path("run/metrics.csv")),
        "weights": {
            f"{file.parent.name}/{name}": [float(one.norm()), float(one.flatten()[0])]
            for file in sorted(Path("run").glob("*/*.safetensors"))
            for name, one in sorted(load_file(file).items())
        },
        "evaluation": numbers(metrics),
        "table1": list(csv.reader(io.StringIO(Path("shown/table1.csv").read_text()))),
    }


TIMES = r"^time on|TFLOP|measured\)?$|threads"


def told(plan: str) -> list[str]:
    """A plan's lines without what the machine's speed decides: its times, and with them widths."""
    lines = (" ".join(line.split()) for line in plan.splitlines())
    return [line for line in lines if line.strip("─") and not re.search(TIMES, line)]


def last_logged(file: Path) -> dict[str, float]:
    """The last value of every logged quantity."""
    rows = csv.DictReader(io.StringIO(file.read_text()))
    kept = {row["key"]: float(row["value"]) for row in rows}
    return {key: value for key, value in sorted(kept.items()) if "second" not in key}


def numbers(tree: Any, prefix: str = "") -> dict[str, float]:
    """Every number of a document by its path, without seconds, memory and single prompts."""
    if isinstance(tree, bool) or not isinstance(tree, (dict, list, int, float)):
        return {}
    if isinstance(tree, (int, float)):
        return {prefix: tree}
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    left_out = (
        "seconds",
        "peak_memory_gib",
        "decoding",
        "values",
        "version",
        "mds",
        "labels",
        "contamination",
    )
    return {
        path: number
        for key, held in pairs
        if key not in left_out
        for path, number in numbers(held, f"{prefix}/{key}").items()
    }


def differences(golden: Any, now: Any, path: str = "") -> list[str]:
    """`path: golden -> now` wherever two documents differ by more than rounding."""
    if isinstance(golden, dict) and isinstance(now, dict):
        keys = sorted(golden.keys() | now.keys())
        return [d for k in keys for d in differences(golden.get(k), now.get(k), f"{path}/{k}")]
    if isinstance(golden, list) and isinstance(now, list) and len(golden) == len(now):
        pairs = enumerate(zip(golden, now, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    if isinstance(golden, float) and isinstance(now, (int, float)):
        least = INTERVAL if re.search(r"/auroc/(\w+/)?[12]$", path) else 1e-6
        near = now == pytest.approx(golden, rel=TOLERANCE, abs=least)
        return [] if near else [_told(path, golden, now)]
    return [] if golden == now else [_told(path, golden, now)]


def _told(path: str, golden: object, now: object) -> str:
    return f"{path}: {golden} -> {now}"


# --- the files ------------------------------------------------------------------------------------

PARTS: dict[str, Callable[[Path], Any]] = {
    "settings.txt": settings,
    "help.txt": helps,
    "tiny_chain.json": chain,
}


def written(name: str, made: Any) -> str:
    """The golden's text: JSON, or each command with what it printed."""
    if name.endswith(".json"):
        return json.dumps(made, indent=0, ensure_ascii=False) + "\n"
    return "\n".join(f"$ {line}\n{text.rstrip()}\n" for line, text in made.items())


def changes(name: str, golden: str, now: str) -> list[str]:
    """A line for each difference of two texts of a golden; of numbers, beyond rounding."""
    if name.endswith(".json"):
        return differences(json.loads(golden), json.loads(now))
    return list(difflib.unified_diff(golden.splitlines(), now.splitlines(), name, "now", n=0))


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder in which the commands run, one after the other."""
    folder, before = tmp_path_factory.mktemp("goldens"), Path.cwd()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DCR_SWEEP", "HYDRA_FULL_ERROR"):
            patch.delenv(name, raising=False)
        yield folder
    os.chdir(before)


@pytest.mark.parametrize("name", PARTS)
def test_commands_do_what_they_did(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    now = written(name, PARTS[name](place))
    changed = changes(name, (GOLDENS / name).read_text(), now)
    assert not changed, "\n".join(changed[:40])


def test_a_changed_number_is_seen() -> None:
    golden = json.loads((GOLDENS / "tiny_chain.json").read_text())
    moved = json.loads((GOLDENS / "tiny_chain.json").read_text())
    name = next(iter(moved["weights"]))
    moved["weights"][name][0] *= 1.01
    assert differences(golden, moved)[0].startswith(f"/weights/{name}/0: ")
    ends = [path for path in moved["evaluation"] if path.endswith("first_token/auroc/mass/1")]
    moved = {**golden, "evaluation": dict(golden["evaluation"])}
    moved["evaluation"][ends[0]] += 0.006
    assert len(differences(golden, moved)) == len(ends) == 1


@pytest.mark.parametrize("name", PARTS)
def test_every_changed_value_is_seen(name: str) -> None:
    golden = (GOLDENS / name).read_text()
    assert changes(name, golden, golden) == []
    if name.endswith(".json"):
        count, moved = all_moved(json.loads(golden))
        assert len(changes(name, golden, json.dumps(moved))) == count > 0
    else:
        assert changes(name, golden, golden.replace("\n", " \n", 1))


def all_moved(tree: Any) -> tuple[int, Any]:
    """How many values a document holds, and the document with each of them changed."""
    if isinstance(tree, dict):
        moved = {key: all_moved(held) for key, held in tree.items()}
        return sum(n for n, _ in moved.values()), {key: held for key, (_, held) in moved.items()}
    if isinstance(tree, list):
        listed = [all_moved(held) for held in tree]
        return sum(n for n, _ in listed), [held for _, held in listed]
    if isinstance(tree, float):
        return 1, tree * 1.01 + 0.006
    return 1, f"not {tree}"


def main(arguments: Sequence[str]) -> None:
    """Write the goldens of these names anew, or all, and print what that changed."""
    sys.path.insert(0, str(ROOT))
    wanted = {name: part for name, part in PARTS.items() if not arguments or name in arguments}
    with tempfile.TemporaryDirectory() as folder:
        for name, part in wanted.items():
            os.chdir(folder)
            text, file = written(name, part(Path(folder).resolve())), GOLDENS / name
            before = file.read_text() if file.exists() else "{}"
            file.write_text(text)
            print(*(line[:200] for line in changes(name, before, text)), sep="\n")
        os.chdir(ROOT)


if __name__ == "__main__":
    main(sys.argv[1:])
