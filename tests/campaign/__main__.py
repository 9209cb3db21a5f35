"""A hostile campaign: whatever a command is given, it works, or refuses in one line and leaves
nothing behind.

    python tests/campaign [--seed 0] [--cases 100] [section ...]

Hypothesis draws the cases of each section: lists of overrides, damaged files, bad data files,
kills, links and devices, run folders that attack, and secrets. Of a case that fails it looks for
the smallest, tells its command, and tries it first the next time. The exit code is 0 only if no
command ended in a traceback, a crash or a hang, gave wrong results in silence, left files behind,
told a secret or ran an attacker's code.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import commands
import damage
import hostile
import kills
import overrides
import rows
from commands import Ended
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

Case = Callable[[Random, Path, Path], tuple[str, Ended, list[tuple[str, str]]]]
SECTIONS: dict[str, Case] = {
    "overrides": overrides.case,
    "damage": damage.case,
    "rows": rows.case,
    "kills": kills.case,
    "links": hostile.link_case,
    "attackers": hostile.attacker_case,
    "secrets": hostile.secret_case,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python tests/campaign", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("sections", nargs="*", metavar="section", choices=[[], *SECTIONS])
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other cases")
    parser.add_argument("--cases", type=int, default=100, help="of each section")
    options = parser.parse_args()
    names = options.sections or [*SECTIONS]
    commands.preload()
    with tempfile.TemporaryDirectory(prefix="dcr-campaign-") as folder:
        work = Path(folder)
        damage.prepare(work / "base")
        if {"damage", "kills"} & {*names}:
            damage.foresee(work / "base")
        children = []
        for number in range(2):  # processes
            children.append(os.fork())
            if not children[-1]:
                bad = 1
                try:
                    bad = sum(not carried_out(name, options, work) for name in names[number::2])
                finally:
                    os._exit(bad)
        return int(sum(os.waitpid(child, 0)[1] for child in children) > 0)


def carried_out(name: str, options: argparse.Namespace, work: Path) -> bool:
    """Run the cases of one section and say how they ended; whether none failed."""
    began, ends = time.monotonic(), {0: 0, 2: 0}

    @seed(options.seed)
    @settings(max_examples=options.cases, deadline=None, suppress_health_check=list(HealthCheck))  # pyright: ignore[reportArgumentType]
    @given(st.randoms())
    def case(rng: Random) -> None:
        with tempfile.TemporaryDirectory(dir=work) as folder:
            place = Path(folder) / "deep" / "er"  # so that .. stays inside
            place.mkdir(parents=True)
            command, ended, faults = SECTIONS[name](rng, place, work / "base")
            faults = [*faults, *commands.leaks(place, ended)]
        ends[ended.code] = ends.get(ended.code, 0) + 1
        assert not faults, f"{faults}\n  {command[:600]}"

    told = "no fault"
    try:
        case()
    except Exception as failed:
        told = f"{type(failed).__name__}: {failed}"
    codes = ", ".join(f"{count} x exit {code}" for code, count in ends.items())
    print(f"{name}: {codes}; {time.monotonic() - began:.0f} s; {told}", flush=True)
    return told == "no fault"


if __name__ == "__main__":
    sys.exit(main())
