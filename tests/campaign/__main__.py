"""A hostile campaign: whatever a command is given, it works, or refuses in one line and leaves
nothing behind.

    python tests/campaign [--seed 0] [--cases N] [--jobs 2] [--only overrides/17] [--keep FOLDER]

600 lists of overrides, 150 damaged files, 130 bad data files, 40 kills, 60 damaged studies, 60
databases of a search, 60 links and devices, 60 run folders that attack, 40 secrets (`--cases 20`:
that many of each section). Counts go to the terminal; the exit code is 0 only if no command ended
in a traceback, a crash or a hang, gave wrong results in silence, left files behind, told a secret
or ran an attacker's code. Each failure is told with its command and the name under which `--only`
runs it again.
"""

import argparse
import collections
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import commands
import damage
import hostile
import kills
import overrides
import rows
import shared
from commands import Ended

Case = Callable[[Random, Path, Path], tuple[str, Ended, list[tuple[str, str]]]]
SECTIONS: dict[str, tuple[Case, int]] = {
    "overrides": (overrides.case, 600),
    "damage": (damage.case, 150),
    "rows": (rows.case, 130),
    "kills": (kills.case, 40),
    "studies": (shared.study_case, 60),
    "searches": (shared.search_case, 60),
    "links": (hostile.link_case, 60),
    "attackers": (hostile.attacker_case, 60),
    "secrets": (hostile.secret_case, 40),
}
KINDS = (
    *("traceback", "crash", "hang", "silent", "not one line", "files left", "good refused"),
    *("secret", "code run"),
)


@dataclass(frozen=True)
class Record:
    """What one case gave."""

    name: str
    command: str
    code: int
    seconds: float
    faults: list[tuple[str, str]]


def main(arguments: Sequence[str]) -> int:
    options = _options().parse_args(arguments)
    wanted = _wanted(options)
    work = Path(options.keep or tempfile.mkdtemp(prefix="dcr-campaign-")).absolute()
    work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    commands.preload()
    base = work / "base"
    sections = {name.partition("/")[0] for name in wanted}
    if not base.is_dir():
        damage.prepare(base)
    if sections & {"damage", "kills"} and not (base / "after").is_dir():
        damage.foresee(base)
    if sections & {"studies", "searches"} and not (base / "tiny").is_dir():
        shared.prepare(base)
    workers = []
    for number in range(min(options.jobs, len(wanted))):
        child = os.fork()
        if not child:
            _work(wanted[number :: options.jobs], options, work, base, number)
            os._exit(0)
        workers.append(child)
    broken = [status for child in workers if (status := os.waitpid(child, 0)[1])]
    records = [
        Record(**json.loads(line))
        for number in range(len(workers))
        for line in (work / f"records-{number}.jsonl").read_text().splitlines()
    ]
    faults = _tell(records, time.monotonic() - began)
    if not options.keep:
        shutil.rmtree(work)
    complete = len(records) == len(wanted) and not broken
    if not complete:
        print(f"only {len(records)} of {len(wanted)} cases ran")
    return int(bool(faults) or not complete)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python tests/campaign", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other cases")
    parser.add_argument("--cases", type=int, help="of each section, instead of all")
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side")
    parser.add_argument("--only", action="append", help="a section, or a case such as rows/12")
    parser.add_argument("--keep", help="a folder for what the cases leave; kept")
    return parser


def _wanted(options: argparse.Namespace) -> list[str]:
    names = [
        f"{section}/{number}"
        for section, (_, count) in SECTIONS.items()
        for number in range(min(count, options.cases or count))
    ]
    if not options.only:
        return names
    chosen = [name for name in options.only if "/" in name]
    whole = set(options.only)
    return chosen + [name for name in names if name.partition("/")[0] in whole]


def _work(
    names: Sequence[str], options: argparse.Namespace, work: Path, base: Path, number: int
) -> None:
    """Run cases one after the other and write down how each ended."""
    with (work / f"records-{number}.jsonl").open("w", buffering=1) as out:
        for done, name in enumerate(names):
            section = name.partition("/")[0]
            place = work / "cases" / name / "deep" / "er"  # so that .. stays inside
            shutil.rmtree(work / "cases" / name, ignore_errors=True)
            place.mkdir(parents=True)
            began = time.monotonic()
            rng = Random(f"{options.seed}/{name}")
            command, ended, faults = SECTIONS[section][0](rng, place, base)
            faults = [*faults, *commands.leaks(place, ended)]
            spent = time.monotonic() - began
            record = Record(name, command, ended.code, spent, faults)
            out.write(json.dumps(asdict(record)) + "\n")
            if not faults:
                shutil.rmtree(work / "cases" / name, ignore_errors=True)
            if sys.stderr.isatty():
                print(f"\r{done + 1}/{len(names)} {name}", end="\x1b[K", file=sys.stderr)


def _tell(records: Sequence[Record], seconds: float) -> int:
    """Print every failure by cause, then the counts; returns the number of failures."""
    causes: dict[tuple[str, str], list[tuple[Record, str]]] = collections.defaultdict(list)
    for record in records:
        for kind, detail in record.faults:
            causes[kind, detail.partition(" | alone")[0]].append((record, detail))
    for (kind, _), failed in sorted(
        causes.items(), key=lambda cause: (cause[0][0], -len(cause[1]))
    ):
        record, detail = min(failed, key=lambda one: len(one[0].command))
        print(f"\n{kind} ({len(failed)}): {detail}\n  {record.name}: {record.command[:600]}")
    print(f"\n{'':14}{'cases':>8}{'exit 0':>8}{'exit 2':>8}{'other':>8}", end="")
    print("".join(f"{kind:>13}" for kind in KINDS))
    sections = [*dict.fromkeys(record.name.partition("/")[0] for record in records)]
    for section in [*sections, "all"]:
        chosen = [r for r in records if section in ("all", r.name.partition("/")[0])]
        codes = collections.Counter(r.code if r.code in (0, 2) else 1 for r in chosen)
        kinds = collections.Counter(kind for r in chosen for kind in {k for k, _ in r.faults})
        print(f"{section:14}{len(chosen):8}{codes[0]:8}{codes[2]:8}{codes[1]:8}", end="")
        print("".join(f"{kinds[kind]:13}" for kind in KINDS))
    print(f"{seconds / 60:.1f} minutes")
    return sum(len(record.faults) for record in records)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
