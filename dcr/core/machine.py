"""The machine that a command computes on: devices, their precision, threads, memory and batches.

`precision=auto` settles to the types that the device multiplies natively:

    device                                   stage one   SFT, evaluation
    CUDA, compute capability 8.0 or more     mixed       bf16              as the paper
    CPU with AVX-512-bf16, AMX or ARM bf16   mixed       bf16
    any other: older CUDA, CPU, Apple's GPU  fp32        fp32

bf16 that a CPU emulates is many times slower than fp32. fp16 with a gradient scaler would save no
memory on an older GPU, since weights and optimiser states stay in fp32.

Rows are grouped by length, so that little is padded.
Torch is imported in functions: help, a plan and a user's error do not wait for it.
"""

import logging
import os
import resource
from collections.abc import Collection, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Int

from dcr.core import extending
from dcr.core.config import Precision

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor = Any

log = logging.getLogger(__name__)

NATIVE = {"contrastive": Precision.mixed, "sft": Precision.bf16, "evaluation": Precision.bf16}
# CPU units that multiply bf16, by their flags, as torch spells them.
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512-bf16", "bf16": "ARM bf16"}
OUT_OF_MEMORY = (
    *("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED"),
)


# --- devices ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """A device: cpu, cuda or mps, whether it multiplies bf16 natively, and the reason in words."""

    kind: str
    bf16: bool
    why: str

    def auto(self, use: str) -> Precision:
        """The precision of `auto` for `contrastive`, `sft` or `evaluation`."""
        return NATIVE[use] if self.bf16 else Precision.fp32

    def emulates(self, precision: Precision) -> bool:
        """Whether products in this precision are emulated and slow; unknown for Apple's GPU."""
        return precision is not Precision.fp32 and not self.bf16 and self.kind != "mps"


def device(accelerator: str = "auto") -> Device:
    """The device that a command computes on. A GPU that is planned for but absent has bf16."""
    kind = kind_of(accelerator)
    if kind == "mps":
        return Device(kind, False, "Apple's GPU")
    if kind == "cpu":
        unit = cpu_unit()
        return Device(kind, unit is not None, f"this CPU has {unit or 'no bf16 unit'}")
    import torch

    if not torch.cuda.is_available():
        return Device(kind, True, "a GPU that is not here")
    major, minor = torch.cuda.get_device_capability()
    native = major >= 8 or torch.version.hip is not None
    return Device(kind, native, f"{torch.cuda.get_device_name()}, capability {major}.{minor}")


def kind_of(accelerator: str = "auto") -> str:
    """cpu, cuda or mps, as Lightning takes `trainer.accelerator`."""
    if accelerator != "auto":
        return "cuda" if accelerator == "gpu" else accelerator
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def cpu_unit() -> str | None:
    """The unit that multiplies bf16 in this CPU; None without one.

    `torch.ops.mkldnn._is_mkldnn_bf16_supported` is also true if AVX-512 only emulates it.
    """
    flags = _flags()
    return next((name for flag, name in UNITS.items() if flag in flags), None)


def _flags() -> set[str]:
    """The processor's instruction sets, by torch."""
    import torch

    if not torch.backends.mkldnn.is_available():  # on a Mac's CPU nothing else multiplies bf16
        return set()
    if hasattr(torch.cpu, "get_capabilities"):
        return {name for name, there in torch.cpu.get_capabilities().items() if there is True}
    asked = {"avx512_bf16": "_is_avx512_bf16_supported", "amx_bf16": "_is_amx_tile_supported"}
    return {flag for flag, name in asked.items() if getattr(torch.cpu, name, bool)()}


def to_gpu(model: Any, accelerator: str = "auto") -> None:
    """Moves a model to a GPU, NVIDIA's or Apple's, if there is one and the accelerator lets it."""
    import torch

    kind = kind_of(accelerator)
    if kind == "mps" or (kind == "cuda" and torch.cuda.is_available()):
        model.to(kind)


# --- the precision that a command computes in -----------------------------------------------------


@dataclass(frozen=True)
class Settled:
    """The precision of each use, with a line for the user."""

    precisions: dict[str, Precision]
    told: str
    slow: str | None = None

    def say(self) -> None:
        log.info("precision: %s", self.told)
        if self.slow:
            log.warning(self.slow)


