"""What is kept and watched while a stage trains.

`stages` has the local log, snapshots, cost and progress; `watching` the curves of the paper's
quantities.
"""

from dcr.tracking.stages import (
    Holding,
    Progress,
    RunLogger,
    Snapshots,
    StepClock,
    quiet,
    snapshot_steps,
)
from dcr.tracking.watching import Watch, Watched, watched, watched_steps

__all__ = [
    "Holding",
    "Progress",
    "RunLogger",
    "Snapshots",
    "StepClock",
    "Watch",
    "Watched",
    "quiet",
    "snapshot_steps",
    "watched",
    "watched_steps",
]
