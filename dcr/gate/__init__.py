"""Trains a gate: a model as a classifier of toxic and seemingly toxic prompts, for `dcr.gating`.

It learns the pairs that the readout learns, each prompt in the model's chat format, with one logit
on the state of the last token and LoRA below it, merged at the end. No part of the paper;
docs/gate.md says when to use one. Defaults were chosen on `data=dev`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The highest learning rate, how often each pair is seen, and the prompts of a step."""

    lr: float = 5e-4
    epochs: int = 3
    batch_size: int = 16
