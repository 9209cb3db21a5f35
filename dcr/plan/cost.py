"""The cost of a training stage: its parameters, and estimates of peak memory and time.

Parameters, trained and frozen, are those of the real architecture, built without storage on
torch's meta device.

Memory, in bytes, is the sum of
    weights      parameters × bytes of their type, LoRA in fp32. Autocast of fp32 weights adds two
                 bytes for each weight that a gradient passes, since the backward pass keeps the
                 bf16 copies; with gradient checkpointing it adds them for trained weights and one
                 block. If stage one holds frozen projections in bf16 (`dcr.fast.frozen`), these
                 take two bytes without copies, and without an NLL term none beyond ℓ. Layers in
                 four bits (`dcr.core.models.structure`) take half a byte and scales, without
                 copies, and the widest one is there in full while it is multiplied
    gradients    trained parameters, in their own type, and with DDP a second time in its buckets
    Adam states  twice as much, or twice a byte and a scale for 256 of them
    activations  tokens of the largest pass × the bytes that the blocks save for a token, SAVED ×
                 the sum of (rows + columns) over their matrices; with gradient checkpointing those
                 of one block, and a hidden state for every block
    logits       one chunk of losses.token_nll, fp32 values and as many gradients
    step         on a GPU, AdamW's temporary copy of the trained weights, as far as it exceeds the
                 activations, which are freed by then
    process      0.5 GB of libraries, on a CPU
FSDP splits weights, gradients and states over the devices, and gathers two blocks and the
embeddings at a time. Tokens are padded ones, or on a CPU the packed ones if the stage `packs`.
Time is FLOPs over throughput. Every token takes 2 · the parameters of its blocks for the forward
pass, as much again for the gradient of activations, and 2 · the trained parameters of its blocks;
every labelled token takes 4 · the parameters of the head; held-out rows take one forward pass an
epoch. The attention product itself is left out: it is small at these lengths. Throughput is a share
of the GPU's published dense rate (40%) or, for any other device, of a matrix product timed on the
spot (50%).
"""

import functools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dcr import extensions
from dcr.core import machine
from dcr.core.config import LoraConfig, Precision, Quantization, Stage
from dcr.core.config.training import FSDP, Adapter, Moments, TrainConfig, block_of
from dcr.core.machine import kind_of

if TYPE_CHECKING:
    from torch import nn

LOGIT_ROWS = 256  # the chunk of losses.token_nll
PROCESS_BYTES = 0.5e9
INT8_BYTES = 1 + 4 / 256  # a moment of bitsandbytes': a byte, and a scale for 256
GPU_SHARE, MEASURED_SHARE = 0.4, 0.5  # of the peak rate that training reaches
GPUS = {  # published dense FLOP/s in bf16 and in fp32
    "H100": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
}
ASSUMED_GPU = "H100"
TRIAL_SECONDS = 0.2
TRIAL_ROWS = 8, 512  # of a product: at first, and at most
PACKED = ("llama", "qwen2")  # families that the tests see packed, see dcr.fast.packing
# Bytes that a block saves per token and unit of (rows + columns) of its matrices: for a matrix that
# a gradient passes, more if it is trained, and more if it carries LoRA. Measured with saved-tensor
# hooks on Llama and Qwen2 blocks, and by the peaks of tests/test_memory.py.
SAVED = {
    Precision.mixed: (2.0, 0.5, 1.9),
    Precision.bf16: (1.8, 0.3, 1.8),
    Precision.fp32: (3.8, 0.7, 2.9),
}


@dataclass(frozen=True)
class Shape:
    """The parameter counts of the model as one stage would train it."""

    parts: dict[str, int]  # disjoint; tied weights are in the first part that holds them
    trained: dict[str, int]  # of each part
    block: int  # ℓ, 1-based
    depth: int
    width: int
    vocabulary: int
    tied: bool
    trunk: int  # blocks 1 to ℓ
    blocks: int  # all blocks
    narrow: dict[str, int]  # of each part, in four bits
    widest: int  # parameters of the widest layer in four bits
    trunk_saved: float  # bytes that blocks 1 to ℓ save for the backward pass of one token
    full_saved: float  # bytes that all blocks save

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def head(self) -> int:
        """The output projection, tied or not."""
        return self.vocabulary * self.width


