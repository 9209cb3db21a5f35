"""Every ratio in one table, against those recorded: fails where one falls below nine tenths.

    python benchmarks [--record] [script ...]

Runs each script (`training`, `generation`, …; all of them by default) with sizes that end within
a quarter of an hour on two cores, and reads its lines `ratio <what>: <value>`: CPU seconds of the
alternative over ours, both on one thread, so that another process on the machine changes little.
`sft` is among the default ones where TRL's environment is there; named, it makes that first.
`--record` writes the ratios and the machine to benchmarks/recorded.json instead of comparing.
"""

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import sft
from rich.console import Console
from rich.table import Table

FOLDER = Path(__file__).resolve().parent
RECORDED = FOLDER / "recorded.json"
LEAST = 0.9  # of a recorded ratio
RATIO = re.compile(r"^ratio (.+): ([\d.e+-]+)$", re.MULTILINE)
SIZES = {
    "startup": [],
    "sweep": ["jobs=8"],
    "training": ["steps=1"],
    "sft": ["steps=1", "micro=2,4"],
    "generation": ["prompts=16", "new=48,256", "precision=bf16"],
    "refusal": ["prompts=4"],
    "ntk": ["prompts=2", "full=2", "k=3"],
}


def measured(script: str) -> dict[str, float]:
    """The ratios that a script prints. SystemExit with its last lines where it fails."""
    command = [sys.executable, str(FOLDER / f"{script}.py"), *SIZES[script]]
    if script != "startup":
        command.append("threads=1")
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=one)
    found = {name: float(value) for name, value in RATIO.findall(ended.stdout)}
    if ended.returncode or not found:
        raise SystemExit(f"{script}: no ratio\n{ended.stdout[-1000:]}{ended.stderr[-2000:]}")
    return found


def machine() -> str:
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.is_file() else []
    named = next((line.split(":")[1].strip() for line in lines if "model name" in line), "")
    memory = psutil.virtual_memory().total / 2**30
    return f"{named or platform.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB"


def main() -> None:
    asked = [word for word in sys.argv[1:] if word != "--record"]
    asked = asked or [script for script in SIZES if script != "sft" or sft.is_installed()]
    kept = json.loads(RECORDED.read_text()) if RECORDED.is_file() else {"ratios": {}}
    table = Table("ratio, higher is better", "measured", "recorded", "least", "")
    ratios, fell, began = {}, [], time.perf_counter()
    for script in asked:
        ratios |= measured(script)
        print(f"{script}: {time.perf_counter() - began:.0f} s so far", file=sys.stderr)
    for name, value in ratios.items():
        before = kept["ratios"].get(name)
        least = None if before is None else LEAST * before
        low = least is not None and value < least
        fell += [name] if low else []
        cells = ["-" if number is None else f"{number:.2f}" for number in (value, before, least)]
        table.add_row(name, *cells, "below" if low else "")
    Console(width=110).print(table)
    print(f"{machine()}; recorded on {kept.get('machine', 'none')}")
    if "--record" in sys.argv:
        made = {"machine": machine(), "ratios": kept["ratios"] | ratios}
        RECORDED.write_text(json.dumps(made, indent=1) + "\n")
    elif fell:
        raise SystemExit(f"below nine tenths of the recorded ratio: {', '.join(fell)}")


if __name__ == "__main__":
    main()
