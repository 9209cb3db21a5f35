"""CPU seconds that commands take before they compute anything, against `import torch` alone.

    python benchmarks/startup.py [rounds=5]

Each in a process of its own, the median of `rounds`, with warm file caches: help of a Hydra command
and of another, a misspelt setting, and a plan, which builds the model without storage.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
TRAIN = str(ROOT / "train.py")
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "--help": [TRAIN, "--help"],
    "report --help": ["-m", "dcr.report", "--help"],
    "a bad command": [TRAIN, "dcr.epoch=3"],
    "plan=true": [TRAIN, "plan=true"],
}


def cpu_seconds(words: list[str]) -> float:
    """User and system time of one process and its children."""
    before = os.times()
    subprocess.run([sys.executable, *words], capture_output=True, check=False)
    after = os.times()
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system


def main() -> None:
    options = {"rounds": "5"} | dict(argument.split("=", 1) for argument in sys.argv[1:])
    rounds = range(int(options["rounds"]))
    cpu_seconds(COMMANDS["plan=true"])
    found = {
        name: statistics.median(cpu_seconds(words) for _ in rounds)
        for name, words in COMMANDS.items()
    }
    table = Table("command", "CPU seconds", "import torch takes times as much")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds:.2f}", f"{found['import torch'] / seconds:.2f}")
    Console(width=100).print(table)
    for name, seconds in list(found.items())[1:]:
        print(f"ratio start-up, import torch / {name}: {found['import torch'] / seconds:.3f}")


if __name__ == "__main__":
    main()
