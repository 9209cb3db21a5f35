"""`dcr.core.passes` made fast on a CPU: the same results, up to rounding, in less time.

`passes.Fast` is the seam's other side. The entry points hand it in (`dcr.extensions`); without it
the core computes padded batches, as transformers does.

`packing`: rows of a batch lie one behind another, without padding, and what all of them begin with
is computed once. `fusing`: LoRA layers, RMS norms and SwiGLU as one step each, and weights laid out
once for decoding. `cache`: keys and values of a decoding batch, in room made ahead. `holding`:
frozen weights of stage one in bf16. Off the CPU batches stay padded; prompts still share what they
begin with.
"""

from dcr.core.config import FSDP, Precision, TrainConfig


def lightens(settings: TrainConfig) -> bool:
    """Whether frozen weights of stage one are held in less memory, see `holding`.

    Where one process trains, in autocast, and nothing else is measured on the model meanwhile.
    """
    trainer = settings.trainer
    alone = trainer.devices * trainer.num_nodes == 1 and trainer.strategy != FSDP
    mixed = settings.dcr.precision is Precision.mixed
    return alone and mixed and not settings.tracking.quantities
