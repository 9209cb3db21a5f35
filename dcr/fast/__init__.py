"""`dcr.core.passes` made fast on a CPU: the same results, up to rounding, in less time.

`passes.Fast` is the seam's other side. The entry points hand it in (`dcr.extensions`); without it
the core computes padded batches, as transformers does.

`packing`: rows of a batch lie one behind another, without padding, and what all of them begin with
is computed once. `fusing`: LoRA layers, RMS norms and SwiGLU as one step each, and weights laid out
once for decoding. `cache`: keys and values of a decoding batch, in room made ahead. `holding`:
frozen weights of stage one in bf16. Off the CPU batches stay padded; prompts still share what they
begin with.
"""
