"""Damaged files: every file of a run folder, broken in every way, then read by every command."""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import commands
import yaml
from commands import Ended
from overrides import SCORED, SMALL

TRAINED = (*SMALL, "tracking.snapshots=2", "tracking.quantities=[refusal_probability]", "run=run")
SLOW = ("sft.epochs=10", "trainer.checkpoint_every_n_steps=1")  # so that a signal finds it midway
TASKS = "tasks=[over_refusal,safety,refusal_probability]"


@dataclass(frozen=True)
class Reader:
    """A command that reads a run folder, and where it leaves what must not change."""

    arguments: tuple[str, ...]
    results: tuple[str, ...]
    half: bool = False  # whether the run it reads was stopped in stage two


READERS = {
    "eval": Reader(("eval.py", "run=run", *SCORED, TASKS), ("run/eval/",)),
    "eval anew": Reader(("eval.py", "run=run", *SCORED, "gen.max_new_tokens=5"), ("run/eval/",)),
    "export": Reader(("dcr.export", "run=run", "out=exported", "precision=fp32"), ("exported/",)),
    "report": Reader(
        (
            "dcr.report",
            *["run", "--claims", "--table", "table1", "--figure", "1b", "out=shown/x.html"],
        ),
        ("shown/",),
    ),
    "chat": Reader(("dcr.chat", "run=run"), ()),
    "train": Reader(("train.py", *TRAINED), ("run/contrastive/", "run/sft/")),
    "resume": Reader(
        ("train.py", *TRAINED, *SLOW), ("run/contrastive/", "run/sft/", "run/metrics.csv"), True
    ),
}


def prepare(base: Path) -> None:
    """A finished run, and one that was stopped midway. AssertionError where a command fails."""
    making = base / "making"
    making.mkdir(parents=True)
    for arguments in (READERS["train"].arguments, READERS["eval"].arguments):
        _good(arguments, making)
    (making / "run").rename(base / "run")
    resume = READERS["resume"].arguments
    stopped = commands.run(resume, making, interfere=lambda child: _stop_in_sft(making, child))
    assert stopped.code == 128 + 15, stopped
    (making / "run").rename(base / "half")


def foresee(base: Path) -> None:
    """Records what each reader makes of the undamaged runs.

    Raises AssertionError when the good commands themselves fail, or differ from one time to the
    next: nothing could then be told from the rest.
    """
    for name, reader in READERS.items():
        for again in ("once", "twice"):
            place = base / "after" / again / name
            place.mkdir(parents=True)
            shutil.copytree(base / ("half" if reader.half else "run"), place / "run")
            _good(reader.arguments, place)
        one, other = (_results(base / "after" / n / name, reader) for n in ("once", "twice"))
        assert one == other, f"{name}: {[key for key in one if one[key] != other.get(key)]}"


def _good(arguments: Sequence[str], place: Path) -> None:
    ended = commands.run(arguments, place)
    assert ended.code == 0, f"{commands.spell(arguments)}: {ended.said}"


def _stop_in_sft(place: Path, child: int) -> None:
    import signal
    import time

    for _ in range(10_000):
        if list((place / "run/checkpoints/sft").glob("step-*5.ckpt")):
            break
        time.sleep(0.003)
    os.kill(child, signal.SIGTERM)


def _results(place: Path, reader: Reader) -> dict[str, bytes]:
    return {
        name: held
        for name, held in commands.contents(place).items()
        if name.startswith(reader.results)
    }


# --- what is done to a file: each takes its path and may leave anything there ---


def _flip(file: Path, rng: Random) -> None:
    """One bit: anywhere in weights, and in text the one that makes it no text."""
    held = bytearray(file.read_bytes())
    if held:
        binary = file.suffix in (".safetensors", ".ckpt")
        held[rng.randrange(len(held))] ^= 1 << (rng.randrange(8) if binary else 7)
    file.write_bytes(held)


def _appended(file: Path, rng: Random) -> None:
    with file.open("ab") as out:
        out.write(rng.choice([b"x", b"\0\0", b"{", b'\n{"a": 1}\n', b"\xff\n", b"," * 50 + b"\n"]))


Damage = tuple[str, Callable[[Path, Random], object]]  # what it is called, and what it does
WRONG: tuple[Any, ...] = (
    *(None, [], {}, "text", -1, 10**400, True, float("nan"), float("inf"), "../x"),
)
BYTES: tuple[Damage, ...] = (
    ("half", lambda file, rng: os.truncate(file, rng.randrange(1, max(2, file.stat().st_size)))),
    ("last byte", lambda file, _: os.truncate(file, max(0, file.stat().st_size - 1))),
    ("empty", lambda file, _: os.truncate(file, 0)),
    ("garbage", lambda file, rng: file.write_bytes(rng.randbytes(rng.choice([1, 40, 4000])))),
    ("flip", _flip),
    ("folder", lambda file, _: (file.unlink(), file.mkdir())),
    ("gone", lambda file, _: file.unlink()),
    ("loop", lambda file, _: (file.unlink(), file.symlink_to(file.name))),
    ("fifo", lambda file, _: (file.unlink(), os.mkfifo(file))),
    ("appended", _appended),
)


