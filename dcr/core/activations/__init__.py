"""The residual stream, read and edited at four sites of every block.

Layer ℓ means: after the ℓ-th block, 1-based. `reading` finds the places by structure and takes
hidden states out of a forward pass, `edits` changes them in every pass of an open context.
"""

from dcr.core.activations.edits import Edit, Edits, Plan, edited, per_row
from dcr.core.activations.reading import Site, captured, pooled, states
