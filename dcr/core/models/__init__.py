"""Causal language models: opened by name, taken apart by structure, saved as Hugging Face folders.

`opening` opens a model and its tokenizer by name, `structure` finds, cuts, freezes and adapts its
parts and holds them in four bits, and `saving` writes results and opens them again, also after
their run folder moved.
"""

from dcr.core.models.opening import (
    Policy,
    architecture,
    byte_tokenizer,
    check_finite,
    convert_gguf,
    embedded_folder,
    facts,
    open_policy,
    open_tokenizer,
    random_policy,
    read_architecture,
    refused_as,
    skeleton,
    source_of,
)
from dcr.core.models.saving import (
    ORIGIN_FILE,
    adapter_base,
    base_quantization,
    is_adapter,
    open_adapter,
    open_base,
    open_folder,
    open_result,
    result_tokenizer,
    save_adapter,
    save_full,
    weights_fingerprint,
)
from dcr.core.models.structure import (
    DTYPES,
    NF4_BYTES,
    UNLIMITED,
    add_lora,
    backbone,
    context_length,
    contiguous_head,
    decoder_blocks,
    dequantise,
    evaluating,
    final_norm,
    freeze_beyond,
    head,
    is_quantised,
    is_sharded,
    logits,
    quantisable,
    readout,
    rounding_errors,
    seeded,
    trained,
    trunk,
    unwrapped,
    whole,
)
