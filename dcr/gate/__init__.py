"""Trains a gate: a model as a classifier of toxic and seemingly toxic prompts, for `dcr.gating`.

It learns the pairs that the readout learns, each prompt in the model's chat format and a share of
them in the words of a frame, with one logit on the state of the last token and LoRA below it,
merged at the end. No part of the paper; docs/gate.md says when to use one. Defaults were chosen on
`data=dev`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """The highest learning rate, how often each pair is seen, the prompts of a step, and the share
    of each epoch's pairs that stand in a frame.
    """

    lr: float = 5e-4
    epochs: int = 3
    batch_size: int = 16
    framed: float = 0.5
