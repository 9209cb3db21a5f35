"""What a stage of training costs: its parameters, and estimates of peak memory and time.

Parameters, trained and frozen, are those of the real architecture, built without storage on torch's
meta device.

Memory, in bytes, is the sum of
    weights      parameters × bytes of their type, LoRA in fp32; under autocast of fp32 weights
                 two bytes more for each that a gradient passes, since the backward pass keeps the
                 bf16 copies
    gradients    trained parameters, in their own type
    Adam states  twice as much
    activations  padded tokens of the largest pass × what the blocks keep for a token, which is
                 SAVED × the sum of (rows + columns) over their matrices; with gradient
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

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dcr import models, threads
from dcr.config import Adapter, Precision, Stage, TrainConfig, block_of

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
# Bytes a block keeps per token and unit of (rows + columns) of its matrices: where a gradient
# passes, and more where the matrix itself is trained, and where it carries LoRA. Measured with
# saved-tensor hooks on Llama and Qwen2 blocks.
SAVED = {
    Precision.mixed: (2.4, 0.6, 2.2),
    Precision.bf16: (2.2, 0.3, 2.2),
    Precision.fp32: (3.8, 0.7, 2.9),
}


@dataclass(frozen=True)
class Shape:
    """The model as one stage would train it. Counts of parameters unless said otherwise."""

    parts: dict[str, int]  # disjoint, tied weights in the first part that holds them
    trained: dict[str, int]  # of each part
    block: int  # ℓ, 1-based
    depth: int
    width: int
    vocabulary: int
    tied: bool
    trunk: int  # blocks 1 to ℓ
    blocks: int  # all blocks
    head: int  # the output projection, also where tied
    trunk_saved: float  # bytes kept by blocks 1 to ℓ for the backward pass of one token
    full_saved: float  # by all blocks
    passed: int  # of the first blocks, below all that trains, which a gradient does not pass

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def stage_shape(settings: TrainConfig, stage: Stage) -> Shape:
    """The model prepared as the stage prepares it.

    Raises ConfigError for a block the model does not have and LoRA targets that match nothing.
    """
    first = stage is Stage.contrastive
    node = settings.dcr if first else settings.sft
    model = models.skeleton(settings.model)
    blocks, head = models.decoder_blocks(model), models.head(model).weight
    block = block_of(settings.dcr, len(blocks))
    tied = head is model.get_input_embeddings().weight
    parts = _parts(model, block)
    if first and settings.dcr.adapter is Adapter.full:
        models.freeze_beyond(model, block, settings.dcr.train_embeddings)
    else:
        known = {id(weight) for part in parts.values() for weight in part}
        with torch.device("meta"):
            places = {"blocks": block} if first else {"first": settings.sft.from_block}
            model = models.add_lora(model, node.lora, seed=0, **places)
        parts["LoRA"] = [weight for weight in model.parameters() if id(weight) not in known]
    passed = 0 if first else settings.sft.from_block - 1
    saved = [saved_by(layer, node.precision) for layer in blocks]
    return Shape(
        parts={name: _size(weights) for name, weights in parts.items()},
        trained={n: _size(w for w in ws if w.requires_grad) for n, ws in parts.items()},
        block=block,
        depth=len(blocks),
        width=head.shape[1],
        vocabulary=head.shape[0],
        tied=tied,
        trunk=_size(parts[lower(block)]),
        blocks=_size(parts[lower(block)]) + _size(parts.get(upper(block, len(blocks)), [])),
        head=head.numel(),
        trunk_saved=sum(saved[passed:block]),
        full_saved=sum(saved[passed:]),
        passed=_size(blocks[:passed].parameters()),
    )


def lower(block: int) -> str:
    """The name of the part up to ℓ."""
    return f"blocks 1 to {block}"


def upper(block: int, depth: int) -> str:
    """The name of the part beyond ℓ, which a model cut at its last block does not have."""
    return f"blocks {block + 1} to {depth}"


def _parts(model: Any, block: int) -> dict[str, list[nn.Parameter]]:
    """Every parameter in exactly one part, in the order of a forward pass."""
    blocks, norm = models.decoder_blocks(model), models.final_norm(model)
    norms = list(norm[1].parameters()) if norm else []
    inside = {id(weight) for weight in [*blocks.parameters(), *norms]}
    embeddings = [w for w in models.backbone(model).parameters() if id(w) not in inside]
    inside |= {id(weight) for weight in embeddings}
    parts = {
        "embeddings": embeddings,
        lower(block): list(blocks[:block].parameters()),
        upper(block, len(blocks)): list(blocks[block:].parameters()),
        "final norm": norms,
        "head": [weight for weight in model.parameters() if id(weight) not in inside],
    }
    return {name: weights for name, weights in parts.items() if weights or name == "head"}


def _size(weights: Iterable[nn.Parameter]) -> int:
    return sum(weight.numel() for weight in weights)


def saved_by(block: nn.Module, precision: Precision) -> float:
    """Bytes a block keeps for the backward pass of one token, by the table SAVED."""
    passing, trained, adapted = SAVED[precision]
    kept = 0.0
    for name, weight in block.named_parameters():
        if weight.dim() == 2 and "lora_" not in name:
            kept += sum(weight.shape) * (passing + trained * weight.requires_grad)
    for module in block.modules():
        if hasattr(module, "lora_A"):
            kept += adapted * sum(module.base_layer.weight.shape)  # pyright: ignore
    return kept


# --- memory and time ---


@dataclass(frozen=True)
class Load:
    """One rank's first epoch, in padded tokens unless said otherwise."""

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
    parts = {
        "weights": weights,
        "gradients": each * trained + 4 * lora,
        "Adam states": 2 * (each * trained + 4 * lora),
        "activations": _activations(settings, stage, shape, load),
        "logits": 2 * 4 * chunk,
    }
    return parts if device_type(settings) == "cuda" else {**parts, "process": PROCESS_BYTES}


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
        - 2 * (passes - 1) * (load.trunk + load.full) * shape.passed
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
        number, _ = threads.chosen(settings.trainer.threads)
        rate = _timed_product("cpu", precision, width, number)
        return Throughput(f"this CPU, {number} threads", MEASURED_SHARE * rate, _measured(rate))
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
    from torch.utils.benchmark import Timer  # slow to import, and only a plan needs it

    dtype = torch.float32 if precision is Precision.fp32 else torch.bfloat16
    left = torch.ones(512, width, dtype=dtype, device=device)
    right = torch.ones(width, width, dtype=dtype, device=device)
    timer = Timer("left @ right", globals={"left": left, "right": right}, num_threads=threads)
    best = min(timer.blocked_autorange(min_run_time=TRIAL_SECONDS).times)
    return 2 * left.numel() * width / best