def _nodes(tree: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a parsed document."""
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = []
    for key, held in list(pairs):
        found.append((tree, key))
        if isinstance(held, (dict, list)):
            found += _nodes(held)
    return found


def _retyped(tree: Any, rng: Random) -> Any:
    """A value replaced by one of another kind, or the whole document."""
    nodes = _nodes(tree) if isinstance(tree, (dict, list)) else []
    if not nodes or rng.random() < 0.2:
        return rng.choice(WRONG[:5])
    container, key = rng.choice(nodes)
    container[key] = rng.choice([w for w in WRONG if type(w) is not type(container[key])])
    return tree


def _keyless(tree: Any, rng: Random) -> Any:
    keyed = [
        (held, key)
        for held, key in (_nodes(tree) if isinstance(tree, (dict, list)) else [])
        if isinstance(held, dict)
    ]
    if keyed:
        container, key = rng.choice(keyed)
        del container[key]
    return tree


def _edited(change: Callable[[Any, Random], Any]) -> Callable[[Path, Random], None]:
    """The damage that parses a file, changes what it says, and writes it in the same format."""

    def damage(file: Path, rng: Random) -> None:
        text = file.read_text()
        if file.suffix == ".json":
            file.write_text(json.dumps(change(json.loads(text), rng), indent=1))
        elif file.suffix in (".yaml", ".yml"):
            file.write_text(yaml.safe_dump(change(yaml.safe_load(text), rng), sort_keys=False))
        elif lines := text.splitlines():  # JSON lines, or CSV
            at = rng.randrange(len(lines))
            if file.suffix == ".jsonl":
                lines[at] = json.dumps(change(json.loads(lines[at]), rng))
            else:
                cells = lines[at].split(",")
                cells[rng.randrange(len(cells))] = rng.choice(
                    ["", "nan", "inf", "x" * 200_000, '"']
                )
                lines[at] = ",".join(cells)
            file.write_text("\n".join(lines) + "\n")

    return damage


PARSED: tuple[Damage, ...] = (("retyped", _edited(_retyped)), ("keyless", _edited(_keyless)))


def broken(files: Sequence[Path], rng: Random) -> tuple[Path, str]:
    """Damage one of these files in one way: which file, and how."""
    kind = rng.choice(sorted({p.name for p in files}))  # ten snapshots are one kind of file
    file = rng.choice([p for p in files if p.name == kind])
    parsed = file.suffix in (".json", ".jsonl", ".yaml", ".csv")
    how, damage = rng.choice(PARSED * 3 + BYTES if parsed else BYTES)
    damage(file, rng)
    return file, how


def held(file: Path) -> bytes | None:
    """The bytes of a plain file; None for anything else."""
    return file.read_bytes() if file.is_file() and not file.is_symlink() else None


def case(rng: Random, place: Path, base: Path) -> tuple[str, Ended, list[tuple[str, str]]]:
    """One file damaged in one way and read by one command."""
    name = rng.choice(list(READERS))
    reader = READERS[name]
    shutil.copytree(base / ("half" if reader.half else "run"), place / "run")
    files = [p for p in sorted((place / "run").rglob("*")) if p.is_file() and p.name != ".lock"]
    before = {file: held(file) for file in files}
    file, how = broken(files, rng)
    done = f"{how} {file.relative_to(place)}; {commands.spell(reader.arguments)}"
    same = held(file) == before[file]
    ended = commands.run(reader.arguments, place)
    faults = ended.faults()
    if ended.code == 0:
        expected, got = _results(base / "after/once" / name, reader), _results(place, reader)
        hurt = str(file.relative_to(place))
        changed = [key for key in expected if key != hurt and got.get(key) != expected[key]]
        told = file.name in ended.said or file.parent.name in ended.said.replace(str(place), "")
        if changed and not told and not same:
            faults.append(("silent", f"{name} with {hurt}, {how}: {changed[:3]} differ"))
        if name == "chat" and "/sft/" in hurt and hurt.endswith(".safetensors") and not same:
            faults.append(("silent", f"{name} took {hurt} after {how}"))
    elif name in ("export", "report") and (left := _results(place, reader)):
        faults.append(("files left", f"{name}: {sorted(left)[:3]} after {ended.err.strip()[:160]}"))
    return done, ended, faults
