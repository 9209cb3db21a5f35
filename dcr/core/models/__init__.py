"""Causal language models: opened by name, understood by structure, saved as Hugging Face folders.

`opening` makes a model and its tokenizer out of a name, `structure` finds, cuts, freezes and adapts
its parts, `saving` writes results and opens them again wherever their run folder went.
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
    add_lora,
    backbone,
    decoder_blocks,
    evaluating,
    final_norm,
    freeze_beyond,
    head,
    is_sharded,
    logits,
    readout,
    shard,
    trained,
    trunk,
    unwrapped,
    whole,
)
