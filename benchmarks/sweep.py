"""CPU seconds of a ratio sweep, eight jobs trained and evaluated: a study against processes.

    python benchmarks/sweep.py [jobs=8] [threads=1]

STL and one DCR run a ratio on the tiny model, and the base model, with sizes at which what can be
paid once weighs most. `processes` runs train.py and eval.py for each job, `study` is
`python -m dcr.study`.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from dcr.core import models, storage
from dcr.core.config import ModelConfig, Precision
from dcr.core.models.training import save_full

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "conf" / "model" / "tiny.yaml"
TRAIN, EVAL = [str(ROOT / "train.py")], [str(ROOT / "eval.py")]
MODEL = ["model.name=../model", "model.label=tiny", "model.layer=1", "wandb.mode=disabled"]
TRAINED = [
    *(*MODEL, "data.normal.count=24", "data.safety.count=8", "data.seemingly_toxic.count=12"),
    *("dcr.batch_size=16", "dcr.epochs=1", "dcr.precision=fp32"),
    *("sft.precision=fp32", "sft.lora.targets=[all-linear]"),
]
EVALUATED = ["limit=8", "gen.max_new_tokens=8", "precision=fp32"]


def run(*words: str, threads: str) -> None:
    """One command in a process of its own. SystemExit where it fails."""
    command = [sys.executable, *words, f"trainer.threads={threads}"]
    ended = subprocess.run(command, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(words)}\n{ended.stderr[-2000:]}")


def processes(ratios: list[str], threads: str) -> None:
    run(*EVAL, *MODEL, *EVALUATED, "output=base", threads=threads)
    for asked in ["method=stl", *(f"dcr.ratio={ratio}" for ratio in ratios)]:
        run(*TRAIN, *TRAINED, asked, f"run=run-{asked[-1]}", threads=threads)
        run(*EVAL, f"run=run-{asked[-1]}", "wandb.mode=disabled", *EVALUATED, threads=threads)


def study(ratios: list[str], threads: str) -> None:
    asked = ["study=ratio", f"dcr.ratio={','.join(ratios)}", "out=study"]
    run("-m", "dcr.study", *asked, *TRAINED, *EVALUATED, threads=threads)


def cpu_seconds(
    variant: Callable[[list[str], str], None], ratios: list[str], threads: str
) -> float:
    """The CPU seconds of all its processes, in a folder that is empty before."""
    Path(variant.__name__).mkdir()
    os.chdir(variant.__name__)
    before = os.times()
    variant(ratios, threads)
    after = os.times()
    os.chdir("..")
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system


def main() -> None:
    options = {"jobs": "8", "threads": "1"}
    options |= dict(argument.split("=", 1) for argument in sys.argv[1:])
    ratios = [str(ratio) for ratio in range(1, int(options["jobs"]))]
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)
        tiny = ModelConfig("tiny", architecture=storage.read_yaml(TINY, dict)["architecture"])
        save_full(models.open_policy(tiny, Precision.fp32), Path("model"))
        alone, together = (
            cpu_seconds(variant, ratios, options["threads"]) for variant in (processes, study)
        )
        os.chdir(ROOT)
    table = Table(f"{options['jobs']} jobs", "CPU seconds", "time against the study")
    table.add_row("processes, one after the other", f"{alone:.1f}", f"{alone / together:.2f}")
    table.add_row("a study", f"{together:.1f}", "1.00")
    Console(width=100).print(table)
    print(f"ratio sweep, a study: time of processes: {alone / together:.3f}")


if __name__ == "__main__":
    main()
