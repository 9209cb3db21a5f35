"""AdamW, and its learning rate as a pure function of the optimiser step."""

import math
from collections.abc import Callable
from typing import Any

import torch

from dcr.config import Schedule


def _constant(_progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return max(0.0, 1.0 - progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


SHAPES = {Schedule.constant: _constant, Schedule.linear: _linear, Schedule.cosine: _cosine}


def factor(schedule: Schedule, total: int, warmup: int) -> Callable[[int], float]:
    """What to multiply the peak rate by at step 0, 1, …: linear warm-up, then the shape.

    Step `s` of the warm-up has (s + 1) / (warmup + 1), so that no step is wasted at rate 0.
    """
    shape = SHAPES[schedule]

    def at(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return shape((step - warmup) / max(1, total - warmup))

    return at


def adamw(
    module: torch.nn.Module,
    factor: Callable[[int], float],
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> dict[str, Any]:
    """AdamW over what trains, as Lightning wants it, its rate `lr` times `factor` of the step."""
    trained = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, betas=betas, weight_decay=weight_decay)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}
