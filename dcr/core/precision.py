"""The precision that `auto` settles to, by the types that the device multiplies natively.

    device                                   stage one   SFT, evaluation
    CUDA, compute capability 8.0 or more     mixed       bf16              as the paper
    CPU with AVX-512-bf16, AMX or ARM bf16   mixed       bf16
    any other: older CUDA, CPU, Apple's GPU  fp32        fp32

bf16 that a CPU emulates is many times slower than fp32. fp16 with a gradient scaler would save no
memory on an older GPU, since weights and optimiser states stay in fp32.
"""

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from dcr.core.config import Precision, Stage, TrainConfig, stages_of

log = logging.getLogger(__name__)

NATIVE = {"contrastive": Precision.mixed, "sft": Precision.bf16, "evaluation": Precision.bf16}
# Units by their flags, as torch spells them.
UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX-512-bf16", "bf16": "ARM bf16"}
# Parts of names of oneDNN's instruction sets that have bf16, or are no limit.
UNLIMITED = ("BF16", "FP16", "AMX", "AVX10", "DEFAULT", "ALL")


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


def kind_of(accelerator: str = "auto") -> str:
    """cpu, cuda or mps, as Lightning takes `trainer.accelerator`."""
    if accelerator != "auto":
        return "cuda" if accelerator == "gpu" else accelerator
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


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


def cpu_unit() -> str | None:
    """The unit that multiplies bf16 in this CPU; None without one, or if oneDNN may not use it.

    `torch.ops.mkldnn._is_mkldnn_bf16_supported` is also true if AVX-512 only emulates it.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "ALL"
    if not any(part in limit.upper() for part in UNLIMITED):
        return None
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


# --- what a command computes with ---


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
    told = "; ".join(f"{_listed(part)} ({why})" for why, part in reasons.items())
    used = {use: each for use, each in found.items() if use not in unused}
    emulated = {use: each for use, each in used.items() if here.emulates(each)}
    slow = None
    if emulated:
        slow = (
            f"precision: {_listed(emulated)} is emulated and slow here ({here.why}); "
            "precision=fp32 is faster, with results of its own"
        )
    return Settled(found, told, slow)


def _listed(precisions: Mapping[str, Precision]) -> str:
    if len(set(precisions.values())) == 1:
        return next(iter(precisions.values())).value
    return ", ".join(f"{use} {each.value}" for use, each in precisions.items())


def of_training(
    settings: TrainConfig, recorded: Mapping[str, Precision] | None = None
) -> tuple[TrainConfig, Settled]:
    """The settings with the precision of `auto` for each stage and for the run's evaluations."""
    dcr, sft = settings.dcr, settings.sft
    stages = {"contrastive": dcr.precision, "sft": sft.precision}
    trained = {  # the readout in what SFT was
        "contrastive" if stage is Stage.contrastive else "sft" for stage in stages_of(settings)
    }
    found = settled(stages, settings.trainer.accelerator, recorded, unused=stages.keys() - trained)
    first, second = found.precisions["contrastive"], found.precisions["sft"]
    top = evaluated_in(second) if settings.precision is Precision.auto else settings.precision
    made = replace(
        settings,
        precision=top,
        dcr=replace(dcr, precision=first),
        sft=replace(sft, precision=second),
    )
    return made, found


def evaluated_in(precision: Precision) -> Precision:
    """The precision that evaluates a model trained in this one; `mixed` has weights in fp32."""
    return Precision.bf16 if precision is Precision.bf16 else Precision.fp32
