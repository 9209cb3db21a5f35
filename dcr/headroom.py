"""The room that other processes and control groups leave: threads, and prompts at once.

Torch gets as many threads as cores that the process may use and others leave free: a step of two
threads where another process holds one of two cores takes many times that of one thread, since
every product waits for the slower half. A batch gets as many prompts as the free memory holds.
"""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from typing_extensions import TypedDict

from dcr.core import storage
from dcr.core.models.structure import unwrapped

if TYPE_CHECKING:
    from dcr.core.evaluation.protocols import Ask
    from dcr.core.evaluation.subjects import Local
    from dcr.core.generation import Completion

LOOK = 0.2  # seconds over which cores that others hold are counted
CGROUPS = Path("/sys/fs/cgroup")
SHARE = 0.8  # of the free memory; fragments and uncounted tensors take the rest
MOST = {"cuda": 512, "cpu": 64}  # more prompts at once take longer and decode no faster
ANY_NUMBER = "trainer.threads=<n> for another number"
DECODING = "decoding.json"  # beside the answers


def control_groups(root: Path = CGROUPS, own: Path = Path("/proc/self/cgroup")) -> list[Path]:
    """This process's control groups (version 2), the innermost first, as in a container or a job.

    The limits of each one hold. The list is empty without control groups.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    group = root / path.strip("/")
    return [each for each in (group, *group.parents) if each.is_relative_to(root)]


# --- threads --------------------------------------------------------------------------------------


def free_threads(most: int, before: int | None) -> tuple[int, str]:
    """The number of threads, at most so many, for which the cores have room, and its reason.

    A run that goes on has as many as `before`.
    """
    mine = cores()
    if before:
        return min(before, len(mine)), f"as this run began; {ANY_NUMBER}"
    held, granted = held_by_others(mine), quota(control_groups())
    why = f"of {len(mine)} cores, {held:.1f} held by others"
    if granted < len(mine):
        why += f", {granted:g} granted by the cgroup"
    number = max(1, int(min(most, granted, round(len(mine) - held))))
    return number, f"{why}; {ANY_NUMBER}"


def cores() -> list[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def held_by_others(mine: list[int]) -> float:
    """The number of these cores that other processes have held for a minute and still hold.

    A process that has ended, such as the command before this one, holds none.
    """
    now = psutil.cpu_percent(interval=LOOK, percpu=True)
    return min(sum(now[core] for core in mine if core < len(now)) / 100, os.getloadavg()[0])


def quota(groups: Sequence[Path]) -> float:
    """The cores' worth of time that control groups grant; infinite if none sets a limit."""
    least = math.inf
    for file in (group / "cpu.max" for group in groups):
        most, period = file.read_text().split() if file.is_file() else ("max", "")
        least = least if most == "max" else min(least, int(most) / int(period))
    return least


# --- the size of a batch --------------------------------------------------------------------------


def batch_size(model: Any, prompt_tokens: int, new_tokens: int) -> int:
    """The number of prompts of at most `prompt_tokens` to decode at once on the model's device."""
    owner = unwrapped(model)
    each = prompt_bytes(owner.config, owner.dtype.itemsize, prompt_tokens, new_tokens)
    fitting = int(SHARE * free_bytes(owner.device)) // each
    return max(1, min(MOST.get(owner.device.type, MOST["cpu"]), fitting))


def prompt_bytes(config: Any, itemsize: int, prompt_tokens: int, new_tokens: int) -> int:
    """The bytes of one prompt: its keys and values, its logits, and its widest block's input.

    Keys and values of every block stay for all of its tokens. Logits count three times: in the
    head's type, in fp32, and as probabilities. While the prompt is read, a block holds its residual
    stream twice, its projections, and three times its inner width.
    """
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None) or 1  # some models keep a state, no keys
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    cache = 2 * text.num_hidden_layers * key_heads * head_width * (prompt_tokens + new_tokens)
    block = prompt_tokens * (2 * text.hidden_size + 3 * heads * head_width + 3 * inner)
    return itemsize * (cache + block) + 3 * 4 * text.vocab_size


def free_bytes(device: torch.device) -> int:
    """The memory that this process may still take; on a GPU it includes torch's own reserve."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, bytes_left(control_groups()))


def bytes_left(groups: Sequence[Path]) -> int:
    """The bytes that the limits of control groups leave, as in a container or a Slurm job.

    Beyond such a limit the kernel kills the process, which can catch no error. The machine's free
    memory does not show the limit.
    """
    least = 2**62
    for group in groups:
        try:
            limit = (group / "memory.max").read_text().strip()
            used = int((group / "memory.current").read_text())
            stat = (group / "memory.stat").read_text().splitlines()
        except OSError:  # the root has no limit, and other systems have no such files
            continue
        if limit != "max":
            # file pages not in use are given back before anything is killed
            reclaimed = int(dict(line.split() for line in stat).get("inactive_file", 0))
            least = min(least, int(limit) - used + reclaimed)
    return least


# --- what answers were made with ------------------------------------------------------------------


class Made(TypedDict):
    """The threads and largest batches that the answers of one folder were made with.

    Neither is in the folder's name. Both change a near tie's last bits, and with them perhaps a
    text.
    """

    threads: list[int]
    batch_size: list[int]


def recorded(subject: "Local", folder: Path) -> "Ask":
    """The subject's answers to rows, while `folder` keeps what they are `Made` with."""

    def noting(batches: "Iterator[list[Completion]]") -> "Iterator[list[Completion]]":
        largest = 0
        for batch in batches:
            if len(batch) > largest:
                largest = len(batch)
                _record(folder, subject.settings.trainer.devices, largest)
            yield batch

    return lambda rows: noting(subject.answer(rows))


def _record(folder: Path, processes: int, largest: int) -> None:
    before = made_with(folder).get("decoding", Made(threads=[], batch_size=[]))
    threads = {*before["threads"], max(1, torch.get_num_threads() // processes)}
    sizes = {*before["batch_size"], largest}
    storage.write_json(folder / DECODING, Made(threads=sorted(threads), batch_size=sorted(sizes)))


def made_with(folder: Path) -> dict[str, Made]:
    """The block `decoding` of `metrics.json`; none where no answers stand."""
    file = folder / DECODING
    return {"decoding": storage.read_json(file, Made)} if file.is_file() else {}
