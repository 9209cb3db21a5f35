"""The residual stream, read and edited at four sites of every block.

Layer ℓ means: after the ℓ-th block, 1-based. `reading` takes hidden states out of a forward pass,
`edits` changes them in every pass of an open context, and `sites` finds the places by structure.
"""

from dcr.activations.edits import Edit, Edits, Plan, edited, per_row
from dcr.activations.reading import captured, pooled, states
from dcr.activations.sites import Site

__all__ = [
    "Edit",
    "Edits",
    "Plan",
    "Site",
    "captured",
    "edited",
    "per_row",
    "pooled",
    "states",
]