def stage_shape(settings: TrainConfig, stage: Stage) -> Shape:
    """The model prepared as the stage prepares it.

    Raises ConfigError for a block the model does not have and LoRA targets that match nothing.
    """
    import torch

    from dcr.checking import skeleton
    from dcr.core.models import structure
    from dcr.core.models.training import freeze_beyond
    from dcr.quantising import quantisable

    first, lora = stage is Stage.contrastive, lora_of(settings, stage)
    model = skeleton(settings.model)
    blocks, head = structure.decoder_blocks(model), structure.head(model).weight
    block, sizes = block_of(settings.dcr, len(blocks)), [_size(b.parameters()) for b in blocks]
    tied = head is model.get_input_embeddings().weight
    parts = _parts(model, block)
    held = settings.model.quantization is not Quantization.none
    layers = {id(layer.weight) for _, _, layer in quantisable(model)} if held else set()
    narrow = {n: _size(w for w in ws if id(w) in layers) for n, ws in parts.items()}
    widest = max((w.numel() for w in blocks.parameters() if id(w) in layers), default=0)
    if lora is None:
        freeze_beyond(model, block, settings.dcr.train_embeddings)
    else:
        own = {id(weight) for part in parts.values() for weight in part}
        with torch.device("meta"):
            model = structure.add_lora(model, lora, seed=0, blocks=block if first else None)
        parts["LoRA"] = [weight for weight in model.parameters() if id(weight) not in own]
    precision = settings.dcr.precision if first else settings.sft.precision
    saved = [saved_by(each, precision) for each in blocks]
    narrow = {name: narrow.get(name, 0) for name in parts}
    return Shape(
        parts={name: _size(weights) for name, weights in parts.items()},
        trained={n: _size(w for w in ws if w.requires_grad) for n, ws in parts.items()},
        block=block,
        depth=len(blocks),
        width=head.shape[1],
        vocabulary=head.shape[0],
        tied=tied,
        trunk=sum(sizes[:block]),
        blocks=sum(sizes),
        narrow=narrow,
        widest=widest,
        trunk_saved=sum(saved[:block]),
        full_saved=sum(saved),
    )


def lora_of(settings: TrainConfig, stage: Stage) -> LoraConfig | None:
    """The adapter that the stage trains; None if it trains the weights themselves."""
    if stage is not Stage.contrastive:
        return settings.sft.lora
    return None if settings.dcr.adapter is Adapter.full else settings.dcr.lora


def _parts(model: Any, block: int) -> "dict[str, list[nn.Parameter]]":
    """The parameters by part, each in exactly one, in the order of a forward pass."""
    from dcr.core.models import structure

    blocks, norm = structure.decoder_blocks(model), structure.final_norm(model)
    norms = list(norm[1].parameters()) if norm else []
    inside = {id(weight) for weight in [*blocks.parameters(), *norms]}
    embeddings = [w for w in structure.backbone(model).parameters() if id(w) not in inside]
    inside |= {id(weight) for weight in embeddings}
    parts = {
        "embeddings": embeddings,
        f"blocks 1 to {block}": list(blocks[:block].parameters()),
        f"blocks {block + 1} to {len(blocks)}": list(blocks[block:].parameters()),
        "final norm": norms,
        "head": [weight for weight in model.parameters() if id(weight) not in inside],
    }
    return {name: weights for name, weights in parts.items() if weights or name == "head"}


def _size(weights: "Iterable[nn.Parameter]") -> int:
    return sum(weight.numel() for weight in weights)


def saved_by(block: "nn.Module", precision: Precision) -> float:
    """The bytes that a block saves for the backward pass of one token, by the table SAVED."""
    passing, trained, adapted = SAVED[precision]
    return sum(
        sum(weight.shape) * (passing + trained * weight.requires_grad)
        for name, weight in block.named_parameters()
        if weight.dim() == 2 and "lora_" not in name
    ) + sum(
        sum(module.base_layer.weight.shape) * adapted  # pyright: ignore
        for module in block.modules()
        if hasattr(module, "lora_A")
    )


# --- memory and time ---


@dataclass(frozen=True)
class Load:
    """The tokens that the passes of one rank's first epoch compute."""

    trunk: int  # passes that end at block ℓ
    full: int  # passes through every block
    unpadded: int  # of both
    labelled: int  # tokens with a next-token loss
    largest_trunk: int  # in one pass
    largest_full: int
    heldout: int


@dataclass(frozen=True)
class Throughput:
    device: str
    flops: float  # a second, in training
    basis: str


