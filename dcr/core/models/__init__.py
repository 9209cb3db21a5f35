"""Causal language models: opened by name, taken apart by structure, saved as Hugging Face folders.

`opening` opens a model and its tokenizer by name, `structure` finds, cuts, freezes and adapts its
parts, and `saving` writes results and opens them again, also after their run folder moved.
"""

from dcr.core.models.opening import (
    DTYPES,
    Policy,
    architecture,
    byte_tokenizer,
    embedded_folder,
    facts,
    open_policy,
    open_tokenizer,
    random_policy,
    skeleton,
)
from dcr.core.models.saving import (
    ORIGIN_FILE,
    adapter_base,
    is_adapter,
    open_adapter,
    open_folder,
    open_result,
    result_tokenizer,
    save_adapter,
    save_full,
    weights_fingerprint,
)
from dcr.core.models.structure import (
    UNLIMITED,
    add_lora,
    backbone,
    context_length,
    decoder_blocks,
    evaluating,
    final_norm,
    freeze_beyond,
    head,
    is_sharded,
    logits,
    readout,
    trained,
    trunk,
    unwrapped,
    whole,
)
