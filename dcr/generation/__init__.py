"""Greedy completions, of a model here or behind a server, stored as they come.

`local` has a model's prompts answered, as many at once as `memory` says: with `rolling`, where the
next prompt takes the place of one that has ended, or with `whole`, transformers' own `generate`.
`remote` asks an OpenAI-compatible server. `completions` is what they all give, and its files.
"""

from dcr.generation.completions import Completion, store, stored
from dcr.generation.local import complete
from dcr.generation.memory import batch_size, prompt_bytes
from dcr.generation.remote import complete_remote
from dcr.generation.whole import FirstLogits, continued, own_decoding

__all__ = [
    "Completion",
    "FirstLogits",
    "batch_size",
    "complete",
    "complete_remote",
    "continued",
    "own_decoding",
    "prompt_bytes",
    "store",
    "stored",
]