def memory(settings: TrainConfig, stage: Stage, shape: Shape, load: Load) -> dict[str, float]:
    """The bytes on one device at the peak, by their use."""
    first = stage is Stage.contrastive
    node = settings.dcr if first else settings.sft
    lora = shape.parts.get("LoRA", 0)
    trained = sum(shape.trained.values()) - lora
    gradients = _bytes(node.precision) * trained + 4 * lora
    small = first and settings.dcr.optim.moments is Moments.int8
    moments = 2 * (INT8_BYTES * (trained + lora) if small else gradients)
    world = settings.trainer.devices * settings.trainer.num_nodes
    buckets = gradients if world > 1 else 0
    if settings.trainer.strategy == FSDP:
        gradients, moments, buckets = gradients / world, moments / world, 0
    activations = load.largest_trunk * shape.trunk_saved + load.largest_full * shape.full_saved
    if node.gradient_checkpointing:
        largest = max(load.largest_trunk, load.largest_full)
        states = load.largest_trunk * shape.block + load.largest_full * shape.depth
        states *= shape.width * _product_bytes(node.precision)
        activations = largest * shape.full_saved / shape.depth + states
    logits = 2 * 4 * min(LOGIT_ROWS, load.labelled) * shape.vocabulary
    rest = {"process": PROCESS_BYTES}
    if device_type(settings) == "cuda":
        rest = {"step": max(0, (0 if small else gradients) - activations - logits)}
    return {
        "weights": _weight_bytes(settings, stage, shape, through_all=load.full > 0),
        "gradients": gradients + buckets,
        "Adam states": moments,
        "activations": activations,
        "logits": logits,
        **rest,
    }


def _bytes(precision: Precision) -> int:
    """The bytes of a weight; in four bits and of LoRA it has others."""
    return 2 if precision is Precision.bf16 else 4


def _product_bytes(precision: Precision) -> int:
    """The bytes of a number in a product."""
    return 4 if precision is Precision.fp32 else 2


def _weight_bytes(settings: TrainConfig, stage: Stage, shape: Shape, through_all: bool) -> float:
    """The bytes of the weights on one device, and of autocast's copies of them."""
    from dcr.quantising import NF4_BYTES

    first = stage is Stage.contrastive
    node = settings.dcr if first else settings.sft
    each, lora = _bytes(node.precision), shape.parts.get("LoRA", 0)
    learnt = sum(n for name, n in shape.trained.items() if name.startswith("blocks"))
    narrow = sum(shape.narrow.values())
    weights = each * (shape.total - lora - narrow) + 4 * lora + NF4_BYTES * narrow
    weights += _product_bytes(node.precision) * shape.widest
    copied = shape.blocks + shape.head if through_all else shape.trunk
    copied -= narrow if through_all else shape.narrow[f"blocks 1 to {shape.block}"]
    if node.gradient_checkpointing:  # autocast's own cache has copies of trained weights
        a_block = (shape.blocks - narrow) / shape.depth
        copied = min(copied, learnt + a_block + shape.head * through_all)
    if settings.trainer.strategy == FSDP:
        matrices = shape.head * (1 if shape.tied else 2)
        copied = min(copied, 2 * shape.blocks / shape.depth + matrices)
        world = settings.trainer.devices * settings.trainer.num_nodes
        weights = weights / world + each * copied
    if first and extensions.fast_passes().shrinks_frozen(settings):
        # autocast copies trained weights, and a tied head
        copied = learnt + shape.head * (through_all and shape.tied)
        frozen = {name: n for name, n in shape.parts.items() if not shape.trained[name]}
        frozen.pop("embeddings", None)
        beyond = f"blocks {shape.block + 1} to {shape.depth}"
        unused = 0 if through_all else frozen.pop(beyond, 0) - shape.narrow.get(beyond, 0)
        halved = sum(frozen.values()) - sum(shape.narrow[name] for name in frozen)
        weights -= 2 * halved + 4 * unused
        if not through_all:
            weights -= NF4_BYTES * shape.narrow.get(beyond, 0)
    return weights + 2 * copied * (node.precision is Precision.mixed)


