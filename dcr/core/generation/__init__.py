"""Greedy completions of a model on this machine, stored as they come.

`local` answers prompts, as many at once as memory holds; `completions` has the records and files.
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
