"""Kills at random moments: the same command again ends as if nothing had happened."""

import functools
import os
import shutil
import signal
import time
from pathlib import Path
from random import Random

import commands
from commands import Ended
from damage import READERS

SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
TIMED = (".cost.json", ".lock")  # what tells seconds, or nothing


def _kill(rng: Random, number: signal.Signals, longest: float, child: int) -> None:
    time.sleep(0.05 + rng.random() * longest)
    os.kill(child, number)
    if number != signal.SIGKILL and rng.random() < 0.3:  # someone is impatient
        time.sleep(rng.random() * 0.05)
        os.kill(child, number)


def _kept(run: Path) -> dict[str, bytes]:
    return {k: v for k, v in commands.contents(run).items() if not k.endswith(TIMED)}


def case(rng: Random, place: Path, base: Path) -> tuple[str, Ended, list[tuple[str, str]]]:
    """A training or an evaluation, killed one to three times and then left alone."""
    name = rng.choice(["train", "train", "eval anew"])
    arguments = READERS[name].arguments
    if name != "train":
        shutil.copytree(base / "run", place / "run")
    whole = base / ("run" if name == "train" else "after/once/eval anew/run")
    faults, told = [], []
    for _ in range(rng.choice([1, 1, 2, 3])):
        number = rng.choice(SIGNALS)
        longest = 3.0 if name == "train" else 1.0
        ended = commands.run(
            arguments, place, interfere=functools.partial(_kill, rng, number, longest)
        )
        told.append(f"{number.name} -> {ended.code}")
        if ended.code not in (0, -number):
            faults += ended.faults()
        if ended.code not in (0, -number, 128 + number):
            faults.append(
                ("silent", f"{name}, {number.name}: exit {ended.code}: {ended.err[-200:]}")
            )
    ended = commands.run(arguments, place)
    faults += ended.faults()
    if ended.code != 0:
        faults.append(("silent", f"{name} does not go on: {ended.err[-300:]}"))
    else:
        got, expected = _kept(place / "run"), _kept(whole)
        if name == "train":
            expected = {k: v for k, v in expected.items() if not k.startswith("eval/")}
        if changed := sorted(k for k in expected if got.get(k) != expected[k]):
            faults.append(("silent", f"{name}: other bytes than the whole run: {changed[:4]}"))
        if left := sorted(got.keys() - expected.keys()):
            faults.append(("files left", f"{name}: {left[:4]}"))
    return f"{commands.spell(arguments)} ({', '.join(told)})", ended, faults