def epoch_flops(settings: TrainConfig, stage: Stage, shape: Shape, load: Load) -> float:
    """The floating-point operations of one rank in one epoch."""
    in_blocks = [n for name, n in shape.trained.items() if name.startswith(("blocks", "LoRA"))]
    node = settings.dcr if stage is Stage.contrastive else settings.sft
    passes = 3 if node.gradient_checkpointing else 2
    heldout = shape.trunk if stage is Stage.contrastive else shape.blocks
    return (
        2 * passes * (load.trunk * shape.trunk + load.full * shape.blocks)
        + 2 * (load.trunk + load.full) * sum(in_blocks)
        + 4 * load.labelled * shape.head
        + 2 * load.heldout * heldout
    )


def readout_flops(settings: TrainConfig, shape: Shape, load: Load, learnt: int) -> float:
    """The floating-point operations of the readout, see `dcr.readout`.

    The load's tokens pass all blocks, and the last ones again, which checks that they give the
    same; `learnt` tokens pass the last blocks in the steps, and held-out ones about twice more. The
    head reads labelled places forward and back, and once with the weights from before.
    """
    part = settings.sft.readout.blocks / shape.depth
    last, lora = part * shape.blocks, part * shape.trained.get("LoRA", 0)
    return (
        2 * load.full * (shape.blocks + last)
        + (4 * last + 2 * lora) * learnt
        + 4 * last * load.heldout
        + 6 * shape.head * load.labelled
    )


def packs(settings: TrainConfig, stage: Stage) -> bool:
    """Whether the stage's passes are packed here, as far as the architecture tells.

    They are on a CPU, for families that are known to allow it.
    """
    from dcr.core import models

    node = settings.dcr if stage is Stage.contrastive else settings.sft
    plain = not node.gradient_checkpointing and settings.trainer.strategy != FSDP
    if not plain or device_type(settings) != "cpu":
        return False
    return models.architecture(settings.model).model_type in PACKED


def device_type(settings: TrainConfig) -> str:
    """`cuda`, or `cpu` for every other accelerator."""
    return "cuda" if kind_of(settings.trainer.accelerator) == "cuda" else "cpu"


def throughput(settings: TrainConfig, precision: Precision, width: int) -> Throughput:
    """The throughput of one device that the command would run on."""
    if device_type(settings) == "cpu":
        number = _threads(settings.trainer.threads)
        rate = _measured_cpu(number, precision, width)
        name = f"this CPU, {number} threads"
    else:
        import torch

        name = torch.cuda.get_device_name() if torch.cuda.is_available() else ASSUMED_GPU
        if any(known in name for known in GPUS):
            return published_throughput(name, precision)
        rate = timed_product("cuda", precision, width, torch.get_num_threads())
    basis = f"{MEASURED_SHARE:.0%} of {rate / 1e12:.3g} TFLOP/s measured"
    return Throughput(name, MEASURED_SHARE * rate, basis)


@functools.cache  # it changes with the load, and all stages of a plan stand in one row
def _threads(asked: int | None) -> int:
    return machine.chosen_threads(asked)[0]


@functools.cache
def _measured_cpu(threads: int, precision: Precision, width: int) -> float:
    """The FLOP/s of this CPU, measured once a process."""
    return timed_product("cpu", precision, width, threads)


def published_throughput(name: str, precision: Precision) -> Throughput:
    """The throughput assumed for a GPU of that name."""
    rates = next(rates for known, rates in GPUS.items() if known in name)
    rate = rates[precision is Precision.fp32]
    return Throughput(name, GPU_SHARE * rate, f"{GPU_SHARE:.0%} of {rate / 1e12:.0f} TFLOP/s")


def timed_product(device: str, precision: Precision, width: int, threads: int) -> float:
    """The FLOP/s of a matrix product in the stage's type, the best of several rounds.

    The first round has few rows, and no later one takes longer than TRIAL_SECONDS.
    """
    import torch

    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    left = torch.ones(TRIAL_ROWS[1], width, dtype=dtype, device=device)
    right = torch.ones(width, width, dtype=dtype, device=device)
    before, used, a_row, rows = torch.get_num_threads(), 0.0, math.inf, TRIAL_ROWS[0]
    torch.set_num_threads(threads)
    while used < TRIAL_SECONDS:
        began = time.perf_counter()
        torch.mm(left[:rows], right)
        if device == "cuda":
            torch.cuda.synchronize()
        spent = time.perf_counter() - began
        used, a_row = used + spent, min(a_row, spent / rows)
        rows = min(TRIAL_ROWS[1], max(TRIAL_ROWS[0], int(TRIAL_SECONDS / a_row)))
    torch.set_num_threads(before)
    return 2 * width * width / a_row