def settled(
    asked: Mapping[str, Precision],
    accelerator: str = "auto",
    recorded: Mapping[str, Precision] | None = None,
    unused: Collection[str] = (),
) -> Settled:
    """The precision of each use: as asked, else as `recorded` by its run, else the device's.

    Uses are `contrastive`, `sft` and `evaluation`; the line for the user leaves out those `unused`.
    """
    here, recorded = device(accelerator), recorded or {}
    reasons: dict[str, dict[str, Precision]] = {}
    found: dict[str, Precision] = {}
    for use, precision in asked.items():
        why = "as named"
        if precision is Precision.auto:
            why = "as the run was made" if use in recorded else here.why
            precision = recorded.get(use) or here.auto(use)
        found[use] = precision
        if use not in unused:
            reasons.setdefault(why, {})[use] = precision
    emulated = {
        use: each for use, each in found.items() if use not in unused and here.emulates(each)
    }
    slow = (
        f"precision: {_listed(emulated)} is emulated and slow here ({here.why}); "
        "precision=fp32 is faster, with results of its own"
    )
    told = "; ".join(f"{_listed(part)} ({why})" for why, part in reasons.items())
    return Settled(found, told, slow if emulated else None)


def _listed(precisions: Mapping[str, Precision]) -> str:
    if len(set(precisions.values())) == 1:
        return next(iter(precisions.values())).value
    return ", ".join(f"{use} {each.value}" for use, each in precisions.items())


def evaluated_in(precision: Precision) -> Precision:
    """The precision that evaluates a model trained in this one; `mixed` has weights in fp32."""
    return Precision.bf16 if precision is Precision.bf16 else Precision.fp32


# --- threads --------------------------------------------------------------------------------------


def use_threads(asked: int | None = None, before: int | None = None) -> int:
    """Sets torch to the `chosen_threads`, logs their number in one line, and returns it."""
    import torch

    number, why = chosen_threads(asked, before)
    # The same number too: a fork renews torch's pool at the first such call, and of the several
    # threads that load weights, which each make it, one would find none ("Invalid thread pool").
    torch.set_num_threads(number)
    log.info("threads: %d (%s)", number, why)
    return number


def chosen_threads(asked: int | None, before: int | None = None) -> tuple[int, str]:
    """The number of threads, and its reason.

    `asked`, which is `trainer.threads`, comes first, then OMP_NUM_THREADS, then the number of a run
    `before` it was stopped, on which its results depend to the last bit, then the free cores.
    """
    if asked:
        return asked, "trainer.threads"
    import torch

    most = torch.get_num_threads()
    if os.environ.get("OMP_NUM_THREADS"):
        return most, "OMP_NUM_THREADS"
    return extending.part("free_threads")(most, before)


# --- memory ---------------------------------------------------------------------------------------


def peak_memory_gib() -> float:
    """The most memory that this process has held, on the GPU if there is one, else in RAM."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error is a lack of memory, for which torch has no type of its own on a CPU."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)


# --- batches --------------------------------------------------------------------------------------


def by_length(sequences: Sequence[Sized], longest_first: bool = False) -> list[int]:
    """Places of sequences by length, so that little is padded; those of one length keep theirs.

    Longest first, running out of memory happens at once.
    """
    sign = -1 if longest_first else 1
    return sorted(range(len(sequences)), key=lambda place: sign * len(sequences[place]))


def by_tokens(sequences: Sequence[Sized], tokens: int, even: bool = False) -> list[list[int]]:
    """Groups of places of sequences, the longest first, of at most `tokens` padded tokens each.

    A sequence longer than that is alone in its group; with `even` a group is of one length.
    """
    groups: list[list[int]] = []
    for place in by_length(sequences, longest_first=True):
        longest = len(sequences[groups[-1][0]]) if groups else 0
        fits = groups and (len(groups[-1]) + 1) * longest <= tokens
        if fits and not (even and len(sequences[place]) < longest):
            groups[-1].append(place)
        else:
            groups.append([place])
    return groups


def padded(
    sequences: Sequence[Sequence[int]], value: int, left: bool = False
) -> Int[Tensor, "batch length"]:
    """Sequences as one tensor, filled up with `value` on the right (or left)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, True, value, padding_side="left" if left else "right")


def attention_mask(
    sequences: Sequence[Sequence[int]], left: bool = False
) -> Bool[Tensor, "batch length"]:
    """True for a token, False for padding; not derived from ids, as a pad id can be a token."""
    return padded([[1] * len(s) for s in sequences], 0, left).bool()
