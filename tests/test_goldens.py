"""What a tiny chain of commands measured when it was last looked at, number by number.

Nothing here is true by itself: the numbers say only that a change of code changed no result. When
one is meant to change, `python tests/test_goldens.py` writes them anew, and the commit says why.
"""

import csv
import io
import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "goldens" / "tiny_chain.json"
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
    """What a command prints, run in this process in the current folder."""
    before, sys.argv = sys.argv, [str(ROOT / script), *arguments]
    GlobalHydra.instance().clear()
    said = io.StringIO()
    try:
        with redirect_stdout(said), redirect_stderr(io.StringIO()):
            if script.endswith(".py"):
                runpy.run_path(str(ROOT / script), run_name="__main__")
            else:
                sys.modules.pop(f"{script}.__main__", None)  # as another test may have imported it
                runpy.run_module(script, run_name="__main__")
    except SystemExit as ended:
        if ended.code:
            raise AssertionError(f"{script} {arguments}: {said.getvalue()}") from ended
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
        HydraConfig.instance().cfg = None
    return said.getvalue()


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


def test_a_tiny_chain_measures_what_it_did(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("DCR_SWEEP", "HYDRA_FULL_ERROR"):
        monkeypatch.delenv(name, raising=False)
    changed = differences(json.loads(GOLDEN.read_text()), json.loads(json.dumps(chain(tmp_path))))
    assert not changed, "\n".join(changed[:40])


def test_a_changed_number_is_seen() -> None:
    golden = json.loads(GOLDEN.read_text())
    moved = json.loads(GOLDEN.read_text())
    name = next(iter(moved["weights"]))
    moved["weights"][name][0] *= 1.01
    assert differences(golden, moved)[0].startswith(f"/weights/{name}/0: ")
    ends = [path for path in moved["evaluation"] if path.endswith("first_token/auroc/mass/1")]
    moved = {**golden, "evaluation": dict(golden["evaluation"])}
    moved["evaluation"][ends[0]] += 0.006
    assert len(differences(golden, moved)) == len(ends) == 1
    assert differences(golden, {**golden, "rows": {}})
    assert not differences(golden, json.loads(GOLDEN.read_text()))


def main(arguments: Sequence[str]) -> None:
    """Write the golden anew, and print what that changed."""
    sys.path.insert(0, str(ROOT))
    before = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        now = json.loads(json.dumps(chain(Path(place).resolve())))
        os.chdir(ROOT)
    GOLDEN.write_text(json.dumps(now, indent=0, ensure_ascii=False) + "\n")
    print(*(line[:200] for line in differences(before, now)), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
