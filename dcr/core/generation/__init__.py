"""Greedy completions of a model here, stored as they come.

`local` has a model's prompts answered, as many at once as memory holds. `completions` is what that
gives, and its files.
"""

from dcr.core.generation.completions import Completion, stored, text
from dcr.core.generation.local import (
    Decoding,
    OpeningBias,
    batch_size,
    check_context,
    complete,
    continued,
    cut,
    greedy,
    prompt_bytes,
)
