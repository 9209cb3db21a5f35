"""Estimated peak memory and time of a stage.

Memory, in bytes, is the sum of
    weights      parameters × bytes of their type, LoRA in fp32; under autocast of fp32 weights
                 two bytes more for each that a gradient passes, since the backward pass keeps the
                 bf16 copies
    gradients    trained parameters, in their own type
    Adam states  twice as much
    activations  padded tokens of the largest pass × what the blocks keep for a token, which is
                 shape.SAVED × the sum of (rows + columns) over their matrices; with gradient
                 checkpointing one block's, and a hidden state for every block
    logits       one chunk of losses.token_nll, fp32 values and as many gradients
    process      0.5 GB of libraries, on a CPU
Time is FLOPs over throughput: for every padded token 2 · parameters of the blocks it runs through
going forward, as much again for the gradient of activations, and 2 · trained parameters of the
blocks for theirs; for every labelled token 4 · parameters of the head; and one forward pass an
epoch over held-out rows. The attention product itself is left out: it is small at these lengths.
Throughput is a share of the GPU's published dense rate (40%) or, for any other device, of a matrix
product timed on the spot (50%).
"""

import time
from dataclasses import dataclass

import torch

from dcr.config import Precision, Stage, TrainConfig
from dcr.plan.rows import Load
from dcr.plan.shape import Shape

LOGIT_ROWS = 256  # the chunk of losses.token_nll
PROCESS_BYTES = 0.5e9
GPU_SHARE, MEASURED_SHARE = 0.4, 0.5  # of the peak rate that training reaches
GPUS = {  # published dense FLOP/s in bf16 and in fp32
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
}
ASSUMED_GPU = "H100"
TRIAL_SECONDS = 0.2


@dataclass(frozen=True)
class Throughput:
    device: str
    flops: float  # a second, as training reaches them
    basis: str


def memory(settings: TrainConfig, stage: Stage, shape: Shape, load: Load) -> dict[str, float]:
    """Bytes on one device at the peak, by what holds them."""
    node = settings.dcr if stage is Stage.contrastive else settings.sft
    each = 2 if node.precision is Precision.bf16 else 4
    lora = shape.parts.get("LoRA", 0)
    trained = sum(shape.trained.values()) - lora
    weights = each * (shape.total - lora) + 4 * lora
    if node.precision is Precision.mixed:
        weights += 2 * (shape.blocks + shape.head if load.full else shape.trunk)
    chunk = min(LOGIT_ROWS, load.labelled) * shape.vocabulary
    found = {
        "weights": weights,
        "gradients": each * trained + 4 * lora,
        "Adam states": 2 * (each * trained + 4 * lora),
        "activations": _activations(settings, stage, shape, load),
        "logits": 2 * 4 * chunk,
    }
    return found if device_type(settings) == "cuda" else {**found, "process": PROCESS_BYTES}


def _activations(settings: TrainConfig, stage: Stage, shape: Shape, load: Load) -> float:
    kept = load.largest_trunk * shape.trunk_saved + load.largest_full * shape.full_saved
    if stage is Stage.contrastive or not settings.sft.gradient_checkpointing:
        return kept
    each = 4 if settings.sft.precision is Precision.fp32 else 2
    return kept / shape.depth + load.largest_full * shape.depth * shape.width * each


def epoch_flops(settings: TrainConfig, stage: Stage, shape: Shape, load: Load) -> float:
    """Floating-point operations of one rank in one epoch."""
    in_blocks = [n for name, n in shape.trained.items() if name.startswith(("blocks", "LoRA"))]
    passes = 3 if stage is Stage.sft and settings.sft.gradient_checkpointing else 2
    heldout = shape.trunk if stage is Stage.contrastive else shape.blocks
    return (
        2 * passes * (load.trunk * shape.trunk + load.full * shape.blocks)
        + 2 * (load.trunk + load.full) * sum(in_blocks)
        + 4 * load.labelled * shape.head
        + 2 * load.heldout * heldout
    )


def device_type(settings: TrainConfig) -> str:
    """`cuda`, or `cpu` for everything else that the trainer may be told."""
    if settings.trainer.accelerator in ("gpu", "cuda"):
        return "cuda"
    return "cuda" if settings.trainer.accelerator == "auto" and torch.cuda.is_available() else "cpu"


def throughput(settings: TrainConfig, precision: Precision, width: int) -> Throughput:
    """Of one device that the command would run on."""
    if device_type(settings) == "cpu":
        threads = settings.trainer.threads or torch.get_num_threads()
        rate = _timed_product("cpu", precision, width, threads)
        return Throughput(f"this CPU, {threads} threads", MEASURED_SHARE * rate, _measured(rate))
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ASSUMED_GPU
    if any(known in name for known in GPUS):
        return published(name, precision)
    rate = _timed_product("cuda", precision, width, torch.get_num_threads())
    return Throughput(name, MEASURED_SHARE * rate, _measured(rate))


def _measured(rate: float) -> str:
    return f"{MEASURED_SHARE:.0%} of {rate / 1e12:.3g} TFLOP/s measured"


def published(name: str, precision: Precision) -> Throughput:
    """What a GPU of that name is assumed to reach."""
    rates = next(rates for known, rates in GPUS.items() if known in name)
    rate = rates[precision is Precision.fp32]
    basis = f"{GPU_SHARE:.0%} of {rate / 1e12:.0f} TFLOP/s"
    return Throughput(name, GPU_SHARE * rate, basis)


def _timed_product(device: str, precision: Precision, width: int, threads: int) -> float:
    """FLOP/s of a product in the stage's type, the best of several rounds."""
    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    left = torch.ones(512, width, dtype=dtype, device=device)
    right = torch.ones(width, width, dtype=dtype, device=device)
    best, end = 0.0, time.perf_counter() + TRIAL_SECONDS
    while not best or time.perf_counter() < end:
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # waits for the device
        best = max(best, 2 * left.numel() * width / (time.perf_counter() - start))
    torch.set_num_threads(before)
    return best
