"""Greedy completions, of a model here or behind a server, stored as they come.

`local` has a model's prompts answered, as many at once as memory holds, by a `contrast` against
what a system prompt that tells to refuse would add. `completions` is what they give, its files, and
the same asked of an OpenAI-compatible server.
"""

from dcr.core.generation.completions import Completion, complete_remote, replies, stored, text
from dcr.core.generation.local import (
    OpeningBias,
    batch_size,
    check_context,
    complete,
    continued,
    cut,
    greedy,
    prompt_bytes,
)
