"""The number of threads for torch: the cores that a process may use and others leave free.

Free memory is counted in the same way.

A step of two threads where another process holds one of two cores takes many times that of one
thread, since every product waits for the slower half.
"""

import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path

import psutil

log = logging.getLogger(__name__)

LOOK = 0.2  # seconds over which cores that others hold are counted
CGROUPS = Path("/sys/fs/cgroup")


def cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def control_groups(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """This process's control groups (version 2), the innermost first, as in a container or a job.

    The limits of each one hold. The list is empty without control groups.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    group = root / path.strip("/")
    return [each for each in (group, *group.parents) if each.is_relative_to(root)]


def quota(groups: Sequence[Path]) -> float:
    """The cores' worth of time that control groups grant; infinite if none sets a limit."""
    least = math.inf
    for file in (group / "cpu.max" for group in groups):
        most, period = file.read_text().split() if file.is_file() else ("max", "")
        least = least if most == "max" else min(least, int(most) / int(period))
    return least


def taken(mine: list[int]) -> float:
    """The number of these cores that other processes have held for a minute and still hold.

    A process that has ended, such as the command before this one, holds none.
    """
    now = psutil.cpu_percent(interval=LOOK, percpu=True)
    return min(sum(now[core] for core in mine if core < len(now)) / 100, os.getloadavg()[0])


def free_bytes() -> int:
    """The bytes of the machine's memory that this process may still take."""
    return min(psutil.virtual_memory().available, bytes_left(control_groups()))


def bytes_left(groups: Sequence[Path]) -> int:
    """The bytes that the limits of control groups leave, as in a container or a Slurm job.

    Beyond such a limit the kernel kills the process, which can catch no error. The machine's free
    memory does not show the limit.
    """
    return min(map(_left_in, groups), default=2**62)


def _left_in(group: Path) -> int:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # the root has no limit, and other systems have no such files
        return 2**62
    # file pages not in use are given back before anything is killed
    return 2**62 if limit == "max" else int(limit) - used + int(counted.get("inactive_file", 0))


def own() -> int:
    """The number of threads that torch takes by itself."""
    import torch

    return torch.get_num_threads()


def chosen(asked: int | None, before: int | None = None) -> tuple[int, str]:
    """The number of threads, and its reason.

    `asked`, which is `trainer.threads`, comes first, then OMP_NUM_THREADS, then the number of a run
    `before` it was stopped, on which its results depend to the last bit, then the free cores.
    """
    if asked:
        return asked, "trainer.threads"
    most = own()
    if os.environ.get("OMP_NUM_THREADS"):
        return most, "OMP_NUM_THREADS"
    mine = cores()
    if before:
        return min(before, len(mine)), "as this run began; trainer.threads=<n> for another number"
    held, granted = taken(mine), quota(control_groups())
    free = min(most, granted, round(len(mine) - held))
    why = f"of {len(mine)} cores, {held:.1f} held by others"
    if granted < len(mine):
        why += f", {granted:g} granted by the cgroup"
    return max(1, int(free)), f"{why}; trainer.threads=<n> for another number"


def use(asked: int | None = None, before: int | None = None) -> int:
    """Sets torch to the `chosen` number of threads, logs it in one line, and returns it."""
    import torch

    number, why = chosen(asked, before)
    # The same number too: a fork renews torch's pool at the first such call, and of the several
    # threads that load weights, which each make it, one would find none ("Invalid thread pool").
    torch.set_num_threads(number)
    log.info("threads: %d (%s)", number, why)
    return number
