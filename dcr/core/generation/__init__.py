"""Greedy completions of a model on this machine, stored as they come.

`local` answers prompts, as many at once as memory holds, and `decoding` decodes a batch of them.
"""

from dcr.core.generation.local import (
    Completion,
    Decoding,
    Encoded,
    OpeningBias,
    batch_size,
    check_context,
    complete,
    continued,
    cut,
    prompt_bytes,
    stored,
    text,
)
