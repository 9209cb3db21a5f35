"""Fast passes for a CPU: the results of the core's, up to rounding, in less time.

The entry points hand `Fast` to `dcr.core.passes` and `learning` (`dcr.extensions`); without it the
core computes padded batches, as transformers does.

`packing` lays the rows of a batch one behind another, without padding, and computes their common
prefix once. `fusing` computes LoRA layers, RMS norms and SwiGLU in one step each, and lays weights
out once for decoding. `frozen` needs no second pass through a frozen head for its gradient, and
holds frozen weights of stage one in bf16. `cache` writes keys and values of a decoding batch into
room made ahead. Off the CPU batches stay padded; prompts still share their prefix.
"""
