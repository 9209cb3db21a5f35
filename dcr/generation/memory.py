"""How many prompts the free memory holds at once."""

from pathlib import Path
from typing import Any

import psutil
import torch

from dcr.models import unwrapped

SHARE = 0.8  # of the free memory: the rest is for fragments and for what is not counted below
MOST = {"cuda": 512, "cpu": 64}  # more at once takes longer to answer and decodes no faster
CGROUPS = Path("/sys/fs/cgroup")


def batch_size(model: Any, prompt_tokens: int, new_tokens: int) -> int:
    """Prompts of at most `prompt_tokens` that can be decoded at once where the model lies."""
    owner = unwrapped(model)
    each = prompt_bytes(owner.config, owner.dtype.itemsize, prompt_tokens, new_tokens)
    fitting = int(SHARE * free_bytes(owner.device)) // each
    return max(1, min(MOST.get(owner.device.type, MOST["cpu"]), fitting))


def prompt_bytes(config: Any, itemsize: int, prompt_tokens: int, new_tokens: int) -> int:
    """What one prompt occupies: its keys and values, its logits, and its widest block's input.

    Keys and values of every block stay for all of its tokens. Logits are counted three times: as
    the head gives them, in fp32, and as the probabilities read off them. While the prompt is read,
    a block holds its residual stream twice, its projections, and three times its inner width.
    """
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    cache = 2 * text.num_hidden_layers * kept * head_width * (prompt_tokens + new_tokens)
    block = prompt_tokens * (2 * text.hidden_size + 3 * heads * head_width + 3 * inner)
    return itemsize * (cache + block) + 3 * 4 * text.vocab_size


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken: on a GPU, what torch itself holds in reserve included."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return min(psutil.virtual_memory().available, _cgroup_bytes(CGROUPS))


def _cgroup_bytes(root: Path, own: Path = Path("/proc/self/cgroup")) -> int:
    """What the limits of this process's control groups leave, as in a container or a Slurm job.

    Beyond such a limit the kernel kills, and no error can be caught. The machine's free memory
    says nothing of it. Unlimited where there are no control groups (version 2).
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    path = next((line.removeprefix("0::") for line in lines if line.startswith("0::")), "/")
    group = root / path.strip("/")
    left = [_left_in(g) for g in (group, *group.parents) if g.is_relative_to(root)]
    return min(left, default=2**62)


def _left_in(group: Path) -> int:
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        counted = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except OSError:  # the root has no limit, and other systems have no such files
        return 2**62
    # file pages not in use are given back before anything is killed
    return 2**62 if limit == "max" else int(limit) - used + int(counted.get("inactive_file", 0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch might do: torch has no error type of its own for the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
