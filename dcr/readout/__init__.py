"""Stage three, the readout, which is no part of the paper: docs/train.md says what it does.

`rows` draws what it learns, and `stage` trains on it.
"""

WARMUP = 0.05  # share of the readout's steps
